"""Supervised training from a resumable order of batches: the loop that pretrain, sft and reward share.

    for step: batch_of(position) -> micro-batches -> Optimizer.take_step -> metrics line -> checkpoint
                                                        `-- too many bad steps: back to the last checkpoint

Owns: the step counter, resuming, stopping at a step boundary, the rhythm of metrics and checkpoints. What a
batch is and what its loss is stay in the recipe. Every rank runs this loop on its share of each batch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from stages.config.training import TrainingConfig
from stages.data.batches import BatchOrder
from stages.errors import Interrupted
from stages.runtime import Runtime
from stages.training import ranks
from stages.training.checkpoint import Checkpoints
from stages.training.health import Health, RollBack
from stages.training.metrics import MetricsLog
from stages.training.observed import Observed
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
    skipped_steps: int  # not finite, or spikes where those are skipped

    def metrics(self) -> dict[str, float]:
        """For the summary of a stage."""
        return {
            "loss_final": self.loss_final,
            "tokens_per_second": self.tokens_per_second,
            "steps": float(self.steps),
            "steps_skipped": float(self.skipped_steps),
        }


def fit(
    optimizer: Optimizer,
    config: TrainingConfig,
    *,
    max_steps: int,
    runtime: Runtime,
    batch_of: Callable[[int], Sequence[Batch]],
    loss_of: Callable[[Batch], Tensor],
    observed: Observed | None = None,
) -> FitResult:
    """Train from the last checkpoint (or from the start) to `max_steps`. Whatever the batches and the model
    are made from has been read.

    `batch_of(position)` gives this rank's micro-batches of a step (the position is the step, unless data were
    left out), `loss_of` a micro-batch's share of the step's loss; to `observed` it adds what further metrics
    are made of. Raises DataError when a file changed meanwhile, TrainingStopped when bad steps do not end,
    Interrupted when the run is to stop.
    """
    runtime.check_files()
    parts = {"model": optimizer}
    checkpoints = Checkpoints(runtime.work_dir, keep=config.keep_checkpoints)
    step, extra = checkpoints.restore(parts)
    health = Health(config.health, runtime)
    if extra:
        health.restore(extra["health"])
    log = MetricsLog(runtime.work_dir, max_steps=max_steps, resumed_step=step)
    window = _Window(extra["window"] if extra else {"loss": None, "losses": []})
    observed = Observed() if observed is None else observed
    observed.restore(_observed_in(extra))
    rates: dict[str, float] = {}
    while step < max_steps:
        batch = batch_of(step + health.state.data_offset)
        result = optimizer.take_step(step, batch, loss_of, partial(health.accepts, "loss", step))
        observed.close_step(taken=result.taken)
        if result.taken:
            window.add(result.loss, batch)
            rates = {"train/lr": result.lr, "train/grad_norm": result.grad_norm}
        else:
            try:
                health.skipped(step, batch)
            except RollBack:
                back, extra = checkpoints.roll_back(parts)
                next_step = health.rolled_back(
                    step, back if extra else None, extra["health"] if extra else {}
                )
                if extra:  # else on behind the bad data, as after any step that was skipped
                    step = next_step
                    log.cut(step)
                    window = _Window(extra["window"])
                    observed.restore(_observed_in(extra))
                    continue
        step += 1
        if step % config.log_every_steps == 0 or step == max_steps:
            log(step, {**window.close(), **rates, **health.metrics(), **observed.take()})
        if not health.is_good():
            continue  # a checkpoint is a place to go back to: none in the middle of bad steps
        stopping = ranks.any_rank(runtime.stop_requested())
        due = step % config.checkpoint_every_steps == 0
        if stopping or (due and step < max_steps):
            state = {
                "window": window.state_dict(),
                "observed": observed.state_dict(),
                "health": health.state_dict(),
            }
            checkpoints.save(step, parts, state, score=window.score(), regular=due)
        if stopping:
            raise Interrupted(
                f"{runtime.stage}: stopped at step {step} of {max_steps}, state saved; run the same "
                "command to go on"
            )
    health.check_end("loss")
    return FitResult(
        loss_final=window.loss_final(),
        tokens_per_second=window.tokens_per_second,
        steps=max_steps,
        skipped_steps=health.state.skipped,
    )


def _observed_in(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """The window of further metrics in a checkpoint; one of an older version of this code has none."""
    return extra["observed"] if "observed" in extra else Observed().state_dict()


class _Window:
    """Loss and speed since the last line of the log, and speed over this execution."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._loss: float | None = state["loss"]  # mean of the last window that was closed
        self._losses: list[float] = list(state["losses"])
        self._all_tokens, self._all_seconds = 0.0, 0.0
        self._tokens = 0
        self._start = time.perf_counter()

    def add(self, loss: float, batch: Sequence[MicroBatch]) -> None:
        self._losses.append(loss)
        self._tokens += sum(micro_batch.num_tokens for micro_batch in batch)

    def loss_final(self) -> float:
        """Of the last window."""
        assert self._loss is not None, "a training without a single step has ended before"
        return self._loss

    def score(self) -> float | None:
        """What a checkpoint of now is kept for: the lower the loss of the window so far, the higher."""
        loss = self._mean()
        return None if loss is None else -loss

    def _mean(self) -> float | None:
        return sum(self._losses) / len(self._losses) if self._losses else self._loss

    def close(self) -> dict[str, float]:
        """Metrics of the window; a new one begins. Every rank, together."""
        seconds = time.perf_counter() - self._start
        (tokens,) = ranks.sums(self._tokens)
        self._loss = self._mean()  # the last one's where every step of this was skipped
        self._all_tokens, self._all_seconds = self._all_tokens + tokens, self._all_seconds + seconds
        self._losses, self._tokens, self._start = [], 0, time.perf_counter()
        loss = {} if self._loss is None else {"train/loss": self._loss}
        return {**loss, "train/tokens_per_second": tokens / seconds}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to write the same losses; its speed is its own."""
        return {"loss": self._loss, "losses": self._losses}

    @property
    def tokens_per_second(self) -> float:
        """Over the closed windows; 0 when there was none."""
        return self._all_tokens / self._all_seconds if self._all_seconds else 0.0


def num_steps(config: TrainingConfig, order: BatchOrder) -> int:
    """Optimizer steps of a stage: `max_steps`, or `num_epochs` over the rows of `order`."""
    return order.num_steps(config.num_epochs) if config.max_steps is None else config.max_steps
