"""The one inner loop of every stage: accumulate gradients over micro-batches, clip, step.

    for each micro-batch: loss (a masked sum / the step's whole count) -> backward
    all, over all ranks: clip to max_grad_norm -> accepted? -> AdamW at this step's learning rate

Owns: AdamW, parameter groups, the learning rate, clipping. Losses arrive already divided by the count of the
whole step over all ranks, and ranks sum their gradients, so how a batch is split cannot change the gradient.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stages.config.training import TrainingConfig
from stages.objectives.schedules import lr_factor
from stages.training import ranks

MicroBatch = TypeVar("MicroBatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step."""

    loss: float  # sum over micro-batches and ranks: the mean of the step
    grad_norm: float  # global, before clipping
    lr: float
    taken: bool  # else the weights are as they were


class Optimizer:
    """AdamW over one model, with its schedule.

    `take_step` counts from 0; the schedule spans `max_steps` of them.
    """

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

    def take_step(
        self,
        step: int,
        micro_batches: Iterable[MicroBatch],
        loss_of: Callable[[MicroBatch], Tensor],
        accepts: Callable[[float, float], bool],
    ) -> StepResult:
        """Accumulate `loss_of` over this rank's `micro_batches` (equally many on every rank) and update the
        weights once, if `accepts(loss, gradient norm)`.
        """
        self.adamw.zero_grad(set_to_none=True)
        total = 0.0
        for micro_batch in micro_batches:
            loss = loss_of(micro_batch)
            loss.backward()
            total += loss.item()
        (step_loss,) = ranks.sums(total)
        norm = self._clip_gradient()
        lr = self._set_lr(step)
        if taken := accepts(step_loss, norm):
            self.adamw.step()
        return StepResult(loss=step_loss, grad_norm=norm, lr=lr, taken=taken)

    def _clip_gradient(self) -> float:
        """Scale the gradient down to `max_grad_norm`; its norm before, over all ranks."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

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


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms, biases and other vectors do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
