"""The rollout journal: what the engines sampled for a PPO step, committed before the update learns from it.

    rollouts, scores --write(step)--> journal/step-000012.rollouts --read(step)--> the same after a kill

A kill in the update replays the batch without generating again. A file is one line (kind, schema version,
blake3 of the rest) and a safetensors block: columns over all tokens or all rollouts, no pickle. Entries are a
cache of what could be generated again: one that does not hold costs a line and is generated again.
Owns: `work_dir/journal/`. One process writes. No torch.
"""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from rollout.api import Rollout
from rollout.ground.disk import disk_problems
from rollout.ground.durable import UNFINISHED, sync, write_whole
from rollout.ground.whole import NotWhole, bad_sectors_as_damage, block_bytes, block_content

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FILE_NAME = re.compile(r"step-(\d{6,})\.rollouts")
KIND = "rlhf-rollouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """One PPO step's batch as it was sampled, in prompt order."""

    step: int
    prompt_indices: tuple[int, ...]  # per rollout: which prompt of the dataset
    rollouts: tuple[Rollout, ...]
    scores: tuple[float, ...]  # per rollout, normalised and clipped, as the update learns from them


class Journal:
    """Entries by step.

    Example:
        journal = Journal(runtime.work_dir)
        entry = journal.read(step)        # None: sample it, then journal.write(JournalEntry(step=step, ...))
        journal.drop_before(saved_step)   # after a checkpoint
    """

    def __init__(self, work_dir: Path) -> None:
        self._dir = work_dir / "journal"
        self._owner = work_dir.name  # <stage>-<fingerprint>: an entry of another stage is not ours
        with disk_problems(self._dir):
            self._dir.mkdir(parents=True, exist_ok=True)
            sync(work_dir)
            for path in self._dir.glob(f"*{UNFINISHED}"):
                path.unlink(missing_ok=True)  # every rank opens the journal

    def write(self, entry: JournalEntry) -> None:
        """Commit `entry`: on the disk when this returns, whole or not at all. EnvironmentProblem."""
        assert len(entry.prompt_indices) == len(entry.rollouts) == len(entry.scores)
        block = save(_columns(entry, self._owner))
        path = self._path(entry.step)
        with disk_problems(path):
            write_whole(path, block_bytes(KIND, SCHEMA_VERSION, block))

    def read(self, step: int) -> JournalEntry | None:
        """The entry of `step`, bit for bit; None when there is none. One that is damaged or of another schema
        version costs one line and counts as none. EnvironmentProblem when the disk refuses.
        """
        path = self._path(step)
        with disk_problems(path):
            try:
                with bad_sectors_as_damage():
                    content = path.read_bytes()
                return sound_entry(content, step=step, owner=self._owner)
            except FileNotFoundError:
                return None
            except NotWhole as error:
                logger.warning("%s: %s; the step is sampled again", path, error)
                return None

    def drop_before(self, step: int) -> None:
        """Forget the entries of all steps below `step`: a checkpoint holds what they taught."""
        with disk_problems(self._dir):
            for path in self._dir.iterdir():
                named = FILE_NAME.fullmatch(path.name)
                if named and int(named[1]) < step:
                    path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self._dir / f"step-{step:06d}.rollouts"


def sound_entry(content: bytes, *, step: int, owner: str) -> JournalEntry:
    """The entry in a file's bytes. Raises NotWhole unless they were written for this step and owner."""
    entry, written_by = decoded(block_content(content, kind=KIND, version=SCHEMA_VERSION))
    if (entry.step, written_by) != (step, owner):
        raise NotWhole(f"of step {entry.step} of {written_by}")
    return entry


def _columns(entry: JournalEntry, owner: str) -> dict[str, np.ndarray]:
    """Columns of a batch. Log-probs and scores stay float64, so every bit of a Python float is kept."""
    rollouts = entry.rollouts
    names = {
        "step": entry.step,
        "owner": owner,
        "request_ids": [rollout.request_id for rollout in rollouts],
        "finish_reasons": [rollout.finish_reason for rollout in rollouts],
    }
    return {
        "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
        "prompt_indices": np.array(entry.prompt_indices, np.int64),
        "scores": np.array(entry.scores, np.float64),
        "seeds": np.array([rollout.seed for rollout in rollouts], np.int64),
        "prompt_lengths": np.array([len(rollout.prompt_ids) for rollout in rollouts], np.int64),
        "response_lengths": np.array([len(rollout.response_ids) for rollout in rollouts], np.int64),
        "prompt_ids": _joined((rollout.prompt_ids for rollout in rollouts), np.int32),
        "response_ids": _joined((rollout.response_ids for rollout in rollouts), np.int32),
        "logprobs": _joined((rollout.logprobs for rollout in rollouts), np.float64),
        "weight_versions": _joined((rollout.weight_versions for rollout in rollouts), np.int32),
    }


def decoded(block: bytes) -> tuple[JournalEntry, str]:
    """The entry in a safetensors block, and whose it is; nothing is verified here."""
    columns = load(block)
    names: dict[str, Any] = json.loads(columns["names"].tobytes())
    response_lengths = columns["response_lengths"].tolist()
    rows = zip(
        names["request_ids"],
        _parted(columns["prompt_ids"], columns["prompt_lengths"].tolist()),
        _parted(columns["response_ids"], response_lengths),
        _parted(columns["logprobs"], response_lengths),
        names["finish_reasons"],
        _parted(columns["weight_versions"], response_lengths),
        columns["seeds"].tolist(),
        strict=True,
    )
    rollouts = tuple(
        Rollout(
            request_id=request_id,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            weight_versions=weight_versions,
            seed=seed,
        )
        for request_id, prompt_ids, response_ids, logprobs, finish_reason, weight_versions, seed in rows
    )
    entry = JournalEntry(
        step=names["step"],
        prompt_indices=tuple(columns["prompt_indices"].tolist()),
        rollouts=rollouts,
        scores=tuple(columns["scores"].tolist()),
    )
    return entry, names["owner"]


def _joined(rows: Iterable[Sequence[float]], dtype: type[np.generic]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype)


def _parted(column: np.ndarray, lengths: Sequence[int]) -> list[tuple[Any, ...]]:
    values = column.tolist()
    ends = np.cumsum([0, *lengths]).tolist()
    return [tuple(values[start:end]) for start, end in pairwise(ends)]
