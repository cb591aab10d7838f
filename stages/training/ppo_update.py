"""The updates of one PPO iteration: E epochs of clipped policy and value steps over one batch of experience.

    experiences (packs) --shuffled per epoch--> minibatches --value loss, policy loss--> two optimizer steps

Owns: the two losses, the order of minibatches, who trains on which pack, the
metrics of the updates. Which packs exist was decided once, before the anchor forward; they are shuffled here
and never torn. Every rank holds all packs; each step's packs are shared out between the ranks.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from stages.config.correction import Correction
from stages.config.ppo import PPOConfig
from stages.data.batches import stage_seed
from stages.data.experience import Experience, minibatches
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
from stages.training import ranks
from stages.training.fsdp import Trained
from stages.training.health import Health
from stages.training.ppo_models import PPOModels, UpdateSteps
from stages.training.trainable import Outputs, Reads, TermLoss

ALL_CUT_OFF = (
    "every response of a batch was cut off, and so left out; raise ppo.max_response_tokens, or set "
    "ppo.truncation: penalty"
)


class Learner:
    """Policy and value model under training.

    Example: learner = Learner(models, config, correction=settings.correction, seed=0, health=health)
             metrics = learner.update(step, experiences, kl_coef=0.05)
    """

    def __init__(
        self, models: PPOModels, config: PPOConfig, *, correction: Correction, seed: int, health: Health
    ) -> None:
        """`correction`: the rollout correction in force."""
        self.health = health
        self.policy_steps = 0  # taken by this process: after the first one the policy has moved
        self._correction = correction
        self._models = models
        self._config = config
        self._seed = seed
        self._steps = UpdateSteps.of(config)

    @property
    def trained(self) -> dict[str, Trained]:
        """By the names that a checkpoint gives them."""
        return {"policy": self._models.policy, "value": self._models.value_model}

    def update(self, step: int, experiences: Sequence[Experience], *, kl_coef: float) -> dict[str, float]:
        """All optimizer steps of iteration `step` (0-based); metrics averaged over those that were taken.
        Raises RollBack when too many of them are bad.
        """
        seen: list[Mapping[str, float]] = []
        first_ratio: Mapping[str, float] = {}
        for epoch in range(self._config.num_epochs):
            seed = stage_seed(self._seed, "ppo", "minibatches", step, epoch)
            for index, packs in enumerate(
                minibatches(experiences, packs_per_step=self._steps.packs_per_step, seed=seed)
            ):
                number = (step * self._config.num_epochs + epoch) * self._steps.per_epoch + index
                for metrics, extremes in self._take_steps(step, number, packs, kl_coef):
                    seen.append(metrics)
                    first_ratio = first_ratio or extremes
        return {**_means(seen), **first_ratio}

    def _take_steps(
        self, step: int, number: int, packs: Sequence[Experience], kl_coef: float
    ) -> Iterator[tuple[Mapping[str, float], Mapping[str, float]]]:
        """The value model's step, then the policy's: of each that was taken its metrics and its extremes."""
        config = self._config
        masks = [pack.mask_BT for pack in packs]
        denominator = aggregation_denominator(
            masks=masks,
            aggregation=config.loss_aggregation,
            constant_length=config.max_response_tokens if config.loss_aggregation == "constant" else None,
        )
        num_tokens = float(sum(int(mask.sum()) for mask in masks))
        if num_tokens == 0:
            self.health.leave_out(ALL_CUT_OFF)
            return
        mine = [pack if is_mine else _empty(pack) for pack, is_mine in ranks.shared_out(packs)]
        value = self._models.value_model.take_step(
            number,
            mine,
            Reads(values=True),
            partial(self._value_loss, denominator=denominator),
            self.health.accepting("value loss", step),
        )
        if value.taken:
            yield {"ppo/value_loss": value.loss, "ppo/value_grad_norm": value.grad_norm}, {}
        else:
            self.health.skipped(step, mine)
        if step < config.value_warmup_steps:
            return
        policy = self._models.policy.take_step(
            number - self._steps.value_only,
            mine,
            self._policy_reads,
            partial(self._policy_loss, denominator=denominator, kl_coef=kl_coef, num_tokens=num_tokens),
            self.health.accepting("policy loss", step),
        )
        self.policy_steps += policy.taken
        if policy.taken:
            metrics = {
                **{name: float(share) for name, share in policy.sums.items()},
                "ppo/policy_loss": policy.loss,
                "ppo/policy_grad_norm": policy.grad_norm,
                "ppo/lr": policy.lr,
            }
            yield metrics, policy.extremes
        else:
            self.health.skipped(step, mine)

    def _value_loss(self, pack: Experience, now: Outputs, *, denominator: Tensor) -> TermLoss:
        result = value_loss(
            values_BT=pack.packed.padded(now.values_N),
            anchor_values_BT=pack.anchor_values_BT,
            returns_BT=pack.returns_BT,
            mask_BT=pack.mask_BT,
            clip=self._config.value_clip,
            aggregation=self._config.loss_aggregation,
            denominator=denominator,
        )
        return TermLoss(loss=result.loss)

    @property
    def _policy_reads(self) -> Reads:
        """Log-probs of the response tokens, and entropies where something weighs them."""
        config = self._config
        return Reads(logprobs=True, entropies=config.entropy_coef != 0, temperature=config.temperature)

    def _policy_loss(
        self, pack: Experience, now: Outputs, *, denominator: Tensor, kl_coef: float, num_tokens: float
    ) -> TermLoss:
        config = self._config
        policy_BT = pack.packed.padded(now.logprobs_N)
        single_update = config.num_epochs == 1 and self._steps.per_epoch == 1
        anchor_BT = policy_BT.detach() if single_update else pack.anchor_logprobs_BT
        corrected = correction_weights(
            anchor_logprobs_BT=anchor_BT,
            rollout_logprobs_BT=pack.rollout_logprobs_BT,
            mask_BT=pack.mask_BT,
            kind=self._correction.type,
            min_weight=self._correction.min_weight,
            max_weight=self._correction.max_weight,
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
            denominator=denominator,
        )
        loss = result.loss + self._kl_term(pack, policy_BT, denominator, kl_coef)
        if config.entropy_coef:
            bonus = entropy_bonus(
                entropies_BT=pack.packed.padded(now.entropies_N),
                mask_BT=pack.mask_BT,
                aggregation=config.loss_aggregation,
                denominator=denominator,
            )
            loss = loss - config.entropy_coef * bonus
        furthest = torch.maximum(result.ratio_max.double() - 1, 1 - result.ratio_min.double())
        return TermLoss(
            loss=loss,
            sums={
                "ppo/approx_kl": result.token_sums["approx_kl_anchor_k3"].double() / num_tokens,
                "ppo/clip_fraction": result.token_sums["clip_frac"].double() / num_tokens,
            },
            extremes={"ppo/ratio_first": furthest},  # from 1; -inf of a pack without a token
        )

    def _kl_term(self, pack: Experience, policy_BT: Tensor, denominator: Tensor, kl_coef: float) -> Tensor:
        """beta times the KL loss where the config puts the KL into the loss; 0 where it is in the reward.

        Over the denominator of the policy loss, so that beta weighs the two in every aggregation alike.
        """
        config = self._config
        if config.kl_placement == "reward" or pack.reference_logprobs_BT is None:
            return policy_BT.new_zeros(())
        weighting = {
            "logprobs_BT": policy_BT.detach(),
            "rollout_logprobs_BT": pack.anchor_logprobs_BT,
            "mask_BT": pack.mask_BT,
        }
        if config.kl_placement == "loss":
            weights_B = sequence_importance_weights(**weighting, max_weight=math.inf, beyond="truncate")
            loss = sequence_kl_loss(
                policy_logprobs_BT=policy_BT,
                reference_logprobs_BT=pack.reference_logprobs_BT,
                importance_weights_B=weights_B,
                mask_BT=pack.mask_BT,
                denominator=denominator,
            )
            return kl_coef * loss
        assert config.kl_estimator != "k1", "PPOConfig refuses k1 as a loss"
        weights_BT = token_importance_weights(**weighting, max_weight=math.inf, beyond="truncate")
        loss = kl_surrogate_loss(
            policy_logprobs_BT=policy_BT,
            reference_logprobs_BT=pack.reference_logprobs_BT,
            importance_weights_BT=weights_BT,
            mask_BT=pack.mask_BT,
            estimator=config.kl_estimator,
            aggregation=config.loss_aggregation,
            denominator=denominator,
        )
        return kl_coef * loss


def _empty(pack: Experience) -> Experience:
    """A pack that takes part in the forwards and adds nothing to loss or gradient."""
    return replace(pack, mask_BT=torch.zeros_like(pack.mask_BT))


def _means(seen: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each name the mean over the steps that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for metrics in seen:
        for name, value in metrics.items():
            values[name].append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}
