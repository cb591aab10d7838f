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
from rollout.errors import EngineError, ParityError
from rollout.parity import ParityGate, in_words
from rollout.pool import EnginePool
from rollout.weight_source import ModuleSource
from rollout.weight_sync import WeightSync

pytestmark = pytest.mark.engine

PROMPTS = [(5, 9, 30), (44, 2)]


@pytest.fixture(params=["vllm", "actor", "hf"])
def rig(rigs, request) -> Rig:
    rig = rigs(request.param, tied=True)
    rig.reset()
    return rig


@pytest.fixture
def model(tied_model_dir):
    return AutoModelForCausalLM.from_pretrained(tied_model_dir, dtype=torch.float32).eval()


def gate_of(sync: WeightSync, model) -> ParityGate:
    """A gate whose trainer computes otherwise than `model`."""
    return ParityGate(
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


def verdict(sync: WeightSync, model, version: int) -> str:
    """The line with which a run stops whose trainer computes otherwise than its engine."""
    with pytest.raises(ParityError) as error:
        gate_of(sync, model).check(version)
    assert "\n" not in str(error.value)
    assert "log-probs of" in str(error.value)
    return str(error.value)


def test_bytes_that_are_gone_when_the_engine_wants_to_compare_them_are_told_beside_the_disagreement(
    rig, monkeypatch
):
    def without_file(update):
        Path(update.location).unlink()
        return contextlib.nullcontext()

    monkeypatch.setattr(rig.sync._transport, "serving", without_file)
    line = verdict(rig.sync, rig.model, rig.version)
    assert "could not be compared: all weights" in line and "holds less than" in line
    assert rig.version == rig.run(rig.engine.version()), "and the engine goes on"


def test_weights_that_the_trainer_cannot_write_are_told_beside_the_disagreement(rig, monkeypatch, tmp_path):
    monkeypatch.setattr(rig.sync._transport.directory, "path", tmp_path / "gone")
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
    config = CONFIG.model_copy(update={"comparison_timeout_s": 0.2})
    sync = WeightSync(ModuleSource(model, dtype="float32"), engine=engine, loop=loop, config=config)
    line = verdict(sync, model, version=0)
    sync.close()
    assert "could not be compared: all weights" in line and reason in line


def test_what_differs_and_what_is_not_known_are_both_told():
    both = Diagnosis(differing=("a",), not_compared=("b (why)",))
    assert in_words(both) == "the engine does not hold the trainer's a; could not be compared: b (why)"
    assert "holds every tensor" in in_words(SAME)


class Stale(FakeEngine):
    """It lags."""

    async def diagnose(self, update) -> Diagnosis:
        return Diagnosis(differing=("model.norm.weight",), not_compared=())


def test_an_engine_that_fails_to_compare_does_not_hide_that_another_one_lags(loop, model):
    pool = EnginePool([Broken(), Stale()])
    sync = WeightSync(ModuleSource(model, dtype="float32"), engine=pool, loop=loop, config=CONFIG)
    found = sync.diagnose()
    sync.close()
    assert found == Diagnosis(
        differing=("model.norm.weight",), not_compared=("all weights (ZeroDivisionError: of a bug)",)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_shows_no_tensor_ends_a_run_in_bf16_alone(loop, model, dtype):
    """In fp32 the gate decides by log-probs; in bf16 nothing else tells that it lags."""
    sync = WeightSync(ModuleSource(model, dtype=dtype), engine=Broken(), loop=loop, config=CONFIG)
    gate = gate_of(sync, model)
    if dtype == "float32":
        assert gate.compare_tensors(3).shows_nothing
    else:
        with pytest.raises(EngineError, match=r"weight version 3 no tensor .*: all weights .*ZeroDivision"):
            gate.compare_tensors(3)
    sync.close()


def test_engines_that_are_split_over_gpus_are_not_asked(loop, model):
    config = CONFIG.model_copy(update={"tensor_parallel_size": 2})
    sync = WeightSync(ModuleSource(model, dtype="bfloat16"), engine=Broken(), loop=loop, config=config)
    found = gate_of(sync, model).compare_tensors(3)
    sync.close()
    assert found.not_compared == ("all weights (split over 2 GPUs)",)


def test_a_comparison_that_cannot_be_written_gathers_to_its_end_with_the_other_ranks(
    loop, model, tmp_path, monkeypatch
):
    source = ModuleSource(model, dtype="float32")
    num_groups, gathered = len(list(source.groups())), []

    class Counted(ModuleSource):
        def groups(self):
            for group in super().groups():
                gathered.append(group)
                yield group

    sync = WeightSync(Counted(model, dtype="float32"), engine=FakeEngine(), loop=loop, config=CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(sync._transport.directory, "path", tmp_path / "gone")
        (why,) = sync.diagnose().not_compared
    sync.close()
    assert "cannot write the weights" in why and len(gathered) == num_groups > 1


def test_what_any_engine_of_a_pool_finds_is_found():
    joined = joined_diagnosis(
        [
            Diagnosis(differing=("a", "b"), not_compared=()),
            Diagnosis(differing=("b",), not_compared=("c (why)",)),
        ]
    )
    assert joined == Diagnosis(differing=("a", "b"), not_compared=("c (why)",))
