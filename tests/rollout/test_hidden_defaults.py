"""What an engine must not do unasked: take sampling defaults from a model directory, keep keys and values of
other weights.
"""

import json
import shutil
from dataclasses import replace

import pytest
from rigs import CONFIG, MAX_MODEL_LEN, Rig, request, start_rig
from test_weight_sync import GROUPS, perturb

from rollout import vllm_engine
from rollout.vllm_engine import VLLMEngine

pytestmark = pytest.mark.engine

OPINIONATED = {
    "do_sample": True,
    "temperature": 0.3,
    "top_p": 0.2,
    "top_k": 2,
    "min_p": 0.4,
    "repetition_penalty": 3.0,
    "max_new_tokens": 3,
    "eos_token_id": list(range(5, 300)),
}
"""A generation_config.json that would be seen in every response if an engine read it."""


@pytest.fixture
def close_at_the_end():
    """Rigs that only one test needs."""
    rigs: list[Rig] = []
    yield rigs.append
    for rig in rigs:
        rig.close()


@pytest.mark.parametrize("kind", ["vllm", "hf"])
def test_pin_2_a_generation_config_in_the_model_directory_changes_no_sample(
    rigs, loop, kind, tied_model_dir, tmp_path, close_at_the_end
):
    shutil.copytree(tied_model_dir, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(OPINIONATED))
    opinionated = start_rig(kind, loop, tmp_path / "model", tmp_path)
    close_at_the_end(opinionated)
    plain = rigs(kind, tied=True)
    plain.reset()
    requests = [
        request(index, temperature=temperature, max_tokens=20)
        for index, temperature in enumerate([1.0, 1.0, 1.7, 0.7, 0.0])
    ]
    opinionated.reset()  # the same weight version, so that whole rollouts can be compared
    expected, found = plain.submit(requests), opinionated.submit(requests)
    version = found[0].weight_versions[0]
    assert found == [replace(rollout, weight_versions=(version,) * 20) for rollout in expected]


def test_pin_37_prefix_caching_is_off_for_it_makes_fp32_output_depend_on_what_ran_before(tied_model_dir):
    arguments = vllm_engine._arguments(
        CONFIG, model_dir=tied_model_dir, dtype="float32", max_model_len=MAX_MODEL_LEN
    )
    assert arguments.enable_prefix_caching is False
    assert arguments.generation_config == "vllm" and arguments.logprobs_mode == "processed_logprobs"


def test_pin_37_even_with_prefix_caching_on_no_cached_prefix_outlives_a_weight_version(
    loop, tied_model_dir, tmp_path, monkeypatch, close_at_the_end
):
    """The first half shows that this test can fail: a pause that clears no cache leaves stale keys and
    values.
    """
    arguments = vllm_engine._arguments

    def with_prefix_caching(*args, **kwargs):
        return replace(arguments(*args, **kwargs), enable_prefix_caching=True)

    monkeypatch.setattr(vllm_engine, "_arguments", with_prefix_caching)
    rig = start_rig("vllm", loop, tied_model_dir, tmp_path)
    close_at_the_end(rig)
    shared = tuple(5 + index * 7 % 300 for index in range(400))  # several cache blocks of 128 tokens
    requests = [request(index, prompt=(*shared, index), max_tokens=4) for index in range(4)]

    def moved_and_synced(seed: int) -> float:
        rig.submit(requests)
        perturb(rig.model, GROUPS["k"] + GROUPS["v"] + GROUPS["norms"], seed=seed)
        rig.sync_next()
        return rig.max_diff(rig.submit(requests))

    async def pause_without_clearing(engine):
        await engine._call("pause", lambda llm: llm.pause_generation(mode="abort", clear_cache=False))
        engine._paused = True

    with monkeypatch.context() as patch:
        patch.setattr(VLLMEngine, "pause", pause_without_clearing)
        assert moved_and_synced(0) > 1e-3
    for seed in (1, 2):
        assert moved_and_synced(seed) < 1e-5
