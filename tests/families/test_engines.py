"""vLLM computes as the trainer does, in every family, and still does after every sync; a tensor that
differs is named.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from families.figures import record
from families.table import FAMILIES, Family
from rigs import SAME, Rig, perturb_all, start_rig
from rigs import request as rollout_request

from rollout.api import Rollout
from rollout.loop import LoopThread

pytestmark = pytest.mark.engine

IN_MAKE_TEST = ("llama", "qwen3", "gemma2", "gpt2", "mixtral")
"""Plain; normalised queries; soft caps, and a head without a name; transposed weights; experts."""
MAX_MODEL_LEN = 128
PROBES = [rollout_request(index, prompt=(21, 8, 5 + index, 90, 7, 33)) for index in range(4)]


@dataclass
class FamilyRig:
    """An engine of one family, and what it said before anything was synced."""

    family: Family
    rig: Rig
    fresh: list[Rollout]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in IN_MAKE_TEST else pytest.mark.slow)
        for name, family in FAMILIES.items()
        if family.engine
    ],
)
def started(
    loop: LoopThread, request: pytest.FixtureRequest, family_dir, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FamilyRig]:
    """One engine at a time: an engine of a family is closed before the next one starts."""
    rig = start_rig(
        "vllm",
        loop,
        family_dir(request.param),
        tmp_path_factory.mktemp("engine"),
        max_model_len=MAX_MODEL_LEN,
    )
    yield FamilyRig(family=FAMILIES[request.param], rig=rig, fresh=rig.submit(PROBES))
    rig.close()


@pytest.fixture
def family(started: FamilyRig) -> Family:
    return started.family


@pytest.fixture
def rig(started: FamilyRig) -> Rig:
    """With the initial weights, synced."""
    started.rig.reset()
    return started.rig


@torch.no_grad()
def nudge(parameter: torch.Tensor) -> None:
    """Its last element alone, by the smallest step there is."""
    last = parameter.view(-1)[-1:]
    last.copy_(torch.nextafter(last, torch.tensor(torch.inf)))


def test_a_fresh_engine_computes_as_the_trainer_does(started, family):
    started.rig.reset()
    record(family.name, "engine", started.rig.max_diff(started.fresh))


def test_weights_that_moved_everywhere_reach_the_engine_sync_after_sync(rig, family):
    largest = 0.0
    for seed in (1, 2):
        before = rig.submit(PROBES)
        perturb_all(rig.model, seed=seed)
        assert rig.max_diff(before) > 1e-2, "else the next lines prove nothing"
        rig.sync_next()
        largest = max(largest, rig.max_diff(rig.submit(PROBES)))
        assert rig.sync.diagnose() == SAME
    record(family.name, "sync", largest)


def test_the_same_weights_sent_again_change_nothing(rig, family):
    before = rig.submit(PROBES)
    rig.sync_next()
    after = rig.submit(PROBES)
    assert [one.response_ids for one in after] == [one.response_ids for one in before]
    moved = max(
        abs(a - b)
        for x, y in zip(before, after, strict=True)
        for a, b in zip(x.logprobs, y.logprobs, strict=True)
    )
    assert moved <= 1e-5
    if family.moe:
        record(family.name, "moe", moved)


def test_one_element_that_differs_is_named_whichever_tensor_it_is_in(rig):
    """The last element of each parameter of the trainer in turn, and then of all of them."""
    parameters = dict(rig.model.named_parameters())
    synced = sent(rig)
    for name, parameter in parameters.items():
        before = parameter.detach().clone()
        nudge(parameter)
        (moved,) = changed(synced, sent(rig))
        assert differing(rig) == {moved}, name
        parameter.data.copy_(before)
    for parameter in parameters.values():
        nudge(parameter)
    assert differing(rig) == changed(synced, sent(rig))


def sent(rig: Rig) -> dict[str, torch.Tensor]:
    """What a sync sends now, by its names in a checkpoint."""
    return {name: tensor.clone() for group in rig.sync.source.groups() for name, tensor in group.items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def differing(rig: Rig) -> set[str]:
    """What a diagnosis names, without the second names of tied tensors."""
    found = rig.sync.diagnose()
    assert found.not_compared == ()
    return set(found.differing) - rig.sync.source.aliases().keys()
