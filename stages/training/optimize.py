"""AdamW over one model: parameter groups, the learning rate's schedule, clipping, the decision on a step.

    terms of a step's packs --Tally--> loss, sums, extremes --over all ranks--> clip to max_grad_norm
    --accepted?--> AdamW at this step's learning rate

Owns: what happens once the gradient of a step is there. Does not own: forwards and backwards (fsdp). Losses
arrive divided by the count of the whole step over all ranks, and ranks sum their gradients. So how a batch is
split cannot change the gradient.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from stages.config.training import TrainingConfig
from stages.objectives.schedules import lr_factor
from stages.training import ranks
from stages.training.trainable import Accepts, StepResult, TermLoss, TrainedState


class Tally:
    """The terms of one rank's packs of a step, added up in pack order."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.sums: dict[str, Tensor] = {}  # float64, on the CPU
        self.extremes: dict[str, float] = {}

    def add(self, term: TermLoss) -> None:
        """The term of the next pack."""
        self.loss += term.loss.item()
        for name, value in term.sums.items():
            value = value.detach().to("cpu", torch.float64)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        for name, value in term.extremes.items():
            self.extremes[name] = _larger(float(value), self.extremes.get(name, -math.inf))

    def over_ranks(self) -> "Tally":
        """The same of all ranks together. A collective."""
        whole = Tally()
        (whole.loss,) = ranks.sums(self.loss)
        if self.sums:
            added = ranks.sum_over_ranks(torch.cat([value.flatten() for value in self.sums.values()]))
            parts = added.split([value.numel() for value in self.sums.values()])
            whole.sums = {
                name: part.view(value.shape)
                for (name, value), part in zip(self.sums.items(), parts, strict=True)
            }
        whole.extremes = {name: ranks.largest(value) for name, value in self.extremes.items()}
        return whole


def _larger(value: float, other: float) -> float:
    """The larger of two numbers; NaN where one of them is NaN, as torch.maximum has it."""
    return value if value > other or math.isnan(value) else other


class Optimizer:
    """AdamW over one model, with its schedule: steps count from 0, and the schedule spans `max_steps`."""

    def __init__(self, model: nn.Module, config: TrainingConfig, *, lr: float, max_steps: int) -> None:
        self.model = model
        self._config = config
        self._peak_lr = lr
        self._max_steps = max_steps
        self.adamw = torch.optim.AdamW(
            _parameter_groups(model, config.weight_decay),
            lr=lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
        )
        self._begin()

    def _begin(self) -> None:
        """Moments of zero, before any step. AdamW makes them at its first one; a checkpoint that is saved
        before would make DCP take a step of its own to have them, and that counts in the bias correction.
        """
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.adamw.state[parameter] = {"step": torch.tensor(0.0), **zeros}

    def zero_grad(self) -> None:
        """No gradient: a step begins."""
        self.adamw.zero_grad(set_to_none=True)

    def step(self, step: int, tally: Tally, accepts: Accepts) -> StepResult:
        """Update the weights once by the gradient that lies in them, if `accepts` says so; `tally` is this
        rank's share of what was seen. A collective.
        """
        seen = tally.over_ranks()
        norm = clip_gradient(self.model.parameters(), self._config.max_grad_norm)
        lr = self._set_lr(step)
        if taken := accepts(seen.loss, norm, seen.sums, seen.extremes):
            self.adamw.step()
        return StepResult(
            loss=seen.loss,
            grad_norm=norm,
            lr=lr,
            taken=taken,
            sums=seen.sums if taken else {},
            extremes=seen.extremes if taken else {},
        )

    def state(self) -> TrainedState:
        """What a checkpoint holds."""
        return TrainedState(model=self.model, adamw=self.adamw)

    def _set_lr(self, step: int) -> float:
        config = self._config
        factor = lr_factor(
            schedule=config.lr_schedule,
            step=step,
            warmup_steps=round(config.warmup_frac * self._max_steps),
            total_steps=self._max_steps,
            final_frac=config.min_lr_frac,
        )
        for group in self.adamw.param_groups:
            group["lr"] = self._peak_lr * factor
        return self._peak_lr * factor


def clip_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients down to `max_norm`; their norm before, over all ranks.

    Parameters may be sharded over different meshes, or not at all: torch takes the norm of one mesh at a
    time. The squares add up. Gradients that are not sharded are the same on all ranks.
    """
    groups = list(_by_mesh(parameter for parameter in parameters if parameter.grad is not None).values())
    if len(groups) <= 1:
        return _whole(nn.utils.clip_grad_norm_(groups[0] if groups else [], max_norm))
    norms = [_whole(nn.utils.get_total_norm([_gradient(one) for one in group])) for group in groups]
    norm = math.sqrt(sum(part**2 for part in norms))
    factor = min(1.0, max_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
    for parameter in (one for group in groups for one in group):
        _gradient(parameter).mul_(factor)
    return norm


def _by_mesh(parameters: Iterable[nn.Parameter]) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    """By the device mesh they are sharded over, in their order; None: not sharded."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        found[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return found


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _whole(norm: Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms, biases and other vectors do not. What lies on different meshes is apart,
    because AdamW computes with a whole group at a time.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": group, "weight_decay": decay}
        for of_mesh in _by_mesh(trained).values()
        for group, decay in (
            (_of_rank(of_mesh, matrices=True), weight_decay),
            (_of_rank(of_mesh, matrices=False), 0.0),
        )
    ]


def _of_rank(parameters: Sequence[nn.Parameter], *, matrices: bool) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if (parameter.ndim >= 2) == matrices]
