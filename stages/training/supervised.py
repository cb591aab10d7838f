"""The stepper of pretrain, sft and reward: one model, one optimizer step per batch of a fixed order.

    position --batch_of--> packs --take_step(reads, loss_of)--> loss, sums --window--> metrics of a line

Owns: the window of loss, speed and watched sums since the last line of the log. A step that was not taken
leaves no trace in it, and it is part of each checkpoint: a run that went back or was resumed writes the same
lines. Does not own: what a batch is, what its loss is and what the sums mean (the recipes).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

import torch
from torch import Tensor

from stages.config.training import TrainingConfig
from stages.runtime import Runtime
from stages.training import ranks
from stages.training.health import Health
from stages.training.trainable import Outputs, PackType, Reads, StepResult, TermLoss, Trainable


class Supervised(Generic[PackType]):
    """A `Stepper` of one model.

    Example: stepper = Supervised(model, config, runtime=runtime, reads=Reads(scores=True), batch_of=batch_of,
                                  loss_of=loss_of, watched=lambda sums: {"train/accuracy": ...})
             run_loop(stepper, config, max_steps=100, runtime=runtime)
    """

    def __init__(
        self,
        model: Trainable,
        config: TrainingConfig,
        *,
        runtime: Runtime,
        reads: Reads,
        batch_of: Callable[[int], Sequence[PackType]],
        loss_of: Callable[[PackType, Outputs], TermLoss],
        watched: Callable[[Mapping[str, Tensor]], Mapping[str, float]],
    ) -> None:
        """`batch_of(position)` gives this rank's packs of a step, `loss_of` a pack's share of the step's
        loss. `watched` are the metrics of the sums over a window's steps, if there are any.
        """
        self.trained = {"model": model}
        self.health = Health(config.health, runtime)
        self._model = model
        self._reads = reads
        self._batch_of = batch_of
        self._loss_of = loss_of
        self._watched = watched
        self._window = _Window({})
        self._rates: dict[str, float] = {}
        self._num_steps = 0

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """See `Stepper`."""
        self._num_steps = step
        self._window = _Window(state)

    def step(self, step: int, position: int) -> None:
        """See `Stepper`."""
        batch = self._batch_of(position)
        accepts = self.health.accepting("loss", step)
        result = self._model.take_step(step, batch, self._reads, self._loss_of, accepts)
        if result.taken:
            self._window.add(result, num_tokens=sum(pack.row.num_tokens for pack in batch))
            self._rates = {"train/lr": result.lr, "train/grad_norm": result.grad_norm}
        else:
            self.health.skipped(step, batch)

    def finish(self, step: int) -> None:
        """See `Stepper`."""
        self._num_steps = step

    def metrics(self) -> Mapping[str, float]:
        """See `Stepper`; a new window begins."""
        sums = self._window.sums
        return {
            **self._window.close(),
            **self._rates,
            **self.health.metrics(),
            **(self._watched(sums) if sums else {}),
        }

    def score(self) -> float | None:
        """See `Stepper`: the lower the loss of the window so far, the higher."""
        loss = self._window.mean()
        return None if loss is None else -loss

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper`."""
        return self._window.state_dict()

    def saved(self) -> None:
        """See `Stepper`."""

    def summary(self) -> dict[str, float]:
        """How training went, for the summary of a stage. Raises TrainingStopped when no step was taken."""
        self.health.check_end("loss")
        assert self._window.last_loss is not None, "a training without a single step has ended before"
        return {
            "loss_final": self._window.last_loss,  # mean over the last logged window
            "tokens_per_second": self._window.tokens_per_second,
            "steps": float(self._num_steps),
            "steps_skipped": float(self.health.state.skipped),
        }


class _Window:
    """Loss, speed and sums since the last line of the log, and speed over this execution."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        """`state`: of `state_dict`, or {} at the start."""
        self.last_loss: float | None = state["loss"] if state else None  # mean of the last closed window
        self.sums: dict[str, Tensor] = {}  # float64
        self._losses: list[float] = []
        if state:
            self._losses = list(state["losses"])
            self.sums = {
                name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()
            }
        self._all_tokens, self._all_seconds = 0.0, 0.0
        self._tokens = 0
        self._start = time.perf_counter()

    def add(self, result: StepResult, *, num_tokens: int) -> None:
        """A step that was taken; `num_tokens` of this rank."""
        self._losses.append(result.loss)
        self._tokens += num_tokens
        for name, value in result.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def mean(self) -> float | None:
        """Mean loss so far; of the last window where no step of this was taken."""
        return sum(self._losses) / len(self._losses) if self._losses else self.last_loss

    def close(self) -> dict[str, float]:
        """Metrics of the window; a new one begins. Every rank, together."""
        seconds = time.perf_counter() - self._start
        (tokens,) = ranks.sums(self._tokens)
        self.last_loss = self.mean()
        self._all_tokens, self._all_seconds = self._all_tokens + tokens, self._all_seconds + seconds
        self._losses, self._tokens, self.sums, self._start = [], 0, {}, time.perf_counter()
        loss = {} if self.last_loss is None else {"train/loss": self.last_loss}
        return {**loss, "train/tokens_per_second": tokens / seconds}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to write the same lines; its speed is its own."""
        sums = {name: value.tolist() for name, value in self.sums.items()}
        return {"loss": self.last_loss, "losses": self._losses, "sums": sums}

    @property
    def tokens_per_second(self) -> float:
        """Over the closed windows; 0 before the first is closed."""
        return self._all_tokens / self._all_seconds if self._all_seconds else 0.0
