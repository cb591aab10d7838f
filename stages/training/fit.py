"""Supervised training from a resumable order of batches: the loop that pretrain, sft and reward share.

    for step: batch_of(step) -> micro-batches -> Optimizer.take_step -> metrics line -> checkpoint

Owns: the step counter, resuming, the rhythm of metrics and checkpoints. What a batch is and what its loss is
stay in the recipe.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from stages.config import TrainingConfig
from stages.data.batches import BatchOrder
from stages.training.checkpoint import Checkpoints
from stages.training.metrics import MetricsLog
from stages.training.optimize import Optimizer


class MicroBatch(Protocol):
    """What one forward and backward sees."""

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""


Batch = TypeVar("Batch", bound=MicroBatch)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """How training went."""

    loss_final: float  # mean over the last logged window
    tokens_per_second: float  # over the steps of this execution; 0 when it had none left to take
    steps: int


def fit(
    optimizer: Optimizer,
    config: TrainingConfig,
    *,
    max_steps: int,
    work_dir: Path,
    batch_of: Callable[[int], Sequence[Batch]],
    loss_of: Callable[[Batch], Tensor],
    observe: Callable[[], Mapping[str, float]] = dict,
) -> FitResult:
    """Train from the last checkpoint (or from the start) to `max_steps`.

    `batch_of(step)` gives the micro-batches of a step, `loss_of` the share of its loss; `observe` further
    metrics of the steps since it was last asked. TrainingStopped when a loss or gradient is not finite.
    """
    checkpoints = Checkpoints(work_dir)
    resumed_step, extra = checkpoints.restore({"model": optimizer})
    log = MetricsLog(work_dir, max_steps=max_steps, resumed_step=resumed_step)
    loss_final = extra["loss_final"] if extra else 0.0
    window_losses: list[float] = []
    window_tokens, all_tokens, all_seconds = 0, 0, 0.0
    window_start = time.perf_counter()
    for step in range(resumed_step, max_steps):
        batch = batch_of(step)
        result = optimizer.take_step(step, batch, loss_of)
        window_losses.append(result.loss)
        window_tokens += sum(micro_batch.num_tokens for micro_batch in batch)
        done = step + 1
        if done % config.log_every_steps == 0 or done == max_steps:
            seconds = time.perf_counter() - window_start
            loss_final = sum(window_losses) / len(window_losses)
            log(
                done,
                {
                    "train/loss": loss_final,
                    "train/lr": result.lr,
                    "train/grad_norm": result.grad_norm,
                    "train/tokens_per_second": window_tokens / seconds,
                    **observe(),
                },
            )
            all_tokens, all_seconds = all_tokens + window_tokens, all_seconds + seconds
            window_losses, window_tokens, window_start = [], 0, time.perf_counter()
        if done % config.checkpoint_every_steps == 0 and done < max_steps:
            checkpoints.save(done, {"model": optimizer}, {"loss_final": loss_final})
    return FitResult(
        loss_final=loss_final,
        tokens_per_second=all_tokens / all_seconds if all_seconds else 0.0,
        steps=max_steps,
    )


def num_steps(config: TrainingConfig, order: BatchOrder) -> int:
    """Optimizer steps of a stage: `max_steps`, or `num_epochs` over the rows of `order`."""
    return order.num_steps(config.num_epochs) if config.max_steps is None else config.max_steps
