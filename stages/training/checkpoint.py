"""Checkpoints of unfinished training: torch DCP, so that they load on any number of workers.

    save: free space? -> step-000040.tmp/ (DCP files, then checkpoint.json) --fsync, rename--> step-000040/
    restore: newest whose record and digests hold; a damaged one costs one line and the one before it is taken
    roll_back: the same of the regular ones; what was saved behind it is removed before training goes on

A checkpoint is regular when the schedule asked for it, and not only the end of an execution: where training
goes back to must not depend on where it happened to be stopped.

Owns: `work_dir/checkpoints/`. Data order and generators are functions of the step, so a step number is all
else there is to resume; small numbers a recipe needs besides travel in `extra`. Torch's own generator is kept
too, though nothing here draws from it. With several ranks every public method is a collective: rank 0 looks
at the disk and decides, all ranks read and write tensors, and all raise alike.

DCP keeps its index and all that is no tensor as pickles. They are read only after every byte was compared
with the record. Digests tell damage; against somebody who may write to `outputs/` they are no defence.
"""

import contextlib
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from rollout.ground.disk import disk_problems
from rollout.ground.durable import UNFINISHED, sync
from rollout.ground.errors import GO_ON, EnvironmentProblem
from rollout.ground.whole import NotWhole, files_below, measure
from stages.training import ranks
from stages.training.checkpoint_record import (
    DIRECTORY_NAME,
    RECORD_FILE,
    SCHEMA_VERSION,
    OtherSchema,
    Record,
    name_of,
    own_record,
    verified,
)
from stages.training.trainable import TrainedState

T = TypeVar("T")
logger = logging.getLogger(__name__)
DAMAGED = ".damaged"
"""Added to the name of a damaged checkpoint: it stays to be looked at, and is not tried again."""
REPLACED = f".replaced{UNFINISHED}"
FREE_SPACE_FACTOR = 1.1
ENTRY_OVERHEAD_BYTES = 2048
"""At most, of the archive that DCP makes of each tensor or number, and its place in the index (measured: 1.8
KiB).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A checkpoint whose record and files are as they were written."""

    step: int
    directory: Path
    score: float | None


class Checkpoints:
    """The last `keep` regular checkpoints of one stage, the best of them, and the newest of all.

    Example:
        checkpoints = Checkpoints(runtime.work_dir, keep=2)
        step, extra = checkpoints.restore({"policy": policy.state()})   # (0, {}) when there is none
    """

    def __init__(self, work_dir: Path, *, keep: int = 2) -> None:
        self._dir = work_dir / "checkpoints"
        self._owner = work_dir.name
        self._keep = keep
        with disk_problems(self._dir):
            self._dir.mkdir(parents=True, exist_ok=True)
            if ranks.is_main():
                sync(work_dir)
                self._drop_unfinished()

    def save(
        self,
        step: int,
        parts: Mapping[str, TrainedState],
        extra: Mapping[str, Any],
        *,
        score: float | None = None,
        regular: bool = True,
    ) -> None:
        """Write models and optimizers of `parts`, and the JSON numbers of `extra`, as the state after `step`
        steps. `score`: higher is better; the regular checkpoint with the highest is never dropped for its
        age. One that is not `regular` is resumed from, never gone back to, and gives way to the next.

        Raises EnvironmentProblem when the disk has no room or refuses; earlier checkpoints are then as they
        were.
        """
        state = _state_of(parts)
        needed = _bytes_on_disk(state)
        unfinished = self._dir / (name_of(step) + UNFINISHED)
        self._on_main(lambda: self._make_room(step, needed))
        try:
            with disk_problems(unfinished):
                _write(state, unfinished)
            self._on_main(lambda: self._finish(step, unfinished, dict(extra), score, regular))
        except EnvironmentProblem:
            if ranks.is_main():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def restore(self, parts: Mapping[str, TrainedState]) -> tuple[int, dict[str, Any]]:
        """Load the newest sound checkpoint into `parts`. Returns its step and `extra`; (0, {}) without one.

        One line (a warning) for each damaged one that is passed over, and one for all of other schemas.
        EnvironmentProblem when the disk refuses.
        """
        return self._load(parts, self._on_main(lambda: self._newest_sound(regular_only=False)))

    def roll_back(self, parts: Mapping[str, TrainedState]) -> tuple[int, dict[str, Any]]:
        """Load the newest sound regular checkpoint as `restore` does, and delete the later ones: no execution
        may go on from where this one turned back. After a kill in between, the next one goes back again.
        """
        step, extra = self._load(parts, self._on_main(lambda: self._newest_sound(regular_only=True)))
        if step:
            self._on_main(lambda: self._drop_behind(step))
        return step, extra

    def _load(self, parts: Mapping[str, TrainedState], found: list[Any] | None) -> tuple[int, dict[str, Any]]:
        if found is None:
            return 0, {}
        step, extra = found
        state = _state_of(parts)
        directory = self._dir / name_of(step)
        with disk_problems(directory), _failures_unwrapped(), _alone_is_no_accident():
            dcp.load(state, checkpoint_id=directory, no_dist=not torch.distributed.is_initialized())
        for name, part in parts.items():
            model_state, adamw_state = state[name]["model"], state[name]["adamw"]
            set_state_dict(part.model, part.adamw, model_state_dict=model_state, optim_state_dict=adamw_state)
        torch.set_rng_state(state["generators"]["torch"])
        return step, extra

    def best(self) -> Kept | None:
        """The sound regular checkpoint with the highest score, the newest of equals. None without a score."""
        found = self._on_main(self._best_sound)
        if found is None:
            return None
        step, score = found
        return Kept(step=step, directory=self._dir / name_of(step), score=score)

    def _on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns (JSON) on rank 0, on every rank; a problem of the disk is raised on every
        rank.
        """

        def attempt() -> list[Any]:
            try:
                with disk_problems(self._dir):
                    return [action(), None]
            except EnvironmentProblem as error:
                return [None, str(error)]

        result, problem = ranks.from_main(attempt)
        if problem is not None:
            raise EnvironmentProblem(problem)
        return result  # type: ignore[no-any-return]  # from JSON

    def _newest_sound(self, *, regular_only: bool) -> list[Any] | None:
        found = self._finished()
        self._mention_other_schemas(found)
        for directory in reversed(found):
            record = self._sound_record(directory)
            if record is not None and (record.regular or not regular_only):
                _mention_other_torch(directory, record)
                return [record.step, record.extra]
        if found and not regular_only:
            logger.warning("%s: none of %d can be loaded; starting from step 0", self._dir, len(found))
        return None

    def _best_sound(self) -> list[Any] | None:
        for scored in sorted(_scored(self._readable()), key=_by_score, reverse=True):
            record = self._sound_record(self._dir / name_of(scored.step))
            if record is not None:
                return [record.step, record.score]
        return None

    def _sound_record(self, directory: Path) -> Record | None:
        """The record of a checkpoint if it is as it was written; else None. Warns in one line of damage."""
        try:
            return verified(directory, owner=self._owner)
        except OtherSchema:
            pass  # `_mention_other_schemas`
        except NotWhole as error:
            logger.warning("%s: damaged checkpoint: %s; taking the one before it", directory, error)
            self._move(directory, self._dir / (directory.name + DAMAGED))
        return None

    def _mention_other_schemas(self, found: Iterable[Path]) -> None:
        """One line for all checkpoints of other versions of this code."""
        versions = sorted({version for version in map(_other_schema, found) if version is not None})
        if versions:
            logger.warning(
                "%s: checkpoints of schema version %s are not loaded, this code reads %d; older ones are "
                "deleted with the next checkpoint",
                self._dir,
                ", ".join(map(str, versions)),
                SCHEMA_VERSION,
            )

    def _make_room(self, step: int, needed: int) -> None:
        """Raises EnvironmentProblem unless `needed` bytes are free once leftovers are gone."""
        self._drop_unfinished()
        free = shutil.disk_usage(self._dir).free
        if free < needed:
            raise EnvironmentProblem(
                f"{self._dir}: the checkpoint of step {step} needs {_mib(needed)} and {_mib(free)} are free; "
                f"free some space or set outputs=DIR on another disk; then {GO_ON}"
            )

    def _finish(
        self, step: int, unfinished: Path, extra: dict[str, Any], score: float | None, regular: bool
    ) -> None:
        """Record what was written, put it on the disk, and give it its name."""
        files = {name: measure(path) for name, path in files_below(unfinished).items()}
        record = Record(
            schema_version=SCHEMA_VERSION,
            owner=self._owner,
            step=step,
            score=score if score is not None and math.isfinite(score) else None,
            regular=regular,
            extra=extra,
            world_size=ranks.world_size(),
            torch_version=torch.__version__,
            files=files,
        )
        (unfinished / RECORD_FILE).write_text(record.text(), encoding="utf-8")
        for path in (*(unfinished / name for name in (*files, RECORD_FILE)), unfinished):
            sync(path)
        final = self._dir / name_of(step)
        if final.exists():
            self._make_way(final)
        unfinished.rename(final)
        sync(self._dir)
        self._drop_old()

    def _make_way(self, directory: Path) -> None:
        """Moves a checkpoint of the same step away. One of a newer schema is never deleted."""
        try:
            Record.read(directory)
        except OtherSchema as error:
            suffix = REPLACED if error.version < SCHEMA_VERSION else ".other"
            self._move(directory, self._dir / (directory.name + suffix))
        except NotWhole:
            self._move(directory, self._dir / (directory.name + DAMAGED))
        else:
            self._move(directory, self._dir / (directory.name + REPLACED))

    def _drop_old(self) -> None:
        """Deletes all checkpoints except the last `keep` regular ones, the best and the newest; those of an
        older schema too, because this code cannot go on from them. A newer one's may still be wanted.
        """
        readable = self._readable()
        regular = [record for record in readable if record.regular]
        best = sorted(_scored(readable), key=_by_score)[-1:]
        kept = {record.step for record in (*regular[-self._keep :], *best, *readable[-1:])}
        versions = {directory: _other_schema(directory) for directory in self._finished()}
        older = [_step_of(one) for one, of in versions.items() if of is not None and of < SCHEMA_VERSION]
        self._drop([*(record.step for record in readable if record.step not in kept), *older])

    def _drop_behind(self, last_step: int) -> None:
        """Delete every checkpoint after this step."""
        self._drop(record.step for record in self._readable() if record.step > last_step)
        sync(self._dir)

    def _drop(self, steps: Iterable[int]) -> None:
        for directory in (self._dir / name_of(step) for step in steps):
            self._move(directory, directory.with_suffix(UNFINISHED))
        self._drop_unfinished()

    def _drop_unfinished(self) -> None:
        """Deletes what killed saves left. A checkpoint that one had begun to replace gets its name back."""
        for path in self._dir.glob(f"*{REPLACED}"):
            final = self._dir / path.name.removesuffix(REPLACED)
            if not final.exists():
                path.rename(final)
        for path in self._dir.glob(f"*{UNFINISHED}"):
            _remove(path)

    def _readable(self) -> list[Record]:
        """The readable records, oldest first. Directories without one are left out."""
        records = []
        for directory in self._finished():
            with contextlib.suppress(NotWhole, OtherSchema):
                records.append(own_record(directory, owner=self._owner))
        return records

    def _finished(self) -> list[Path]:
        """Directories named as checkpoints, oldest first."""
        named = [path for path in self._dir.iterdir() if DIRECTORY_NAME.fullmatch(path.name)]
        return sorted(named, key=_step_of)

    def _move(self, directory: Path, target: Path) -> None:
        _remove(target)
        directory.rename(target)


def _other_schema(directory: Path) -> int | None:
    """The schema version of a checkpoint of another version of this code; None of any other directory."""
    try:
        Record.read(directory)
    except OtherSchema as error:
        return error.version
    except NotWhole:
        return None
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _state_of(parts: Mapping[str, TrainedState]) -> dict[str, Any]:
    state: dict[str, Any] = {"generators": {"torch": torch.get_rng_state()}}
    for name, part in parts.items():
        assert name != "generators", "the name of torch's own generator"
        model_state, adamw_state = get_state_dict(part.model, part.adamw)
        state[name] = {"model": model_state, "adamw": adamw_state}
    return state


def _write(state: dict[str, Any], directory: Path) -> None:
    """Each rank writes its share; rank 0 writes what all ranks hold alike. OSError on every rank when the
    disk refuses on any.
    """
    with _failures_unwrapped(), _alone_is_no_accident():
        dcp.save(
            state,
            storage_writer=_Writer(directory),
            planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            no_dist=not torch.distributed.is_initialized(),
        )


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which raises the disk's own error: torch's archive replaces it by one about a position,
    and the cause is lost between ranks.
    """

    def write_data(self, *arguments: Any, **options: Any) -> Any:
        """As DCP's. Raises OSError."""
        try:
            return super().write_data(*arguments, **options)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextlib.contextmanager
def _alone_is_no_accident() -> Iterator[None]:
    """Silences DCP's warning that one process saves or loads. Here one worker does."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        yield


@contextlib.contextmanager
def _failures_unwrapped() -> Iterator[None]:
    """Inside, every rank raises the error of the first rank that failed, without DCP's wrapper."""
    try:
        yield
    except CheckpointException as error:
        failure, _ = error.failures[min(error.failures)]
        raise failure from error


def _bytes_on_disk(state: dict[str, Any]) -> int:
    """The most bytes that a checkpoint of `state` takes, over all ranks."""
    held = sum(_local_bytes(entry) + ENTRY_OVERHEAD_BYTES for entry in _entries(state))
    return int(ranks.sums(held)[0] * FREE_SPACE_FACTOR)


def _local_bytes(entry: object) -> int:
    """Bytes that this rank writes: its share, and on rank 0 also what all ranks hold alike."""
    if isinstance(entry, DTensor):
        return entry.to_local().nbytes
    return entry.nbytes if isinstance(entry, Tensor) and ranks.is_main() else 0


def _entries(state: object) -> Iterator[object]:
    if isinstance(state, Mapping | list):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from _entries(value)
    else:
        yield state


def _mention_other_torch(directory: Path, record: Record) -> None:
    if record.torch_version != torch.__version__:
        logger.warning(
            "%s: written by torch %s, read by %s: what follows may differ in the last bits",
            directory,
            record.torch_version,
            torch.__version__,
        )


def _scored(records: Iterable[Record]) -> list[Record]:
    """The regular ones that have a score."""
    return [record for record in records if record.regular and record.score is not None]


def _by_score(record: Record) -> tuple[float, int]:
    assert record.score is not None
    return record.score, record.step


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
