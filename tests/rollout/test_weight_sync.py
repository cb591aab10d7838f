"""Weights really move, whole, and a sync that is not whole is refused. Real engines: vLLM and
transformers.
"""

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
from rigs import SAME, Rig, logprobs_of, request

from rollout.api import WeightUpdate
from rollout.errors import WeightSyncError
from rollout.ground.errors import EnvironmentProblem
from rollout.weight_file import WeightFileWriter
from rollout.weight_source import ModuleSource
from rollout.weight_sync import WeightSync

pytestmark = pytest.mark.engine

GROUPS = {
    "embedding": ("embed_tokens.weight",),
    "q": ("q_proj.weight",),
    "k": ("k_proj.weight",),
    "v": ("v_proj.weight",),
    "o": ("o_proj.weight",),
    "gate": ("gate_proj.weight",),
    "up": ("up_proj.weight",),
    "down": ("down_proj.weight",),
    "norms": ("layernorm.weight", "model.norm.weight"),
    "head": ("lm_head.weight",),
}


@pytest.fixture(params=["vllm", "hf"])
def kind(request) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request) -> bool:
    return request.param


@pytest.fixture
def rig(rigs, kind, tied) -> Rig:
    rig = rigs(kind, tied=tied)
    rig.reset()
    return rig


@pytest.fixture
def tied_rig(rigs, kind) -> Rig:
    rig = rigs(kind, tied=True)
    rig.reset()
    return rig


@torch.no_grad()
def perturb(model: torch.nn.Module, endings: tuple[str, ...], *, seed: int = 1) -> None:
    """Move every parameter whose name ends so, by half its own size, in all of its elements."""
    generator = torch.Generator().manual_seed(seed)
    moved = [
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.endswith(endings)
    ]
    assert moved
    for parameter in moved:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.abs().mean())


def probes(count: int = 4) -> list:
    return [request(index, prompt=(21, 8, 5 + index, 90)) for index in range(count)]


@pytest.mark.parametrize("group", GROUPS)
def test_pin_36_each_parameter_group_reaches_the_engine_alone(rig, group):
    before = rig.submit(probes())
    perturb(rig.model, GROUPS[group])
    version = rig.sync_next()
    after = rig.submit(probes())
    assert rig.max_diff(before) > 1e-3, "the perturbation has to matter, else the next line proves nothing"
    assert rig.max_diff(after) < 1e-5
    assert {drawn for rollout in after for drawn in rollout.weight_versions} == {version}
    assert rig.sync.diagnose() == SAME


def test_engine_generates_with_new_weights_after_sync(rig):
    with torch.no_grad():
        rig.model.model.norm.weight.zero_()
    rig.sync_next()
    for rollout in rig.submit(probes()):
        assert rollout.logprobs == pytest.approx([-math.log(rig.model.config.vocab_size)] * 12, abs=1e-5)


def test_pin_37_no_cached_prefix_outlives_a_weight_version(tied_rig):
    shared = tuple(5 + index * 7 % 300 for index in range(400))  # several cache blocks of 128 tokens
    requests = [request(index, prompt=(*shared, index), max_tokens=4) for index in range(4)]
    tied_rig.submit(requests)
    for seed in range(2):
        perturb(tied_rig.model, GROUPS["k"] + GROUPS["v"] + GROUPS["norms"], seed=seed)
        tied_rig.sync_next()
        assert tied_rig.max_diff(tied_rig.submit(requests)) < 1e-5


def test_pin_35_the_same_run_twice_gives_identical_tokens_and_logprobs(tied_rig):
    def run() -> list:
        tied_rig.reset()
        first = tied_rig.submit(probes(6))
        perturb(tied_rig.model, GROUPS["q"])
        tied_rig.sync_next()
        return [(rollout.response_ids, rollout.logprobs) for rollout in first + tied_rig.submit(probes(6))]

    assert run() == run()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_pin_39_vllm_and_transformers_generate_the_same_greedily(rigs, tied):
    requests = [request(index, prompt=(4, 17 + index), temperature=0.0, max_tokens=24) for index in range(6)]
    answers = []
    for kind in ("vllm", "hf"):
        rig = rigs(kind, tied=tied)
        rig.reset()
        answers.append([rollout.response_ids for rollout in rig.submit(requests)])
    assert answers[0] == answers[1]


def test_pin_39_a_saved_model_generates_as_transformers_does(tied_rig, tied_model_dir):
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(tied_model_dir, dtype=torch.float32).eval()
    (rollout,) = tied_rig.submit([request(temperature=0.0, max_tokens=20)])
    plain = saved.generate(
        torch.tensor([rollout.prompt_ids]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert rollout.response_ids == tuple(plain[0, 3:].tolist())


def test_sync_reports_its_version_time_and_bytes(rig):
    report = rig.sync.sync(rig.version + 1)
    rig.version += 1
    parameters = sum(parameter.numel() for parameter in rig.model.parameters())
    assert report.version == rig.version == rig.run(rig.engine.version())
    assert report.num_bytes >= 4 * parameters  # a tied head is sent as a name, not as bytes
    assert report.num_bytes < 4 * parameters + 64 * len(rig.initial)
    assert 0 < report.seconds < 30


# What is not whole is refused
# -----------------------------------------------------------------------------------------


def written(rig: Rig, path: Path, version: int = 99) -> WeightUpdate:
    with WeightFileWriter(path) as writer:
        for group in rig.sync.source.groups():
            for name, tensor in group.items():
                writer.add(name, tensor)
        for tied, of in rig.sync.source.aliases().items():
            writer.add_alias(tied, of=of)
        return writer.finish(version)


def refuse(rig: Rig, update: WeightUpdate, match: str) -> None:
    """The engine refuses the update, by name, and still holds what it held: nothing was loaded."""
    before = (rig.run(rig.engine.version()), rig.submit(probes()))
    rig.run(rig.engine.pause())
    with pytest.raises(WeightSyncError, match=match) as error:
        rig.run(rig.engine.update(update))
    rig.run(rig.engine.resume())
    assert "rebuild" in str(error.value) and "\n" not in str(error.value)
    assert (rig.run(rig.engine.version()), rig.submit(probes())) == before


def without(update: WeightUpdate, name: str) -> WeightUpdate:
    return dataclasses.replace(update, tensors=tuple(spec for spec in update.tensors if spec.name != name))


def replaced(update: WeightUpdate, old: str, **changes) -> WeightUpdate:
    return dataclasses.replace(
        update,
        tensors=tuple(
            dataclasses.replace(spec, **changes) if spec.name == old else spec for spec in update.tensors
        ),
    )


Q = "model.layers.1.self_attn.q_proj.weight"


def test_an_update_that_lacks_a_tensor_is_refused(tied_rig, tmp_path):
    refuse(tied_rig, without(written(tied_rig, tmp_path / "w"), Q), f"{Q}: missing")


def test_an_update_with_a_wrong_shape_is_refused(tied_rig, tmp_path):
    update = replaced(written(tied_rig, tmp_path / "w"), Q, shape=(32, 128))
    refuse(tied_rig, update, Q + r": \[32, 128\] where the engine has \[64, 64\]")


def test_an_update_with_a_wrong_dtype_is_refused(tied_rig, tmp_path):
    refuse(tied_rig, replaced(written(tied_rig, tmp_path / "w"), Q, dtype="bfloat16"), f"{Q}: bfloat16 where")


def test_an_update_with_a_tensor_that_the_model_has_not_is_refused(tied_rig, tmp_path):
    update = replaced(written(tied_rig, tmp_path / "w"), Q, name=Q.replace("layers.1", "layers.7"))
    refuse(tied_rig, update, r"layers\.7.*not a tensor of the engine's model")


def test_one_flipped_bit_in_the_file_is_refused(tied_rig, tmp_path):
    update = written(tied_rig, tmp_path / "w")
    spec = next(spec for spec in update.tensors if spec.name == Q)
    data = bytearray((tmp_path / "w").read_bytes())
    data[spec.offset + 1000] ^= 1
    (tmp_path / "w").write_bytes(data)
    refuse(tied_rig, update, f"{Q}: the bytes that arrived are not the bytes that were sent")


def test_a_file_that_was_cut_short_is_refused(tied_rig, tmp_path):
    update = written(tied_rig, tmp_path / "w")
    with (tmp_path / "w").open("r+b") as file:
        file.truncate(1000)
    refuse(tied_rig, update, "holds less than")


class Forgetful(ModuleSource):
    """A trainer that leaves out a tensor and does not know it: its own manifest agrees with what it sent."""

    def groups(self):
        for group in super().groups():
            yield {name: tensor for name, tensor in group.items() if name != Q}


def test_a_trainer_that_forgets_a_tensor_is_found_out_by_the_engine(tied_rig):
    sync = WeightSync(
        Forgetful(tied_rig.model, dtype="float32"),
        engine=tied_rig.engine,
        loop=tied_rig.loop,
        config=tied_rig.config,
    )
    with pytest.raises(WeightSyncError, match=f"{Q}: missing.*rebuild"):
        sync.sync(98)
    sync.close()
    tied_rig.run(tied_rig.engine.resume())


# The shared file
# ------------------------------------------------------------------------------------------------------


def shared_directories() -> set[Path]:
    return set(Path("/dev/shm").glob("rlhf-weights-*"))


def test_the_shared_file_is_gone_after_close_and_private_before(tied_rig):
    before = shared_directories()
    sync = WeightSync(
        tied_rig.sync.source, engine=tied_rig.engine, loop=tied_rig.loop, config=tied_rig.config
    )
    sync.diagnose()
    (directory,) = shared_directories() - before
    assert directory.stat().st_mode & 0o077 == 0
    sync.close()
    sync.close()
    assert shared_directories() == before


def test_what_a_killed_trainer_left_behind_is_removed_and_what_a_live_one_uses_is_not(tied_rig, tmp_path):
    stale = Path("/dev/shm/rlhf-weights-stale-test")
    stale.mkdir()
    (live,) = [tied_rig.sync._transport.directory.path]
    for directory in (stale, live):
        os.utime(directory, (1, 1))
    WeightSync(
        tied_rig.sync.source, engine=tied_rig.engine, loop=tied_rig.loop, config=tied_rig.config
    ).close()
    assert not stale.exists()
    assert live.exists()


def test_a_full_file_system_is_a_clear_error():
    with (
        WeightFileWriter(Path("/dev/full")) as writer,
        pytest.raises(EnvironmentProblem, match=r"No space.*make room"),
    ):
        writer.add("a", torch.zeros(4))


def test_the_oracle_itself_sees_a_perturbation(tied_rig):
    """`logprobs_of` is what the pins are measured with: it must not be blind."""
    before = logprobs_of(tied_rig.model, (1, 2), (3, 4), 1.0)
    perturb(tied_rig.model, GROUPS["up"])
    assert (
        max(abs(a - b) for a, b in zip(before, logprobs_of(tied_rig.model, (1, 2), (3, 4), 1.0), strict=True))
        > 1e-4
    )
