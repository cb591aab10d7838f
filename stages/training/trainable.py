"""What a loss and an algorithm may ask of a model, whatever it runs on: `Judge` reads, `Trainable` learns.

    packs, Reads --forward inside the model--> Outputs --loss_of(pack, outputs)--> TermLoss --sum--> one step

Owns: the records and the two protocols. Does not own: models and sharding (fsdp), formulas (objectives), what
a stage's packs hold besides their tokens (the recipes).

Logits never leave the model. Losses receive numbers at the positions that their pack asks for. So one forward
serves several terms, and a term is a pure function of a pack and its outputs.

Legend: B sequences of a packed row, N positions that a pack asks for, L layers with experts, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from rollout.weight_source import ModuleSource
from stages.data.packing import PackedRow


class Pack(Protocol):
    """A packed row and the positions at which a model is asked about it. Records of a stage add what its
    loss needs.
    """

    @property
    def row(self) -> PackedRow:
        """B sequences end to end. Scores and final values are read at their last tokens."""

    @property
    def predicting_N(self) -> Tensor:
        """int64: positions whose logits score `targets_N`, and where values are read. May be empty."""

    @property
    def targets_N(self) -> Tensor:
        """int64: the token ids to score, one for each of `predicting_N`."""


PackType = TypeVar("PackType", bound=Pack)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What a term, a credit or a judge reads of a model.

    Example: Reads(logprobs=True, temperature=1.0) | Reads(entropies=True, temperature=1.0)
    """

    logprobs: bool = False
    entropies: bool = False
    values: bool = False
    final_values: bool = False
    scores: bool = False
    router_loss: bool = False  # and the experts' counts; a model without routers gives neither
    temperature: float | None = None  # divides the logits; stated with log-probs and entropies only

    def __post_init__(self) -> None:
        assert (self.temperature is not None) == (self.logprobs or self.entropies), (
            "log-probs and entropies have a temperature, nothing else has one"
        )

    def __or__(self, other: "Reads") -> "Reads":
        """What one forward has to give so that both are served."""
        stated = {reads.temperature for reads in (self, other)} - {None}
        assert len(stated) <= 1, f"one forward has one temperature, not {sorted(map(str, stated))}"
        return Reads(
            logprobs=self.logprobs or other.logprobs,
            entropies=self.entropies or other.entropies,
            values=self.values or other.values,
            final_values=self.final_values or other.final_values,
            scores=self.scores or other.scores,
            router_loss=self.router_loss or other.router_loss,
            temperature=self.temperature if other.temperature is None else other.temperature,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a model says of one pack. What was not read is None."""

    logprobs_N: Tensor | None = None  # of the targets, float32, nats
    entropies_N: Tensor | None = None  # of the distributions that the targets are drawn from, nats
    values_N: Tensor | None = None  # at the predicting positions, float32
    final_values_B: Tensor | None = None  # of the state after each sequence's last token
    scores_B: Tensor | None = None  # at each sequence's last token, raw
    router_loss: Tensor | None = None  # scalar, the balance loss of this row alone, without a coefficient
    expert_counts_LE: Tensor | None = None  # float64, tokens that each expert of each layer worked for


@dataclass(frozen=True, slots=True, kw_only=True)
class TermLoss:
    """A pack's share of one step's loss, and what is watched of it.

    `sums` add up over the packs and ranks of a step, elementwise and in float64; each is divided by its count
    of the whole step first where a mean is wanted. Of `extremes` the largest over packs and ranks is kept.
    Every pack of a step gives the same names.
    """

    loss: Tensor  # scalar, differentiable
    sums: Mapping[str, Tensor] = field(default_factory=dict)  # any shape, the same for every pack
    extremes: Mapping[str, Tensor] = field(default_factory=dict)  # scalars

    def __add__(self, other: "TermLoss") -> "TermLoss":
        """Both terms of one model: losses and equal names of sums add up, of extremes the larger is kept."""
        return TermLoss(
            loss=self.loss + other.loss,
            sums=_joined(self.sums, other.sums, torch.add),
            extremes=_joined(self.extremes, other.extremes, torch.maximum),
        )


def _joined(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], both: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """All names of the two mappings; where they share one, `both` of its values."""
    shared = ours.keys() & theirs.keys()
    return {**ours, **theirs} | {name: both(ours[name], theirs[name]) for name in shared}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step."""

    loss: float  # sum over packs and ranks: the mean of the step
    grad_norm: float  # global, before clipping
    lr: float
    taken: bool  # else the weights are as they were
    sums: Mapping[str, Tensor]  # float64 on the CPU, over packs and ranks; {} when the step was not taken
    extremes: Mapping[str, float]  # over packs and ranks; {} when the step was not taken


Accepts = Callable[[float, float, Mapping[str, Tensor], Mapping[str, float]], bool]
"""(loss, gradient norm, sums, extremes) of a step, over all ranks -> whether to take it; the same on all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedState:
    """What a checkpoint holds of one model: torch's own containers, from which it knows all sizes."""

    model: nn.Module
    adamw: torch.optim.AdamW


class Judge(Protocol):
    """A model that only answers: reference, reward model, teacher, or the policy before its update."""

    def outputs(self, pack: Pack, reads: Reads) -> Outputs:
        """What the model says of `pack`, without gradient. Of a sharded model a collective."""


class Trainable(Judge, Protocol):
    """A model with its optimizer. Every method is a collective: all ranks call it, at the same point."""

    def take_step(
        self,
        step: int,
        packs: Sequence[PackType],
        reads: Reads,
        loss_of: Callable[[PackType, Outputs], TermLoss],
        accepts: Accepts,
    ) -> StepResult:
        """Accumulate the gradient of `loss_of` over this rank's `packs` (equally many on every rank), one
        forward of `reads` each, and update the weights once if `accepts` says so.

        Losses arrive divided by the counts of the whole step; gradients are summed over packs and ranks.
        `step` counts from 0 for the learning rate's schedule.
        """

    def weights(self, *, dtype: str) -> ModuleSource:
        """The weights as an engine that computes in `dtype` ("float32", "bfloat16") gets them."""

    def state(self) -> TrainedState:
        """What a checkpoint of this model walks."""

    def save(self, directory: Path) -> None:
        """Write a model directory (`save_pretrained` layout, safetensors); rank 0 writes."""
