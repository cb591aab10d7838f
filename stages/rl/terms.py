"""Terms of a loss: each receives what a model says of a pack, and gives that pack's share of the step's loss.

    pack, Outputs, counts --term--> TermLoss, per model in the order of `Algorithm.terms` --sum--> one step

Owns: which numbers each term takes from an experience, and what is watched of it. Does not own: the formulas
(objectives.losses), which terms there are (algorithms), the steps (update).

Legend: B trajectories of a pack, T response tokens (padded), N response tokens (concatenated). Outputs are
padded before the masked sums, so that sums keep their order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from stages.config.correction import Correction
from stages.config.ppo import PPOConfig, Role
from stages.objectives.correction import correction_weights
from stages.objectives.losses import (
    aggregation_denominator,
    entropy_bonus,
    kl_surrogate_loss,
    policy_loss,
    sequence_importance_weights,
    sequence_kl_loss,
    token_importance_weights,
    value_loss,
)
from stages.rl.experience import Experience
from stages.training.trainable import Outputs, Reads, TermLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """What the losses of one optimizer step are divided by: counts over all its packs, on all ranks."""

    denominator: Tensor  # of the aggregation; scalar float32
    num_tokens: float  # that are learned from

    @classmethod
    def of(cls, packs: Sequence[Experience], config: PPOConfig) -> "StepCounts":
        """`packs`: all of the step, not only this rank's."""
        masks = [pack.mask_BT for pack in packs]
        denominator = aggregation_denominator(
            masks=masks,
            aggregation=config.loss_aggregation,
            constant_length=config.max_response_tokens if config.loss_aggregation == "constant" else None,
        )
        return cls(denominator=denominator, num_tokens=float(sum(int(mask.sum()) for mask in masks)))


class Term(Protocol):
    """One summand of one model's loss."""

    @property
    def trains(self) -> Role:
        """The model that gets its gradient."""

    @property
    def reads(self) -> Reads:
        """What it needs that model to say of a pack."""

    @property
    def active_from(self) -> int:
        """The first iteration (0-based) in which it is part of the loss."""

    def __call__(self, pack: Experience, now: Outputs, counts: StepCounts) -> TermLoss:
        """The share of `pack`; `now`: what the model says of it as it is now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedPolicy:
    """PPO's clipped surrogate, weighed by the rollout correction. Watches how far the policy has moved."""

    trains: ClassVar[Role] = "policy"

    config: PPOConfig
    correction: Correction
    active_from: int

    @property
    def reads(self) -> Reads:
        """See `Term`."""
        return Reads(logprobs=True, temperature=self.config.temperature)

    def __call__(self, pack: Experience, now: Outputs, counts: StepCounts) -> TermLoss:
        """See `Term`."""
        config = self.config
        policy_BT = pack.packed.padded(now.logprobs_N)
        anchor_BT = policy_BT.detach() if pack.anchor_logprobs_BT is None else pack.anchor_logprobs_BT
        corrected = correction_weights(
            anchor_logprobs_BT=anchor_BT,
            rollout_logprobs_BT=pack.rollout_logprobs_BT,
            mask_BT=pack.mask_BT,
            kind=self.correction.type,
            min_weight=self.correction.min_weight,
            max_weight=self.correction.max_weight,
        )
        result = policy_loss(
            policy_logprobs_BT=policy_BT,
            anchor_logprobs_BT=anchor_BT,
            advantages_BT=pack.advantages_BT,
            importance_weights_BT=corrected.weights_BT,
            mask_BT=pack.mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            aggregation=config.loss_aggregation,
            denominator=counts.denominator,
        )
        furthest = torch.maximum(result.ratio_max.double() - 1, 1 - result.ratio_min.double())
        return TermLoss(
            loss=result.loss,
            sums={
                "ppo/approx_kl": result.token_sums["approx_kl_anchor_k3"].double() / counts.num_tokens,
                "ppo/clip_fraction": result.token_sums["clip_frac"].double() / counts.num_tokens,
            },
            extremes={"ppo/ratio_first": furthest},  # from 1; -inf of a pack without a token
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKl:
    """beta times the KL to the reference as a loss, over the denominator of the policy loss: so beta weighs
    the two alike in every aggregation. On the whole response (`kl_placement: loss`) or per token.
    """

    trains: ClassVar[Role] = "policy"

    config: PPOConfig
    active_from: int

    @property
    def reads(self) -> Reads:
        """See `Term`."""
        return Reads(logprobs=True, temperature=self.config.temperature)

    def __call__(self, pack: Experience, now: Outputs, counts: StepCounts) -> TermLoss:
        """See `Term`."""
        config = self.config
        policy_BT = pack.packed.padded(now.logprobs_N)
        assert pack.reference_logprobs_BT is not None, "a KL loss has a reference"
        sampled_by_BT = policy_BT if pack.anchor_logprobs_BT is None else pack.anchor_logprobs_BT
        weighting = {
            "logprobs_BT": policy_BT.detach(),
            "rollout_logprobs_BT": sampled_by_BT.detach(),
            "mask_BT": pack.mask_BT,
        }
        if config.kl_placement == "loss":
            weights_B = sequence_importance_weights(**weighting, max_weight=math.inf, beyond="truncate")
            loss = sequence_kl_loss(
                policy_logprobs_BT=policy_BT,
                reference_logprobs_BT=pack.reference_logprobs_BT,
                importance_weights_B=weights_B,
                mask_BT=pack.mask_BT,
                denominator=counts.denominator,
            )
            return TermLoss(loss=pack.kl_coef * loss)
        assert config.kl_estimator != "k1", "PPOConfig refuses k1 as a loss"
        weights_BT = token_importance_weights(**weighting, max_weight=math.inf, beyond="truncate")
        loss = kl_surrogate_loss(
            policy_logprobs_BT=policy_BT,
            reference_logprobs_BT=pack.reference_logprobs_BT,
            importance_weights_BT=weights_BT,
            mask_BT=pack.mask_BT,
            estimator=config.kl_estimator,
            aggregation=config.loss_aggregation,
            denominator=counts.denominator,
        )
        return TermLoss(loss=pack.kl_coef * loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyBonus:
    """Minus the policy's mean entropy, times `entropy_coef`."""

    trains: ClassVar[Role] = "policy"

    config: PPOConfig
    active_from: int

    @property
    def reads(self) -> Reads:
        """See `Term`."""
        return Reads(entropies=True, temperature=self.config.temperature)

    def __call__(self, pack: Experience, now: Outputs, counts: StepCounts) -> TermLoss:
        """See `Term`."""
        bonus = entropy_bonus(
            entropies_BT=pack.packed.padded(now.entropies_N),
            mask_BT=pack.mask_BT,
            aggregation=self.config.loss_aggregation,
            denominator=counts.denominator,
        )
        return TermLoss(loss=-self.config.entropy_coef * bonus)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedValue:
    """Squared error of the values against the returns, clipped around the values before the updates."""

    trains: ClassVar[Role] = "value"

    config: PPOConfig
    active_from: int

    @property
    def reads(self) -> Reads:
        """See `Term`."""
        return Reads(values=True)

    def __call__(self, pack: Experience, now: Outputs, counts: StepCounts) -> TermLoss:
        """See `Term`."""
        assert pack.anchor_values_BT is not None, "a value loss has a value model"
        result = value_loss(
            values_BT=pack.packed.padded(now.values_N),
            anchor_values_BT=pack.anchor_values_BT,
            returns_BT=pack.returns_BT,
            mask_BT=pack.mask_BT,
            clip=self.config.value_clip,
            aggregation=self.config.loss_aggregation,
            denominator=counts.denominator,
        )
        return TermLoss(loss=result.loss)
