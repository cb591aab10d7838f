"""The rollout journal: what the engines sampled at a position, committed before the update learns from it.

    trajectories, scores --write--> journal/step-000012.rollouts --read(12)--> the same after a kill

A kill in the update replays the batch without generating again. A file is one line (kind, schema version,
blake3 of the rest) and a safetensors block: columns over all tokens, turns or trajectories, no pickle. An
entry can always be generated again, so one that is damaged costs a line and is drawn again. Entries of
another schema version are dropped when the journal opens, with one line for all of them.
Owns: `work_dir/journal/`. Does not own the users' rows: they belong to the dataset, so an entry has none.
One process writes (the source). No torch.
"""

import json
import logging
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from rollout.api import FinishReason
from rollout.ground.disk import disk_problems
from rollout.ground.durable import UNFINISHED, sync, write_whole
from rollout.ground.errors import EnvironmentProblem
from rollout.ground.whole import (
    MAX_HEADER_BYTES,
    NotWhole,
    bad_sectors_as_damage,
    block_bytes,
    block_content,
    block_version,
)
from stages.rl.trajectories import Trajectory, Turn

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
FILE_NAME = re.compile(r"step-(\d{6,})\.rollouts")
KIND = "rlhf-rollouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """One batch as it was sampled and scored, in its order."""

    position: int  # in the order of batches
    trajectories: tuple[Trajectory, ...]  # each scored by the same sources, and without its row


class Journal:
    """Entries by position.

    Example:
        journal = Journal(runtime.work_dir)
        entry = journal.read(12)     # None: draw it, then journal.write(JournalEntry(position=12, ...))
        journal.drop_before(12)      # after a checkpoint
    """

    def __init__(self, work_dir: Path) -> None:
        self._dir = work_dir / "journal"
        self._owner = work_dir.name  # <stage>-<fingerprint>: an entry of another stage is not ours
        with disk_problems(self._dir):
            if not work_dir.is_dir():  # making it would hide a journal that no other node ever sees
                raise EnvironmentProblem(
                    f"{work_dir}: not on {platform.node()}, which is to write the rollout journal there; "
                    "outputs must be one file system for all nodes"
                )
            self._dir.mkdir(exist_ok=True)
            sync(work_dir)
            for path in self._dir.glob(f"*{UNFINISHED}"):
                path.unlink(missing_ok=True)  # a process that is being killed may remove it too
            self._drop_other_schemas()

    def write(self, entry: JournalEntry) -> None:
        """Commit `entry`: on the disk when this returns, whole or not at all. EnvironmentProblem."""
        assert len({tuple(trajectory.scores) for trajectory in entry.trajectories}) <= 1, "one set of sources"
        block = save(_columns(entry, self._owner))
        path = self._path(entry.position)
        with disk_problems(path):
            write_whole(path, block_bytes(KIND, SCHEMA_VERSION, block))

    def read(self, position: int) -> JournalEntry | None:
        """The entry at `position`, bit for bit; None when there is none. One that is damaged costs one line
        and counts as none. EnvironmentProblem when the disk refuses.
        """
        path = self._path(position)
        with disk_problems(path):
            try:
                with bad_sectors_as_damage():
                    content = path.read_bytes()
                return sound_entry(content, position=position, owner=self._owner)
            except FileNotFoundError:
                return None
            except NotWhole as error:
                logger.warning("%s: %s; the step is sampled again", path, error)
                return None

    def drop_before(self, position: int) -> None:
        """Forget the entries at all earlier positions: a checkpoint holds what they taught."""
        with disk_problems(self._dir):
            for path in self._dir.iterdir():
                named = FILE_NAME.fullmatch(path.name)
                if named and int(named[1]) < position:
                    path.unlink(missing_ok=True)

    def _drop_other_schemas(self) -> None:
        """Forget what other code wrote, with one line for all of it."""
        others = {
            path: version
            for path in sorted(self._dir.iterdir())
            if FILE_NAME.fullmatch(path.name) and (version := _version_of(path)) not in (None, SCHEMA_VERSION)
        }
        for path in others:
            path.unlink(missing_ok=True)
        if others:
            logger.warning(
                "%s: dropped the entries of %d steps, which are of schema version %s; this code reads %d, "
                "and samples those steps again where it still needs them",
                self._dir,
                len(others),
                ", ".join(map(str, sorted({*others.values()}))),
                SCHEMA_VERSION,
            )

    def _path(self, position: int) -> Path:
        return self._dir / f"step-{position:06d}.rollouts"


def _version_of(path: Path) -> int | None:
    """The schema version of an entry; None for a file that does not say."""
    try:
        with bad_sectors_as_damage(), path.open("rb") as file:
            return block_version(file.read(MAX_HEADER_BYTES), kind=KIND)
    except (NotWhole, FileNotFoundError):  # `read` tells of damage
        return None


def sound_entry(content: bytes, *, position: int, owner: str) -> JournalEntry:
    """The entry in a file's bytes. Raises NotWhole unless they were written for this position and owner."""
    entry, written_by = decoded(block_content(content, kind=KIND, version=SCHEMA_VERSION))
    if (entry.position, written_by) != (position, owner):
        raise NotWhole(f"of step {entry.position} of {written_by}")
    return entry


def _columns(entry: JournalEntry, owner: str) -> dict[str, np.ndarray]:
    """Columns of a batch. Log-probs and scores stay float64, so every bit of a Python float is kept."""
    trajectories = entry.trajectories
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    sources = list(trajectories[0].scores) if trajectories else []
    rows = [[trajectory.scores[source] for source in sources] for trajectory in trajectories]
    names = {
        "position": entry.position,
        "owner": owner,
        "sources": sources,
        "ids": [trajectory.id for trajectory in trajectories],
        "finish_reasons": [turn.finish_reason for turn in turns],
    }
    return {
        "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
        "prompt_indices": np.array([trajectory.prompt_index for trajectory in trajectories], np.int64),
        "places": np.array([trajectory.place for trajectory in trajectories], np.int64),
        "samples": np.array([trajectory.sample for trajectory in trajectories], np.int64),
        "seeds": np.array([trajectory.seed for trajectory in trajectories], np.int64),
        "scores": np.array([[0.0 if one is None else one for one in row] for row in rows], np.float64),
        "is_scored": np.array([[one is not None for one in row] for row in rows], np.bool_),
        "num_turns": np.array([len(trajectory.turns) for trajectory in trajectories], np.int64),
        "prompt_lengths": np.array([len(turn.prompt_ids) for turn in turns], np.int64),
        "response_lengths": np.array([len(turn.response_ids) for turn in turns], np.int64),
        "prompt_ids": _joined((turn.prompt_ids for turn in turns), np.int32),
        "response_ids": _joined((turn.response_ids for turn in turns), np.int32),
        "logprobs": _joined((turn.logprobs for turn in turns), np.float64),
        "weight_versions": _joined((turn.weight_versions for turn in turns), np.int32),
    }


def decoded(block: bytes) -> tuple[JournalEntry, str]:
    """The entry in a safetensors block, and the <stage>-<fingerprint> that wrote it. Checks no digest."""
    columns = load(block)
    names: dict[str, Any] = json.loads(columns["names"].tobytes())
    turns = _parts(_turns(columns, names["finish_reasons"]), columns["num_turns"].tolist())
    rows = zip(
        names["ids"],
        columns["prompt_indices"].tolist(),
        columns["places"].tolist(),
        columns["samples"].tolist(),
        columns["seeds"].tolist(),
        turns,
        columns["scores"].tolist(),
        columns["is_scored"].tolist(),
        strict=True,
    )
    trajectories = tuple(
        Trajectory(
            id=name,
            prompt_index=prompt_index,
            place=place,
            sample=sample,
            seed=seed,
            turns=own_turns,
            row={},
            scores={
                source: score if is_scored else None
                for source, score, is_scored in zip(names["sources"], scores, are_scored, strict=True)
            },
        )
        for name, prompt_index, place, sample, seed, own_turns, scores, are_scored in rows
    )
    return JournalEntry(position=names["position"], trajectories=trajectories), names["owner"]


def _turns(columns: Mapping[str, np.ndarray], finish_reasons: Sequence[FinishReason]) -> list[Turn]:
    response_lengths = columns["response_lengths"].tolist()
    rows = zip(
        _parts(columns["prompt_ids"].tolist(), columns["prompt_lengths"].tolist()),
        _parts(columns["response_ids"].tolist(), response_lengths),
        _parts(columns["logprobs"].tolist(), response_lengths),
        _parts(columns["weight_versions"].tolist(), response_lengths),
        finish_reasons,
        strict=True,
    )
    return [
        Turn(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            logprobs=logprobs,
            weight_versions=weight_versions,
            finish_reason=finish_reason,
        )
        for prompt_ids, response_ids, logprobs, weight_versions, finish_reason in rows
    ]


def _joined(rows: Iterable[Sequence[float]], dtype: type[np.generic]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype)


def _parts(values: Sequence[Any], lengths: Sequence[int]) -> list[tuple[Any, ...]]:
    ends = list(accumulate(lengths, initial=0))
    return [tuple(values[start:end]) for start, end in pairwise(ends)]
