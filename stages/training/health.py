"""Training health: bad optimizer steps are skipped and counted; too many in a row, and training goes back.

    loss, gradient norm --accepts--> step taken | skipped (its batch kept) --too many in a row--> RollBack
    RollBack --> last checkpoint, and the data since then are left out (PaLM, arXiv 2204.02311, section 5.1)

Owns: the counts, the spike detector, the kept batches. Does not own: checkpoints and the loop (loop).
Everything here is part of each checkpoint, so a resumed run decides the same.
"""

import logging
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rollout.ground.disk import disk_problems
from stages.config.training import HealthConfig
from stages.errors import TrainingStopped
from stages.runtime import Runtime
from stages.training import ranks
from stages.training.trainable import Accepts

logger = logging.getLogger(__name__)

MIN_SPIKE_WINDOW = 16
"""The spike detector judges nothing before this many accepted losses."""
MAD_TO_STD = 1.4826
"""The median absolute deviation of normal noise, times this, is its standard deviation."""


class RollBack(Exception):
    """Too many bad steps in a row: go back to the last checkpoint. Health raises it, the loop catches it."""


@dataclass(kw_only=True)
class HealthState:
    """What is remembered of bad steps."""

    skipped: int = 0  # optimizer steps not taken
    skipped_of: dict[str, int] = field(default_factory=dict)  # of these, per model
    left_out: str | None = None  # why there was nothing to step on, where that happened
    in_a_row: dict[str, int] = field(default_factory=dict)  # of these, up to now, per model
    spikes: int = 0  # losses far above the recent ones, taken or not
    rollbacks: int = 0
    data_offset: int = 0  # batches left out so far: step s trains on the batch of position s + data_offset
    recent: dict[str, list[float]] = field(default_factory=dict)  # last accepted losses, per model


class Health:
    """The judge of every optimizer step of one stage.

    Example: health = Health(config.health, runtime)
             if not health.accepts("loss", step, loss=2.1, grad_norm=0.7): health.skipped(step, batch)
    """

    def __init__(self, config: HealthConfig, runtime: Runtime) -> None:
        self.state = HealthState()
        self._config = config
        self._runtime = runtime

    def accepts(self, name: str, step: int, loss: float, grad_norm: float) -> bool:
        """Says whether to take `step` (0-based), given the loss of `name` and the gradient's global norm.

        Every rank gets the same answer, because both numbers are sums over all ranks.
        """
        spike = math.isfinite(loss) and self._is_spike(name, loss)
        taken = math.isfinite(loss) and math.isfinite(grad_norm) and not (spike and self._skips_spikes)
        self.state.spikes += spike
        if spike or not taken:
            self._say(
                f"step {step + 1}: {name} {loss:.4g}, gradient norm {grad_norm:.4g}: "
                f"{'a spike' if spike else 'not finite'}{'' if taken else '; step skipped'}"
            )
        if not taken:
            self.state.skipped += 1
            self.state.skipped_of[name] = self.state.skipped_of.get(name, 0) + 1
            self.state.in_a_row[name] = self.state.in_a_row.get(name, 0) + 1
            return False
        self.state.in_a_row.pop(name, None)
        recent = self.state.recent.setdefault(name, [])
        recent.append(loss)
        del recent[: -self._config.spike_window]
        return True

    def accepting(self, name: str, step: int) -> Accepts:
        """`accepts` for one step of one model, in the form in which a `Trainable` asks."""
        return lambda loss, grad_norm, _sums, _extremes: self.accepts(name, step, loss, grad_norm)

    def skipped(self, step: int, batch: Any) -> None:
        """Keep this rank's `batch` of a step that was not taken. Raises RollBack after too many in a row,
        EnvironmentProblem when the disk refuses.
        """
        directory = self._runtime.log_dir / "bad_batches"
        name = f"{self._runtime.stage}-{self.state.skipped:04d}-step-{step + 1:06d}-rank-{ranks.rank()}"
        with disk_problems(directory):
            directory.mkdir(parents=True, exist_ok=True)
            content = save(dict(_tensors_of(batch, "batch")))
            (directory / f"{name}.safetensors").write_bytes(content)
        if self._longest_row > self._config.max_skipped_in_a_row:
            raise RollBack

    def rolled_back(self, failed: int, to: int | None, state: Mapping[str, Any]) -> int:
        """Notes a return from step `failed` to the checkpoint `to`, whose health was `state`. Returns the
        step to go on with. Without a checkpoint (None) training goes on behind the bad data, because no bad
        step was taken.

        Raises TrainingStopped (exit 5) when this happened too often.
        """
        past, row = self.state, self._longest_row
        if past.rollbacks >= self._config.max_rollbacks:
            raise TrainingStopped(
                f"{self._runtime.stage} step {failed + 1}: {row} bad steps in a row for the "
                f"{past.rollbacks + 1}. time (not finite, or spikes); lower the learning rate, or look into "
                f"{self._runtime.log_dir / 'bad_batches'}"
            )
        if to is None:
            self.state = HealthState(**{**asdict(past), "in_a_row": {}, "rollbacks": past.rollbacks + 1})
            self._say(f"step {failed + 1}: {row} bad steps in a row, no checkpoint yet; going on behind them")
            return failed + 1
        self.state = HealthState(
            **{
                **state,
                "skipped": past.skipped,
                "skipped_of": past.skipped_of,
                "left_out": past.left_out,
                "spikes": past.spikes,
                "rollbacks": past.rollbacks + 1,
                "data_offset": past.data_offset + failed + 1 - to,
            }
        )
        self._say(
            f"step {failed + 1}: {row} bad steps in a row; back to step {to}, "
            f"leaving out the {failed + 1 - to} batches since then"
        )
        return to

    def is_good(self) -> bool:
        """Whether the last step of every model was taken, so that a checkpoint is worth going back to."""
        return not self.state.in_a_row

    def leave_out(self, why: str) -> None:
        """Notes a batch that had nothing to train on. `why`: the cause and the remedy."""
        self.state.left_out = why

    def check_end(self, name: str) -> None:
        """Raise TrainingStopped (exit 5) at the end of a training in which no step of `name` was taken."""
        if name in self.state.recent:
            return
        causes = [
            f"{skipped} or its gradient was not finite in {number} steps; lower the learning rate, or look "
            f"at {self._runtime.log_dir / 'bad_batches'}"
            for skipped, number in self.state.skipped_of.items()
        ]
        if self.state.left_out is not None:
            causes.append(self.state.left_out)
        assert causes, "a training has steps"
        why = "; and ".join(causes)
        raise TrainingStopped(f"{self._runtime.stage}: none of the steps was taken: {why}")

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.state = HealthState(**state)

    def metrics(self) -> dict[str, float]:
        """For a line of the log."""
        return {
            "train/skipped_steps": float(self.state.skipped),
            "train/loss_spikes": float(self.state.spikes),
        }

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    @property
    def _longest_row(self) -> int:
        return max(self.state.in_a_row.values(), default=0)

    @property
    def _skips_spikes(self) -> bool:
        return self._config.on_spike == "skip"

    def _is_spike(self, name: str, loss: float) -> bool:
        recent = self.state.recent.get(name, [])
        if self._config.spike_mads is None or len(recent) < MIN_SPIKE_WINDOW:
            return False
        median = statistics.median(recent)
        spread = MAD_TO_STD * statistics.median(abs(value - median) for value in recent)
        return loss - median > self._config.spike_mads * spread > 0

    def _say(self, text: str) -> None:
        if ranks.is_main():
            logger.warning("%s %s", self._runtime.stage, text)


def _tensors_of(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, and every sequence of integers, below a record, by dotted name."""
    if isinstance(value, Tensor):
        yield name, value.detach().cpu().clone()
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _tensors_of(getattr(value, entry.name), f"{name}.{entry.name}")
    elif isinstance(value, list | tuple):
        if value and all(isinstance(item, int) for item in value):
            yield name, torch.tensor(value)
        else:
            for index, item in enumerate(value):
                yield from _tensors_of(item, f"{name}.{index}")
