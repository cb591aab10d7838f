"""A tiny regression trained by the real loop: everything about a batch is a function of its position."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from inline import runtime_in
from plain_models import take_step
from torch import nn

from stages.config.pretrain import PretrainConfig
from stages.training.loop import run_loop
from stages.training.optimize import Optimizer
from stages.training.supervised import Supervised
from stages.training.trainable import Outputs, Reads, TermLoss

CONFIG = PretrainConfig(
    lr=1e-2, batch_size=4, micro_batch_size=2, log_every_steps=2, checkpoint_every_steps=3, warmup_frac=0.2
)
MAX_STEPS = 10


@dataclass(frozen=True)
class Numbers:
    """A pack of numbers in place of tokens: what the loop asks of one is its size."""

    inputs: torch.Tensor

    @property
    def row(self) -> "Numbers":
        return self

    @property
    def num_tokens(self) -> int:
        return self.inputs.numel()


class Regressor:
    """A `Trainable` that reads no tokens."""

    def __init__(self, model: nn.Module, config: PretrainConfig, max_steps: int) -> None:
        self._optimizer = Optimizer(model, config, lr=config.lr, max_steps=max_steps)

    def take_step(self, step, packs, reads, loss_of, accepts):
        return take_step(self._optimizer, step, packs, lambda pack: loss_of(pack, Outputs()), accepts)

    def state(self):
        return self._optimizer.state()


class Killed(Exception):
    """Stands for a SIGKILL between two steps."""


@dataclass(kw_only=True)
class Regression:
    """One training in `directory`. The loss of a position in `spoiled` is no number, in `wild` it is huge."""

    directory: Path
    config: PretrainConfig = CONFIG
    max_steps: int = MAX_STEPS
    spoiled: Collection[int] = ()
    wild: Collection[int] = ()
    left_out: Collection[int] = ()  # as if the data had never held these positions
    die_at: int | None = None  # position
    stop_at: int | None = None  # position at which the run is asked to stop
    positions: list[int] = field(default_factory=list)  # as they were asked for

    def train(self) -> tuple[torch.Tensor, dict[str, float]]:
        """All weights afterwards, and how it went."""
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.runtime = runtime_in(self.directory, "sft")
        stepper = Supervised(
            Regressor(self.model, self.config, self.max_steps),
            self.config,
            runtime=self.runtime,
            reads=Reads(),
            batch_of=self._batch_of,
            loss_of=self._loss_of,
            watched=lambda sums: {"train/margin": float(sums["inputs"]) / float(sums["number"])},
        )
        run_loop(stepper, self.config, max_steps=self.max_steps, runtime=self.runtime)
        weights = torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])
        return weights, stepper.summary()

    def _batch_of(self, position: int) -> list[Numbers]:
        if position == self.die_at:
            raise Killed
        if position == self.stop_at:
            self.runtime.stop_file.touch()
        self.positions.append(position)
        there = [other for other in range(position + len(self.left_out) + 1) if other not in self.left_out]
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(there[position]))
        inputs = inputs * (torch.nan if position in self.spoiled else 100.0 if position in self.wild else 1.0)
        return [Numbers(part) for part in inputs.split(2)]

    def _loss_of(self, numbers: Numbers, _: Outputs) -> TermLoss:
        errors = self.model(numbers.inputs) - numbers.inputs.sum(-1, keepdim=True)
        return TermLoss(
            loss=errors.square().sum() / 4,
            sums={"inputs": numbers.inputs.sum(), "number": torch.tensor(numbers.num_tokens)},
        )


def train(directory: Path, **how: object) -> tuple[torch.Tensor, dict[str, float]]:
    """See `Regression`."""
    return Regression(directory=directory, **how).train()
