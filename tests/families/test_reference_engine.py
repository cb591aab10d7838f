"""`engine: hf`, what the vLLM engine is checked against, attends by each architecture's own formula."""

from collections.abc import Iterator

import pytest
import torch
from rigs import SAME, Rig, logprobs_of, perturb_all, request, start_rig
from transformers import AutoModelForCausalLM

PROBES = [request(index, prompt=(21, 8, 5 + index, 90, 7, 33)) for index in range(3)]


@pytest.fixture
def start(loop, family_dir, tmp_path) -> Iterator:
    started: list[Rig] = []

    def engine(name: str) -> Rig:
        started.append(start_rig("hf", loop, family_dir(name), tmp_path, max_model_len=128))
        return started[-1]

    yield engine
    for rig in started:
        rig.close()


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"], ids=["softcaps", "sinks"])
def test_softcaps_and_sinks_are_in_it_from_the_start_and_after_every_sync(start, family):
    rig = start(family)
    assert rig.max_diff(rig.submit(PROBES)) < 1e-5
    for seed in (1, 2):
        perturb_all(rig.model, seed=seed)
        rig.sync_next()
        assert rig.max_diff(rig.submit(PROBES)) < 1e-5
    assert rig.sync.diagnose() == SAME


def test_attention_without_the_softcap_would_be_seen(start, family_dir):
    rollouts = start("gemma2").submit(PROBES)
    without = AutoModelForCausalLM.from_pretrained(
        family_dir("gemma2"), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    assert any(
        abs(ours - theirs) > 1e-2
        for rollout in rollouts
        for ours, theirs in zip(
            rollout.logprobs, logprobs_of(without, rollout.prompt_ids, rollout.response_ids, 1.0), strict=True
        )
    )
