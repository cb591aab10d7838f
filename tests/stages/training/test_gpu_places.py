"""Which GPUs each process of a stage sees, and through which network interface it talks: on a real local Ray
whose four GPUs are invented, and in the environment of workers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from inline import runtime_in

from rollout.config import EngineConfig
from stages import engines
from stages.training import distributed
from stages.training.distributed import launched

pytestmark = pytest.mark.ray

SCRIPT = Path(__file__).parent / "invented_gpus.py"
IMPORTABLE = os.pathsep.join(str(Path(__file__).parents[index]) for index in (2, 3))


TOLD = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
TF32 = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
"""As in NVIDIA's containers: torch then begins with TF32 in fp32 matrix products."""


def seen_in(directory: Path, model_dir: Path, *cases: str) -> dict[str, Any]:
    """What every process of these cases of `invented_gpus` saw."""
    environment = {name: value for name, value in os.environ.items() if name not in TOLD}
    answer = subprocess.run(
        [sys.executable, SCRIPT, model_dir, directory, *cases],
        env=environment | TF32 | {"PYTHONPATH": IMPORTABLE},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def cpu_workers(tied_model_dir, tmp_path_factory) -> dict[str, Any]:
    """Two workers without a GPU, the first of which opens an engine with one, as reward and evaluate do."""
    return seen_in(tmp_path_factory.mktemp("gpus"), tied_model_dir, "cpu workers")["cpu workers"]


def test_an_engine_that_a_worker_without_a_gpu_opens_sees_its_own(cpu_workers):
    assert cpu_workers["engines"] == ["0"]
    assert (cpu_workers["CUDA_VISIBLE_DEVICES"], cpu_workers["device"], cpu_workers["torch"]) == (
        "",
        "cpu",
        0,
    )


def test_gloo_talks_through_loopback_on_one_host_and_nccl_never_does(cpu_workers):
    """The id of a weight sync's nccl group holds an address of the trainer, and engines may be elsewhere."""
    assert cpu_workers["GLOO_SOCKET_IFNAME"] == "lo"
    assert cpu_workers["NCCL_SOCKET_IFNAME"] != "=lo"


@pytest.mark.slow
def test_trainers_and_engines_see_the_gpus_they_reserved_shared_or_alone(tied_model_dir, tmp_path):
    found = seen_in(tmp_path, tied_model_dir, "shares", "two and two", "engine of two")
    assert found["shares"] == {"workers": ["0"], "engines": ["0"]}
    assert found["two and two"] == {"workers": ["0", "1"], "engines": ["2", "3"]}
    (of_the_engine,), (of_the_worker,) = found["engine of two"]["engines"], found["engine of two"]["workers"]
    assert {*of_the_engine.split(","), of_the_worker} == {"0", "1", "2"}, "the engine two, the worker another"
    assert len(of_the_engine.split(",")) == 2


STAGE_TASK = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from pipeline.stage_task import _settle_process
from stages.runtime import StageResources
node, resources = SimpleNamespace(stage="sft"), StageResources(num_gpus=1)
job = SimpleNamespace(num_threads=1, log_dir=Path(sys.argv[1]), node=node, resources=resources)
_settle_process(job)
print(repr(os.environ["CUDA_VISIBLE_DEVICES"]))
"""


def test_the_process_of_a_stage_whose_workers_have_gpus_uses_none(tmp_path):
    """Ray hides none from it, and it has reserved none: its output goes to the stage's log."""
    environment = os.environ | {"PYTHONPATH": IMPORTABLE, "CUDA_VISIBLE_DEVICES": "0,1"}
    subprocess.run([sys.executable, "-c", STAGE_TASK, tmp_path], env=environment, timeout=60, check=True)
    assert (tmp_path / "sft.log").read_text() == "''\n"


@pytest.fixture
def two_interfaces(monkeypatch):
    """A machine with loopback and one network, and none of ours in its environment."""
    addresses = {
        "lo": [SimpleNamespace(address="127.0.0.1"), SimpleNamespace(address="::1")],
        "ib0": [SimpleNamespace(address="10.0.0.7")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what is set below ends with the test
        monkeypatch.delenv(name)


def test_nccl_talks_through_the_interface_that_other_nodes_know_this_one_by(two_interfaces):
    distributed._nccl_talks_through("10.0.0.7")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=ib0", "this one, and none whose name begins so"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "node-7.cluster"])
def test_nccl_is_left_alone_where_this_node_is_known_by_loopback_or_by_a_name(two_interfaces, address):
    distributed._nccl_talks_through(address)
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_an_interface_that_the_machines_owner_has_chosen_stays(two_interfaces, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=ib1")
    distributed._nccl_talks_through("10.0.0.7")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=ib1"


def test_a_group_of_one_in_bf16_leaves_nccl_alone(two_interfaces, monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "_init_process_group", lambda *_, **__: None)
    worker = distributed.Worker(
        rank=0, world_size=1, device=torch.device("cpu"), runtime=runtime_in(tmp_path, "sft")
    )
    distributed._ensure_process_group(worker)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo" and "NCCL_SOCKET_IFNAME" not in os.environ


def test_fp32_matrix_products_of_a_trainer_are_fp32_whatever_was_set_before(tmp_path):
    torch.set_float32_matmul_precision("medium")
    try:
        runtime = runtime_in(tmp_path, "sft")
        with launched(lambda worker: torch.get_float32_matmul_precision(), runtime) as call:
            found = call()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found == "highest"


def test_fp32_matrix_products_of_a_worker_on_ray_are_fp32_where_torch_begins_with_tf32(cpu_workers):
    ask = "import torch; print(torch.get_float32_matmul_precision())"
    before = subprocess.run(
        [sys.executable, "-c", ask], env=os.environ | TF32, capture_output=True, text=True, check=True
    )
    assert (before.stdout.strip(), cpu_workers["fp32_precision"]) == ("high", "highest")


def test_a_process_gives_cached_gpu_memory_back_before_it_opens_an_engine(
    tied_model_dir, tmp_path, monkeypatch
):
    """vLLM does not start where less than its share of a GPU is free."""
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("given back"))
    opened = engines.open_engine

    async def open_engine(*arguments: Any, **options: Any) -> Any:
        happened.append("opened")
        return await opened(*arguments, **options)

    monkeypatch.setattr(engines, "open_engine", open_engine)
    with engines.open_engines(
        EngineConfig(engine="hf"),
        model_dir=tied_model_dir,
        dtype="float32",
        max_model_len=64,
        runtime=runtime_in(tmp_path, "reward"),
    ):
        assert happened == ["given back", "opened"]
