"""Checkpoints of unfinished training: torch DCP, so that they load on any number of workers.

    save: step-000040.tmp/ (DCP files, then checkpoint.json with every digest) --rename--> step-000040/
    restore: newest whose digests hold; a damaged one costs one line and the one before it is taken

Owns: `work_dir/checkpoints/`. Data order and generators are functions of the step, so a step number is all
else there is to resume; small numbers a recipe needs besides travel in `extra`.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from blake3 import blake3
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from stages.training.optimize import Optimizer

logger = logging.getLogger(__name__)

RECORD_FILE = "checkpoint.json"


class Checkpoints:
    """The last `keep` checkpoints of one stage.

    Example:
        checkpoints = Checkpoints(runtime.work_dir, keep=2)
        step, extra = checkpoints.restore({"policy": policy_optimizer})   # (0, {}) when there is none
    """

    def __init__(self, work_dir: Path, *, keep: int = 2) -> None:
        self._dir = work_dir / "checkpoints"
        self._dir.mkdir(parents=True, exist_ok=True)
        self._keep = keep

    def save(self, step: int, parts: Mapping[str, Optimizer], extra: Mapping[str, Any]) -> None:
        """Write models and optimizers of `parts`, and the JSON numbers of `extra`, as the state after `step`
        steps.
        """
        final = self._dir / f"step-{step:06d}"
        unfinished = final.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        dcp.save(_state_of(parts), checkpoint_id=unfinished, no_dist=not torch.distributed.is_initialized())
        record = {"step": step, "extra": dict(extra), "files": _digests(unfinished)}
        _write_synced(unfinished / RECORD_FILE, json.dumps(record))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        self._drop_old()

    def restore(self, parts: Mapping[str, Optimizer]) -> tuple[int, dict[str, Any]]:
        """Load the newest sound checkpoint into `parts`; its step and `extra`, or (0, {}) when there is
        none.
        """
        for directory in reversed(self._finished()):
            record = _sound_record(directory)
            if record is None:
                logger.warning("%s: damaged checkpoint; taking the one before it", directory)
                continue
            state = _state_of(parts)
            dcp.load(state, checkpoint_id=directory, no_dist=not torch.distributed.is_initialized())
            for name, part in parts.items():
                model_state, adamw_state = state[name]["model"], state[name]["adamw"]
                set_state_dict(
                    part.model, part.adamw, model_state_dict=model_state, optim_state_dict=adamw_state
                )
            return record["step"], record["extra"]
        return 0, {}

    def _finished(self) -> list[Path]:
        return sorted(path for path in self._dir.glob("step-*") if path.suffix != ".tmp")

    def _drop_old(self) -> None:
        for directory in self._finished()[: -self._keep]:
            shutil.rmtree(directory)


def _state_of(parts: Mapping[str, Optimizer]) -> dict[str, Any]:
    state = {}
    for name, part in parts.items():
        model_state, adamw_state = get_state_dict(part.model, part.adamw)
        state[name] = {"model": model_state, "adamw": adamw_state}
    return state


def _digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): blake3(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != RECORD_FILE
    }


def _sound_record(directory: Path) -> dict[str, Any] | None:
    """The record of a checkpoint whose files are as they were written; else None."""
    try:
        record = json.loads((directory / RECORD_FILE).read_text())
        return record if record["files"] == _digests(directory) else None
    except (OSError, ValueError, KeyError):
        return None


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
