"""A diagnosis explains a ParityError and never hides one: whatever keeps the tensors from being compared is
told in the same line.
"""

import asyncio
import contextlib
from pathlib import Path

import pytest
import torch
from fakes import FakeEngine
from rigs import CONFIG, SAME, Rig, logprobs_of
from transformers import AutoModelForCausalLM

from rollout.api import Diagnosis, joined_diagnosis
from rollout.errors import ParityError
from rollout.weight_sync import ModuleSource, ParityGate, WeightSync, in_words

PROMPTS = [(5, 9, 30), (44, 2)]


@pytest.fixture(params=["vllm", "actor", "hf"])
def rig(rigs, request) -> Rig:
    rig = rigs(request.param, tied=True)
    rig.reset()
    return rig


@pytest.fixture
def model(tied_model_dir):
    return AutoModelForCausalLM.from_pretrained(tied_model_dir, dtype=torch.float32).eval()


def verdict(sync: WeightSync, model, version: int) -> str:
    """The line with which a run stops whose trainer computes otherwise than its engine."""
    gate = ParityGate(
        sync,
        prompts=PROMPTS,
        stop_token_ids=(),
        temperature=1.0,
        seed=0,
        logprobs_of=lambda prompts, responses, temperature: [
            [logprob + 1.0 for logprob in logprobs_of(model, prompt, response, temperature)]
            for prompt, response in zip(prompts, responses, strict=True)
        ],
    )
    with pytest.raises(ParityError) as error:
        gate.check(version)
    assert "\n" not in str(error.value)
    assert "log-probs of" in str(error.value)
    return str(error.value)


def test_bytes_that_are_gone_when_the_engine_wants_to_compare_them_are_told_beside_the_disagreement(
    rig, monkeypatch
):
    def without_file(update):
        Path(update.location).unlink()
        return contextlib.nullcontext()

    monkeypatch.setattr(rig.sync._comparable, "serving", without_file)
    line = verdict(rig.sync, rig.model, rig.version)
    assert "could not be compared: all weights" in line and "holds less than" in line
    assert rig.version == rig.run(rig.engine.version()), "and the engine goes on"


def test_weights_that_the_trainer_cannot_write_are_told_beside_the_disagreement(rig, monkeypatch, tmp_path):
    monkeypatch.setattr(rig.sync._comparable.directory, "path", tmp_path / "gone")
    line = verdict(rig.sync, rig.model, rig.version)
    assert "could not be compared: all weights" in line and "cannot write the weights" in line


class Broken(FakeEngine):
    """Its diagnosis has a bug."""

    async def diagnose(self, update) -> Diagnosis:
        raise ZeroDivisionError("of a bug\nwith a second line")


class Silent(FakeEngine):
    """Its diagnosis never ends."""

    async def diagnose(self, update) -> Diagnosis:
        await asyncio.sleep(3600)
        raise AssertionError


@pytest.mark.parametrize(
    ("engine", "reason"),
    [(Broken(), "ZeroDivisionError: of a bug"), (Silent(), "no answer within 5.2 s")],
    ids=["raises", "hangs"],
)
def test_a_diagnosis_that_fails_in_the_engine_is_told_beside_the_disagreement(loop, model, engine, reason):
    config = CONFIG.model_copy(update={"sync_timeout_s": 0.2})
    sync = WeightSync(ModuleSource(model, dtype="float32"), engine=engine, loop=loop, config=config)
    line = verdict(sync, model, version=0)
    sync.close()
    assert "could not be compared: all weights" in line and reason in line


def test_what_differs_and_what_is_not_known_are_both_told():
    both = Diagnosis(differing=("a",), not_compared=("b (why)",))
    assert in_words(both) == "the engine does not hold the trainer's a; could not be compared: b (why)"
    assert "holds every tensor" in in_words(SAME)


def test_what_any_engine_of_a_pool_finds_is_found():
    joined = joined_diagnosis(
        [
            Diagnosis(differing=("a", "b"), not_compared=()),
            Diagnosis(differing=("b",), not_compared=("c (why)",)),
        ]
    )
    assert joined == Diagnosis(differing=("a", "b"), not_compared=("c (why)",))
