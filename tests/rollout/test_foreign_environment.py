"""Which environment variables give way to the config, and which are the user's own."""

import os
from pathlib import Path

import pytest
from rigs import CONFIG

from rollout import foreign_environment
from rollout.foreign_environment import take_out
from rollout.vllm_engine import _process_environment


@pytest.mark.parametrize(
    ("name", "decided"),
    [
        ("VLLM_CPU_KVCACHE_SPACE", "rollout.kv_cache_mib"),
        ("VLLM_ATTENTION_BACKEND", "rollout"),
        ("VLLM_BATCH_INVARIANT", "rollout"),
        ("VLLM_USE_V1", "rollout"),
        ("RAY_ADDRESS", "resources.address"),
        ("NVIDIA_TF32_OVERRIDE", "<stage>.precision"),
        ("WORLD_SIZE", "resources.<stage>.num_workers"),
        ("ACCELERATE_USE_FSDP", "<stage>.precision, resources"),
    ],
)
def test_what_stands_for_a_setting_is_taken_out(name: str, decided: str):
    environment = {name: "1", "HOME": "/root"}
    assert take_out(environment) == {name: decided}
    assert environment == {"HOME": "/root"}


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_LOGGING_LEVEL",
        "VLLM_LOGGING_CONFIG_PATH",
        "VLLM_CACHE_ROOT",
        "VLLM_HOST_IP",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_USE_V2_MODEL_RUNNER",
        "CUDA_VISIBLE_DEVICES",
        "HF_HOME",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "TRANSFORMERS_VERBOSITY",
        "https_proxy",
        "NO_PROXY",
        "OMP_NUM_THREADS",
        "OMP_PROC_BIND",
        "KMP_AFFINITY",
        "MKL_NUM_THREADS",
        "NCCL_SOCKET_IFNAME",
        "NCCL_DEBUG",
        "GLOO_SOCKET_IFNAME",
        "TORCH_LOGS",
        "TORCH_DISTRIBUTED_DEBUG",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TOKENIZERS_PARALLELISM",
        "WANDB_API_KEY",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_MODE",
        "RLHF_RUN_ID",
        "TMPDIR",
        "LANG",
    ],
)
def test_what_is_the_users_own_stays(name: str):
    assert take_out({name: "1"}) == {}


def test_no_pattern_is_hidden_by_one_before_it():
    patterns = list(foreign_environment.DECIDED_BY)
    for index, pattern in enumerate(patterns):
        example = pattern.replace("*", "X")
        first = next(other for other in patterns if foreign_environment.fnmatchcase(example, other))
        assert patterns.index(first) == index, f"{pattern} is never reached: {first}"


def test_an_engine_beats_the_environment_of_its_machine_and_keeps_its_binding(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    before = dict(os.environ)
    with _process_environment(CONFIG, dtype="float32", log_path=Path("log")):
        assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0"
        assert os.environ["VLLM_PLUGINS"] == "rlhf_weight_receivers"
    assert dict(os.environ) == before


def test_the_page_names_every_variable_that_gives_way():
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    assert [pattern for pattern in foreign_environment.DECIDED_BY if f"`{pattern}`" not in page] == []
