"""The rollout journal: bit for bit, whole or absent, and never believed when damaged."""

import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.ground.errors import EnvironmentProblem
from stages.rl.journal import Journal, JournalEntry
from stages.rl.trajectories import Trajectory, Turn


def turn(index: int, *, tokens: int, draw: random.Random) -> Turn:
    return Turn(
        prompt_ids=tuple(draw.randrange(2**17) for _ in range(3 + index % 4)),
        response_ids=tuple(draw.randrange(2**17) for _ in range(tokens)),
        logprobs=tuple(-draw.expovariate(1.0) for _ in range(tokens)),
        weight_versions=tuple(12 + (place > 4) for place in range(tokens)),
        finish_reason="stop" if index % 2 else "length",
    )


def entry(position: int = 12, *, samples: int = 6, tokens: int = 9, turns: int = 1) -> JournalEntry:
    draw = random.Random(position)
    trajectories = tuple(
        Trajectory(
            id=f"step12-{index}-é",
            prompt_index=draw.randrange(1000),
            place=index // 2,
            sample=index % 2,
            seed=draw.randrange(2**63),
            turns=tuple(turn(index, tokens=tokens, draw=draw) for _ in range(turns + index % turns)),
            row={},
            scores={"model": draw.gauss(0.0, 1.0), "rule": None if index % 3 else 1.0},
        )
        for index in range(samples)
    )
    return JournalEntry(position=position, trajectories=trajectories)


def test_an_entry_comes_back_bit_for_bit_with_the_same_types(tmp_path: Path):
    written = entry()
    Journal(tmp_path).write(written)
    found = Journal(tmp_path).read(12)
    assert found == written
    assert repr(found) == repr(written)


def test_odd_floats_survive(tmp_path: Path):
    odd = (-0.0, 5e-324, -math.inf, 0.1 + 0.2, 1e308)
    (only,) = entry(samples=1, tokens=5).trajectories
    spoiled = replace(only, turns=(replace(only.turn, logprobs=odd),), scores={"model": -0.0})
    written = JournalEntry(position=12, trajectories=(spoiled,))
    Journal(tmp_path).write(written)
    assert repr(Journal(tmp_path).read(12)) == repr(written)


def test_trajectories_of_several_turns_and_scores_that_are_missing_come_back_as_they_were(tmp_path: Path):
    written = entry(turns=3)
    assert {len(one.turns) for one in written.trajectories} == {3, 4, 5}
    assert [one.scores["rule"] for one in written.trajectories] == [1.0, None, None, 1.0, None, None]
    Journal(tmp_path).write(written)
    assert repr(Journal(tmp_path).read(12)) == repr(written)


def test_an_empty_response_and_an_empty_batch_are_entries_too(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.write(entry(1, tokens=0))
    journal.write(entry(2, samples=0))
    assert journal.read(1) == entry(1, tokens=0)
    assert journal.read(2) == entry(2, samples=0)


def test_a_step_that_was_not_journaled_has_no_entry_and_no_line(tmp_path: Path, caplog):
    assert Journal(tmp_path).read(12) is None
    assert not caplog.records


def test_a_step_may_be_written_again(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.write(entry(12))
    again = replace(entry(12), trajectories=entry(12).trajectories[::-1])
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


@pytest.mark.parametrize("version", [0, 1, 10])
def test_another_schema_version_is_named_beside_ours(tmp_path: Path, caplog, version: int):
    journal = Journal(tmp_path)
    journal.write(entry())
    path = tmp_path / "journal/step-000012.rollouts"
    path.write_bytes(path.read_bytes().replace(b"rollouts 2 ", b"rollouts %d " % version, 1))
    assert journal.read(12) is None
    assert f"schema version {version}, this code reads 2" in caplog.text


def test_entries_of_other_code_are_dropped_when_the_journal_opens_with_one_line_for_all(
    tmp_path: Path, caplog
):
    journal = Journal(tmp_path)
    for step in (3, 4, 5, 6):
        journal.write(entry(step))
    older = [tmp_path / f"journal/step-{step:06d}.rollouts" for step in (4, 5, 6)]
    for path in older:
        path.write_bytes(path.read_bytes().replace(b"rollouts 2 ", b"rollouts 1 ", 1))
    later = Journal(tmp_path)
    assert [later.read(step) for step in (3, 4, 5, 6)] == [entry(3), None, None, None]
    assert not any(path.exists() for path in older)
    assert caplog.messages == [
        f"{tmp_path / 'journal'}: dropped the entries of 3 steps, which are of schema version 1; this code "
        "reads 2, and samples those steps again where it still needs them"
    ]


def test_an_entry_of_another_step_or_stage_is_not_taken(tmp_path: Path, caplog):
    (tmp_path / "ppo-1").mkdir()
    (tmp_path / "ppo-2").mkdir()
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
    batch = entry(samples=1024, tokens=1000)
    journal = Journal(tmp_path)
    start = time.process_time()
    journal.write(batch)
    assert journal.read(12) == batch
    assert time.process_time() - start < 10
    assert (tmp_path / "journal/step-000012.rollouts").stat().st_size < 30e6
