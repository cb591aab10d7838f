"""Two hundred random corruptions of checkpoints, journal entries and artifacts: none is loaded silently."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fake_chain import Chain
from plain_models import take_step
from torch import nn

from pipeline import dag, identity
from pipeline.artifacts import Store
from pipeline.errors import CorruptArtifact
from pipeline.manifest import MANIFEST, Manifest
from stages.config.pretrain import PretrainConfig
from stages.rl.journal import Journal, JournalEntry, decoded
from stages.rl.trajectories import Trajectory, Turn
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_record import RECORD_FILE
from stages.training.optimize import Optimizer

NUM_CHECKPOINTS, NUM_JOURNALS, NUM_ARTIFACTS = 80, 60, 60
OLDER, NEWER = 3, 6
CONFIG = PretrainConfig(lr=1e-2, batch_size=4, micro_batch_size=4, warmup_frac=0.0)

Corrupt = Callable[[Path, Path, random.Random], None]
"""Damages one thing under the first directory; the second is its like, to swap with."""


# --- what can happen to files


def flip_bits(victim: Path, other: Path, draw: random.Random) -> None:
    path = any_file(victim, draw)
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(victim: Path, other: Path, draw: random.Random) -> None:
    path = any_file(victim, draw)
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def extend(victim: Path, other: Path, draw: random.Random) -> None:
    path = any_file(victim, draw)
    path.write_bytes(path.read_bytes() + draw.choice((b"\0", b"\n", b" ", b"x" * 4096)))


def delete(victim: Path, other: Path, draw: random.Random) -> None:
    any_file(victim, draw).unlink()


def zero(victim: Path, other: Path, draw: random.Random) -> None:
    path = any_file(victim, draw)
    path.write_bytes(bytes(path.stat().st_size))


def zero_a_block(victim: Path, other: Path, draw: random.Random) -> None:
    path = any_file(victim, draw)
    content = bytearray(path.read_bytes())
    start = draw.choice([place for place, byte in enumerate(content) if byte])
    length = min(64, len(content) - start)
    content[start : start + length] = bytes(length)
    path.write_bytes(content)


def swap_a_file(victim: Path, other: Path, draw: random.Random) -> None:
    path = draw.choice([path for path in files_in(victim) if differs(path, other / path.relative_to(victim))])
    mate, aside = other / path.relative_to(victim), path.with_name("aside")
    path.rename(aside)
    mate.rename(path)
    aside.rename(mate)


def swap_whole(victim: Path, other: Path, draw: random.Random) -> None:
    aside = victim.with_name("aside")
    victim.rename(aside)
    other.rename(victim)
    aside.rename(other)


def remove_record(victim: Path, other: Path, draw: random.Random) -> None:
    record_of(victim).unlink()


def edit_record(victim: Path, other: Path, draw: random.Random) -> None:
    """One value of the record is another, the JSON as valid as it was."""
    path = record_of(victim)
    content = json.loads(path.read_text())
    key = draw.choice([key for key in sorted(content) if key != "schema_version"])
    content[key] = edited(content[key], draw)
    path.write_text(json.dumps(content, indent=2 if path.name == MANIFEST else None, sort_keys=True) + "\n")


def older_schema(victim: Path, other: Path, draw: random.Random) -> None:
    change_schema(record_of(victim), 0)


def newer_schema(victim: Path, other: Path, draw: random.Random) -> None:
    change_schema(record_of(victim), draw.randrange(3, 100))


def add_a_file(victim: Path, other: Path, draw: random.Random) -> None:
    (victim / draw.choice(("__7_0.distcp", "adapter_config.json", ".hidden"))).write_bytes(b"{}")


ON_FILES: tuple[Corrupt, ...] = (flip_bits, flip_bits, cut, extend, delete, zero, zero_a_block)
ON_DIRECTORIES: tuple[Corrupt, ...] = (
    *ON_FILES,
    swap_a_file,
    swap_whole,
    remove_record,
    edit_record,
    older_schema,
    newer_schema,
    add_a_file,
)


def files_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def any_file(victim: Path, draw: random.Random) -> Path:
    return draw.choice([path for path in files_in(victim) if path.stat().st_size])


def differs(path: Path, mate: Path) -> bool:
    return mate.is_file() and mate.read_bytes() != path.read_bytes()


def record_of(victim: Path) -> Path:
    return next(victim / name for name in (RECORD_FILE, MANIFEST) if (victim / name).exists())


def change_schema(path: Path, version: int) -> None:
    content = path.read_text()
    changed = re.sub(r'("schema_version": )\d+', rf"\g<1>{version}", content, count=1)
    assert changed != content
    path.write_text(changed)


def edited(value: Any, draw: random.Random) -> Any:
    match value:
        case str():
            return value + "0"
        case int() | float() | None:
            return draw.random()
        case dict():
            return value | {"new": draw.random()}
    raise AssertionError(f"a record holds {value!r}")


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in files_in(directory)}


# --- checkpoints


def optimizer_after(steps: int) -> Optimizer:
    torch.manual_seed(0)
    optimizer = Optimizer(nn.Linear(4, 3), CONFIG, lr=CONFIG.lr, max_steps=100)
    for step in range(steps):
        inputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        take_step(optimizer, step, [inputs], lambda numbers: optimizer.model(numbers).square().mean())
    return optimizer


def numbers_of(optimizer: Optimizer) -> torch.Tensor:
    parameters = list(optimizer.model.parameters())
    moments = [optimizer.adamw.state[parameter] for parameter in parameters]
    tensors = parameters + [value for state in moments for value in state.values()]
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with two sound checkpoints."""
    work_dir = tmp_path_factory.mktemp("sound") / "sft-0"
    for step in (OLDER, NEWER):
        optimizer = optimizer_after(step)
        Checkpoints(work_dir).save(step, {"model": optimizer.state()}, {"loss": step / 7}, score=float(step))
    return work_dir


@pytest.mark.parametrize("seed", range(NUM_CHECKPOINTS))
def test_a_corrupted_checkpoint_is_passed_over_with_a_line(
    tmp_path: Path, checkpoints: Path, caplog: pytest.LogCaptureFixture, seed: int
):
    work_dir, draw = copied(checkpoints, tmp_path / "sft-0"), random.Random(seed)
    older, newer = (work_dir / "checkpoints" / f"step-{step:06d}" for step in (OLDER, NEWER))
    corrupt = ON_DIRECTORIES[seed % len(ON_DIRECTORIES)]
    corrupt(newer, older, draw)
    both = corrupt in (swap_a_file, swap_whole)

    optimizer = optimizer_after(0)
    step, extra = Checkpoints(work_dir).restore({"model": optimizer.state()})

    assert (step, extra) == ((0, {}) if both else (OLDER, {"loss": OLDER / 7})), corrupt.__name__
    if step:
        assert torch.equal(numbers_of(optimizer), numbers_of(optimizer_after(OLDER)))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == (3 if both else 1)
    assert lines[0].startswith((f"{newer}: ", f"{newer.parent}: "))  # one line for all of other schemas


def test_without_comparing_digests_corrupted_checkpoints_are_loaded_silently(
    tmp_path: Path, checkpoints: Path
):
    """What the test above would miss if nothing was compared: DCP alone takes many of them."""
    silent = 0
    for seed in range(NUM_CHECKPOINTS):
        work_dir = copied(checkpoints, tmp_path / str(seed) / "sft-0")
        older, newer = (work_dir / "checkpoints" / f"step-{step:06d}" for step in (OLDER, NEWER))
        ON_DIRECTORIES[seed % len(ON_DIRECTORIES)](newer, older, random.Random(seed))
        silent += loads_unverified(newer)
    assert silent > NUM_CHECKPOINTS / 4


def loads_unverified(directory: Path) -> bool:
    state = {"model": {"model": {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}}}
    try:
        dcp.load(state, checkpoint_id=directory, no_dist=True)
    except BaseException as error:  # CheckpointException is none
        assert not isinstance(error, KeyboardInterrupt)
        return False
    return True


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


# --- journal entries


def entry(step: int) -> JournalEntry:
    draw = random.Random(step)
    trajectories = tuple(
        Trajectory(
            id=f"step{step}-{index}",
            prompt_index=4 + index,
            place=index,
            sample=0,
            turns=(
                Turn(
                    prompt_ids=(1, 2, 3),
                    response_ids=tuple(draw.randrange(512) for _ in range(8)),
                    logprobs=tuple(-draw.random() for _ in range(8)),
                    weight_versions=(step,) * 8,
                    finish_reason="stop",
                ),
            ),
            seed=draw.randrange(2**63),
            row={},
            scores={"model": 0.1 + index},
        )
        for index in range(3)
    )
    return JournalEntry(position=step, trajectories=trajectories)


@pytest.mark.parametrize("seed", range(NUM_JOURNALS))
def test_a_corrupted_journal_entry_counts_as_none_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
):
    work_dir, path = corrupted_journal(tmp_path, seed)
    was_there = path.exists()
    assert Journal(work_dir).read(NEWER) is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == was_there
    assert all(line.startswith((f"{path}: ", f"{path.parent}: dropped")) for line in lines)


def test_without_comparing_digests_corrupted_journal_entries_are_read_silently(tmp_path: Path):
    silent = 0
    for seed in range(NUM_JOURNALS):
        _, path = corrupted_journal(tmp_path / str(seed), seed)
        try:
            silent += decoded(path.read_bytes().partition(b"\n")[2])[0] != entry(NEWER)
        except Exception as error:
            assert not isinstance(error, AssertionError)
    assert silent > NUM_JOURNALS / 8


def corrupted_journal(directory: Path, seed: int) -> tuple[Path, Path]:
    draw, work_dir = random.Random(seed), directory / "ppo-0"
    work_dir.mkdir(parents=True)
    for step in (OLDER, NEWER):
        Journal(work_dir).write(entry(step))
    older, path = (work_dir / "journal" / f"step-{step:06d}.rollouts" for step in (OLDER, NEWER))
    kinds = (*ON_FILES, flip_bits, "swap", "schema")
    kind = kinds[seed % len(kinds)]
    if kind == "swap":
        swap_whole(path, older, draw)
    elif kind == "schema":
        version = draw.choice((0, 1, 3, 12))
        path.write_bytes(path.read_bytes().replace(b"rollouts 2 ", b"rollouts %d " % version, 1))
    else:
        older.unlink()
        kind(work_dir / "journal", work_dir, draw)
    return work_dir, path


# --- artifacts


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts") / "outputs"


@pytest.fixture
def nodes(chain: Chain, artifacts: Path) -> tuple[identity.Node, identity.Node]:
    """Two stages of one chain, published in `artifacts`."""
    config = chain.config()
    planned = identity.plan(config, dag.select(config, ["prepare", "pretrain"]), {})
    for number, node in enumerate(planned.values()):
        publish(Store(artifacts), node, number)
    return planned["pretrain"], planned["prepare"]


def publish(store: Store, node: identity.Node, number: int) -> None:
    if store.artifact_dir(node.stage, node.fingerprint).exists():
        return
    out = store.begin(node.stage, node.fingerprint) / "out"
    (out / "model.safetensors").write_bytes(random.Random(number).randbytes(500))
    (out / "config.json").write_text(json.dumps({"layers": number}))
    store.seal(node, resolved={}, metrics={"loss": number / 7}, started=0.0, exactness="exact")
    store.publish(node, replace=False)


@pytest.mark.parametrize("seed", range(NUM_ARTIFACTS))
def test_a_corrupted_artifact_is_a_typed_error_of_one_line(
    tmp_path: Path, artifacts: Path, nodes: tuple[identity.Node, identity.Node], seed: int
):
    store, node = corrupted_store(tmp_path, artifacts, nodes, seed)
    with pytest.raises(CorruptArtifact, match="--force pretrain") as caught:
        store.find(node.stage, node.fingerprint)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4


def test_without_comparing_digests_corrupted_artifacts_are_taken_silently(
    tmp_path: Path, artifacts: Path, nodes: tuple[identity.Node, identity.Node]
):
    silent = 0
    for seed in range(NUM_ARTIFACTS):
        store, node = corrupted_store(tmp_path / str(seed), artifacts, nodes, seed)
        manifest = store.artifact_dir(node.stage, node.fingerprint) / MANIFEST
        try:
            names = Manifest.model_validate_json(manifest.read_bytes()).files
            silent += all((manifest.parent / name).is_file() for name in names)
        except (ValueError, FileNotFoundError):
            pass
    assert silent > NUM_ARTIFACTS / 4


def corrupted_store(
    directory: Path, artifacts: Path, nodes: tuple[identity.Node, identity.Node], seed: int
) -> tuple[Store, identity.Node]:
    store, (node, mate) = Store(copied(artifacts, directory / "damaged")), nodes
    victim, other = (store.artifact_dir(each.stage, each.fingerprint) for each in (node, mate))
    before = content_of(victim)
    ON_DIRECTORIES[seed % len(ON_DIRECTORIES)](victim, other, random.Random(seed))
    assert content_of(victim) != before
    return store, node
