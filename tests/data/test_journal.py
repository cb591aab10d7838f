"""The rollout journal: bit for bit, whole or absent, and never believed when damaged."""

import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.api import Rollout
from rollout.ground.errors import EnvironmentProblem
from stages.data.journal import Journal, JournalEntry


def rollout(index: int, *, tokens: int, draw: random.Random) -> Rollout:
    return Rollout(
        request_id=f"step12-{index}-é",
        prompt_ids=tuple(draw.randrange(2**17) for _ in range(3 + index % 4)),
        response_ids=tuple(draw.randrange(2**17) for _ in range(tokens)),
        logprobs=tuple(-draw.expovariate(1.0) for _ in range(tokens)),
        finish_reason="stop" if index % 2 else "length",
        weight_versions=tuple(12 + (place > 4) for place in range(tokens)),
        seed=draw.randrange(2**63),
    )


def entry(step: int = 12, *, rollouts: int = 6, tokens: int = 9) -> JournalEntry:
    draw = random.Random(step)
    return JournalEntry(
        step=step,
        prompt_indices=tuple(draw.randrange(1000) for _ in range(rollouts)),
        rollouts=tuple(rollout(index, tokens=tokens, draw=draw) for index in range(rollouts)),
        scores=tuple(draw.gauss(0.0, 1.0) for _ in range(rollouts)),
    )


def test_an_entry_comes_back_bit_for_bit_with_the_same_types(tmp_path: Path):
    written = entry()
    Journal(tmp_path).write(written)
    found = Journal(tmp_path).read(12)
    assert found == written
    assert repr(found) == repr(written)


def test_odd_floats_survive(tmp_path: Path):
    odd = (-0.0, 5e-324, -math.inf, 0.1 + 0.2, 1e308)
    row = replace(entry(tokens=5).rollouts[0], logprobs=odd)
    written = replace(entry(rollouts=1), rollouts=(row,), scores=(-0.0,))
    Journal(tmp_path).write(written)
    assert repr(Journal(tmp_path).read(12)) == repr(written)


def test_an_empty_response_and_an_empty_batch_are_entries_too(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.write(entry(1, tokens=0))
    journal.write(entry(2, rollouts=0))
    assert journal.read(1) == entry(1, tokens=0)
    assert journal.read(2) == entry(2, rollouts=0)


def test_a_step_that_was_not_journaled_has_no_entry_and_no_line(tmp_path: Path, caplog):
    assert Journal(tmp_path).read(12) is None
    assert not caplog.records


def test_a_step_may_be_written_again(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.write(entry(12))
    again = replace(entry(12), scores=(1.0,) * 6)
    journal.write(again)
    assert journal.read(12) == again


def test_entries_before_a_checkpoint_are_dropped(tmp_path: Path):
    journal = Journal(tmp_path)
    for step in (8, 9, 10, 1_000_000):
        journal.write(entry(step))
    journal.drop_before(10)
    assert [step for step in (8, 9, 10, 1_000_000) if journal.read(step)] == [10, 1_000_000]


def test_a_killed_write_leaves_no_entry_and_no_file(tmp_path: Path):
    Journal(tmp_path).write(entry(11))
    unfinished = tmp_path / "journal/step-000012.rollouts.tmp"
    unfinished.write_bytes((tmp_path / "journal/step-000011.rollouts").read_bytes())
    assert Journal(tmp_path).read(12) is None
    assert not unfinished.exists()


def test_a_flipped_bit_costs_one_line(tmp_path: Path, caplog):
    journal = Journal(tmp_path)
    journal.write(entry())
    path = tmp_path / "journal/step-000012.rollouts"
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)
    assert journal.read(12) is None
    assert caplog.messages == [f"{path}: not the bytes that were written; the step is sampled again"]


def test_an_entry_on_a_bad_sector_costs_one_line_and_is_written_again(tmp_path: Path, caplog):
    journal = Journal(tmp_path)
    path = tmp_path / "journal/step-000012.rollouts"
    path.symlink_to("/proc/self/mem")  # no memory lies at address 0
    assert journal.read(12) is None
    assert caplog.messages == [f"{path}: Input/output error; the step is sampled again"]
    journal.write(entry())
    assert journal.read(12) == entry()


@pytest.mark.parametrize("version", [0, 2, 10])
def test_another_schema_version_is_named_beside_ours(tmp_path: Path, caplog, version: int):
    journal = Journal(tmp_path)
    journal.write(entry())
    path = tmp_path / "journal/step-000012.rollouts"
    path.write_bytes(path.read_bytes().replace(b"rollouts 1 ", b"rollouts %d " % version, 1))
    assert journal.read(12) is None
    assert f"schema version {version}, this code reads 1" in caplog.text


def test_an_entry_of_another_step_or_stage_is_not_taken(tmp_path: Path, caplog):
    ours, theirs = Journal(tmp_path / "ppo-1"), Journal(tmp_path / "ppo-2")
    ours.write(entry(12))
    written = tmp_path / "ppo-1/journal/step-000012.rollouts"
    (tmp_path / "ppo-1/journal/step-000013.rollouts").write_bytes(written.read_bytes())
    (tmp_path / "ppo-2/journal/step-000012.rollouts").write_bytes(written.read_bytes())
    assert ours.read(13) is None and theirs.read(12) is None
    assert caplog.text.count(": of step 12 of ppo-1;") == 2


def test_a_disk_that_refuses_is_one_line_and_the_last_entry_stays(tmp_path: Path, monkeypatch):
    journal = Journal(tmp_path)
    journal.write(entry(11))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(EnvironmentProblem, match=r"No space left on device; free some") as caught:
            journal.write(entry(12))
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    assert journal.read(11) == entry(11) and journal.read(12) is None
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["step-000011.rollouts"]


def test_a_large_batch_is_compact(tmp_path: Path):
    """1,024 responses of 1,000 tokens: 30 MB at most. The time is bounded loosely."""
    batch = entry(rollouts=1024, tokens=1000)
    journal = Journal(tmp_path)
    start = time.process_time()
    journal.write(batch)
    assert journal.read(12) == batch
    assert time.process_time() - start < 10
    assert (tmp_path / "journal/step-000012.rollouts").stat().st_size < 30e6
