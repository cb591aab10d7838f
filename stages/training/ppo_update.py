"""The updates of one PPO iteration: E epochs of clipped policy and value steps over one batch of experience.

    experiences (packs) --shuffled per epoch--> minibatches --policy loss, value loss--> two optimizer steps

Owns: the optimizers of policy and value model, the order of minibatches, who trains on which pack, the
metrics of the updates. Which packs exist was decided once, before the anchor forward; they are shuffled here
and never torn. Every rank holds all packs; each step's packs are shared out between the ranks.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from stages.training.forwards import response_logprobs, response_logprobs_and_entropies, response_values
from stages.training.health import Health
from stages.training.optimize import Optimizer, StepResult
from stages.training.ppo_models import PPOModels

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
        self._packs_per_step = config.batch_size // config.pack_size
        num_packs = math.ceil(config.responses_per_step / config.pack_size)
        self._steps_per_epoch = math.ceil(num_packs / self._packs_per_step)
        per_iteration = config.num_epochs * self._steps_per_epoch
        total = config.max_steps * per_iteration
        self._value_only = config.value_warmup_steps * per_iteration  # steps before the policy's first
        self.policy = Optimizer(models.policy, config, lr=config.lr, max_steps=total - self._value_only)
        self.value = Optimizer(models.value_model, config, lr=config.value_lr, max_steps=total)

    @property
    def parts(self) -> dict[str, Optimizer]:
        """What a checkpoint holds."""
        return {"policy": self.policy, "value": self.value}

    def update(self, step: int, experiences: Sequence[Experience], *, kl_coef: float) -> dict[str, float]:
        """All optimizer steps of iteration `step` (0-based); metrics averaged over them. Raises RollBack
        when too many of them are bad.
        """
        watch = _UpdateWatch()
        for epoch in range(self._config.num_epochs):
            seed = stage_seed(self._seed, "ppo", "minibatches", step, epoch)
            for index, packs in enumerate(
                minibatches(experiences, packs_per_step=self._packs_per_step, seed=seed)
            ):
                number = (step * self._config.num_epochs + epoch) * self._steps_per_epoch + index
                self._take_steps(step, number, packs, kl_coef, watch)
        return watch.metrics()

    def _take_steps(
        self, step: int, number: int, packs: Sequence[Experience], kl_coef: float, watch: "_UpdateWatch"
    ) -> None:
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
        value = self.value.take_step(
            number,
            mine,
            lambda pack: self._value_loss(pack, denominator),
            partial(self.health.accepts, "value loss", step),
        )
        self._note(
            step, mine, value, watch, {"ppo/value_loss": value.loss, "ppo/value_grad_norm": value.grad_norm}
        )
        if step < config.value_warmup_steps:
            return
        policy = self.policy.take_step(
            number - self._value_only,
            mine,
            lambda pack: self._policy_loss(pack, denominator, kl_coef, num_tokens, watch),
            partial(self.health.accepts, "policy loss", step),
        )
        self.policy_steps += policy.taken
        seen = watch.close_step() if policy.taken else {}
        seen |= {
            "ppo/policy_loss": policy.loss,
            "ppo/policy_grad_norm": policy.grad_norm,
            "ppo/lr": policy.lr,
        }
        self._note(step, mine, policy, watch, seen)

    def _note(
        self,
        step: int,
        packs: Sequence[Experience],
        result: StepResult,
        watch: "_UpdateWatch",
        seen: Mapping[str, float],
    ) -> None:
        """What was seen of a step that was taken; one that was not has no numbers worth a mean."""
        if result.taken:
            watch.add(seen)
        else:
            watch.drop_step()
            self.health.skipped(step, packs)

    def _value_loss(self, pack: Experience, denominator: Tensor) -> Tensor:
        return value_loss(
            values_BT=response_values(self._models.value_model, pack.packed),
            anchor_values_BT=pack.anchor_values_BT,
            returns_BT=pack.returns_BT,
            mask_BT=pack.mask_BT,
            clip=self._config.value_clip,
            aggregation=self._config.loss_aggregation,
            denominator=denominator,
        ).loss

    def _policy_loss(
        self,
        pack: Experience,
        denominator: Tensor,
        kl_coef: float,
        num_tokens: float,
        watch: "_UpdateWatch",
    ) -> Tensor:
        config = self._config
        policy_BT, entropies_BT = self._policy_forward(pack)
        single_update = config.num_epochs == 1 and self._steps_per_epoch == 1
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
        watch.see_ratio(result.ratio_min, result.ratio_max)
        watch.add_share("ppo/approx_kl", float(result.token_sums["approx_kl_anchor_k3"]) / num_tokens)
        watch.add_share("ppo/clip_fraction", float(result.token_sums["clip_frac"]) / num_tokens)
        loss = result.loss + self._kl_term(pack, policy_BT, denominator, kl_coef)
        if entropies_BT is None:
            return loss
        bonus = entropy_bonus(
            entropies_BT=entropies_BT,
            mask_BT=pack.mask_BT,
            aggregation=config.loss_aggregation,
            denominator=denominator,
        )
        return loss - config.entropy_coef * bonus

    def _policy_forward(self, pack: Experience) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the response tokens, and entropies where something weighs them."""
        policy, temperature = self._models.policy, self._config.temperature
        if self._config.entropy_coef == 0:
            return response_logprobs(policy, pack.packed, temperature=temperature), None
        return response_logprobs_and_entropies(policy, pack.packed, temperature=temperature)

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


class _UpdateWatch:
    """Means over optimizer steps of what was watched; shares add up over packs and ranks of a step first."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._shares: dict[str, float] = defaultdict(float)
        self._first_ratio = 0.0  # largest |ratio - 1| of the first optimizer step
        self._first_step_open = True

    def add(self, seen: Mapping[str, float]) -> None:
        for name, value in seen.items():
            self._sums[name] += value
            self._counts[name] += 1

    def add_share(self, name: str, share: float) -> None:
        self._shares[name] += share

    def see_ratio(self, smallest: Tensor, largest: Tensor) -> None:
        if self._first_step_open and torch.isfinite(largest):
            self._first_ratio = max(self._first_ratio, float(largest) - 1, 1 - float(smallest))

    def close_step(self) -> dict[str, float]:
        """The shares of a policy step, summed. Every rank, together."""
        if self._first_step_open:
            self._first_ratio = ranks.largest(self._first_ratio)
        self._first_step_open = False
        totals = dict(zip(self._shares, ranks.sums(*self._shares.values()), strict=True))
        self._shares.clear()
        return totals

    def drop_step(self) -> None:
        """Forget the shares of a step that was not taken."""
        self._shares.clear()

    def metrics(self) -> dict[str, float]:
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        return means if self._first_step_open else means | {"ppo/ratio_first": self._first_ratio}
