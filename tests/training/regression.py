"""A tiny regression trained by the real loop: everything about a batch is a function of its position."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from inline import runtime_in
from torch import nn

from stages.config.pretrain import PretrainConfig
from stages.training.fit import FitResult, fit
from stages.training.observed import Observed
from stages.training.optimize import Optimizer

CONFIG = PretrainConfig(
    lr=1e-2, batch_size=4, micro_batch_size=2, log_every_steps=2, checkpoint_every_steps=3, warmup_frac=0.2
)
MAX_STEPS = 10


@dataclass(frozen=True)
class Numbers:
    inputs: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.inputs.numel()


class MeanInput(Observed):
    """The mean of what went through the model, under a name that is declared."""

    def metrics(self, sums: list[float]) -> dict[str, float]:
        total, number = sums
        return {"train/margin": total / number}


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

    def train(self) -> tuple[torch.Tensor, FitResult]:
        """All weights afterwards, and how it went."""
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.runtime = runtime_in(self.directory, "sft")
        self.observed = MeanInput()
        result = fit(
            Optimizer(self.model, self.config, lr=self.config.lr, max_steps=self.max_steps),
            self.config,
            max_steps=self.max_steps,
            runtime=self.runtime,
            batch_of=self._batch_of,
            loss_of=self._loss_of,
            observed=self.observed,
        )
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()]), result

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

    def _loss_of(self, numbers: Numbers) -> torch.Tensor:
        self.observed.add(torch.stack([numbers.inputs.sum(), torch.tensor(numbers.num_tokens)]).double())
        errors = self.model(numbers.inputs) - numbers.inputs.sum(-1, keepdim=True)
        return errors.square().sum() / 4


def train(directory: Path, **how: object) -> tuple[torch.Tensor, FitResult]:
    """See `Regression`."""
    return Regression(directory=directory, **how).train()
