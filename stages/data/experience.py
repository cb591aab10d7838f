"""Experience: what one batch of rollouts becomes before the PPO updates.

    rollouts --plan once--> packs --forwards--> log-probs, values, scores --rewards, GAE--> Experience each

The pack plan is made once per batch and every forward on it, before and during the updates, uses the same
rows: so the first ratio is exactly 1. Owns: that plan, the assembly, and how far the engine's log-probs are
from the trainer's on it. Does not own: the forwards (training.forwards), the formulas (objectives).
Legend: B responses of a pack, T response tokens (padded to the config's maximum), N response tokens
(concatenated).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rollout.api import Rollout
from stages.config.correction import Correction
from stages.config.ppo import PPOConfig
from stages.data.batches import permutation
from stages.data.packing import PackedRow, plan_packs
from stages.objectives.advantages import Advantages, ResponseEnds, end_responses, gae, token_rewards
from stages.objectives.correction import correction_weights
from stages.objectives.kl import k1, k3
from stages.objectives.masked import masked_stats, masked_whiten
from stages.training.forwards import ResponsePack, pack_responses

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPack:
    """A few rollouts in one row."""

    rollouts: tuple[Rollout, ...]
    packed: ResponsePack
    rollout_logprobs_BT: Tensor  # by the engine, at the sampling temperature
    truncated_B: Tensor  # bool: no end token


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the models say of one pack, before any update."""

    anchor_logprobs_BT: Tensor  # by the policy as it sampled
    entropies_BT: Tensor  # nats, of the policy
    reference_logprobs_BT: Tensor | None  # absent when nothing reads them (no KL anywhere)
    values_BT: Tensor
    final_values_B: Tensor | None  # values after the last tokens; present where truncation bootstraps
    scores_B: Tensor  # reward-model scores, normalised and clipped
    kl_B: Tensor | None  # nats per response, k1 summed; absent without a reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One pack, ready for the updates."""

    packed: ResponsePack
    mask_BT: Tensor  # tokens that are trained on: the packed mask, less dropped responses
    rollout_logprobs_BT: Tensor  # by the engine, at the sampling temperature
    anchor_logprobs_BT: Tensor
    anchor_values_BT: Tensor
    reference_logprobs_BT: Tensor | None
    advantages_BT: Tensor
    returns_BT: Tensor

    @property
    def row(self) -> PackedRow:
        """See `trainable.Pack`."""
        return self.packed.row

    @property
    def predicting_N(self) -> Tensor:
        """See `trainable.Pack`."""
        return self.packed.predicting_N

    @property
    def targets_N(self) -> Tensor:
        """See `trainable.Pack`."""
        return self.packed.targets_N


def pack_rollouts(
    rollouts: Sequence[Rollout], *, micro_batch_size: int, max_length: int, device: torch.device
) -> list[RolloutPack]:
    """The pack plan of a batch, rows built: the only one its updates will use."""
    plan = plan_packs(
        [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts], micro_batch_size
    )
    return [_packed([rollouts[index] for index in members], max_length, device) for members in plan.packs]


def assemble(
    packs: Sequence[RolloutPack], judgements: Sequence[Judgement], config: PPOConfig, *, kl_coef: float
) -> tuple[list[Experience], dict[str, float]]:
    """Rewards, advantages and returns of the whole batch, whitened once over it; and its metrics.

    Order: score normalised and clipped (in the judgement), the rule for missing ends, KL penalty, GAE,
    returns, whitening of the advantages.
    """
    ends = [_ends(pack, judgement, config) for pack, judgement in zip(packs, judgements, strict=True)]
    raw = [
        _advantages(judgement, end, config, kl_coef) for judgement, end in zip(judgements, ends, strict=True)
    ]
    masks = [end.mask_BT for end in ends]
    advantages_BT = torch.cat([item.advantages_BT for item in raw])
    if config.whiten_advantages:
        advantages_BT = masked_whiten(values=advantages_BT, mask=torch.cat(masks), shift_mean=True)
    shares = advantages_BT.split([len(pack.rollouts) for pack in packs])
    experiences = [
        Experience(
            packed=pack.packed,
            mask_BT=mask_BT,
            rollout_logprobs_BT=pack.rollout_logprobs_BT,
            anchor_logprobs_BT=judgement.anchor_logprobs_BT,
            anchor_values_BT=judgement.values_BT,
            reference_logprobs_BT=judgement.reference_logprobs_BT,
            advantages_BT=share_BT,
            returns_BT=item.returns_BT,
        )
        for pack, judgement, item, mask_BT, share_BT in zip(
            packs, judgements, raw, masks, shares, strict=True
        )
    ]
    return experiences, _summary(packs, judgements, experiences, kl_coef)


def engine_differences(packs: Sequence[RolloutPack], judgements: Sequence[Judgement]) -> Tensor:
    """|log-prob of the engine - of the trainer| of every token of the batch, [N], in nats."""
    return torch.cat(
        [
            (judgement.anchor_logprobs_BT - pack.rollout_logprobs_BT)[pack.packed.mask_BT].abs()
            for pack, judgement in zip(packs, judgements, strict=True)
        ]
    )


def correction_metrics(
    packs: Sequence[RolloutPack], judgements: Sequence[Judgement], correction: Correction
) -> dict[str, float]:
    """How far the engine's distribution is from the trainer's over the tokens of the batch, and what the
    correction makes of it; whatever its type.
    """
    mask_BT = torch.cat([pack.packed.mask_BT for pack in packs])
    anchor_BT = torch.cat([judgement.anchor_logprobs_BT for judgement in judgements])
    rollout_BT = torch.cat([pack.rollout_logprobs_BT for pack in packs])
    found = correction_weights(
        anchor_logprobs_BT=anchor_BT,
        rollout_logprobs_BT=rollout_BT,
        mask_BT=mask_BT,
        kind=correction.type,
        min_weight=correction.min_weight,
        max_weight=correction.max_weight,
    )
    ratios_N = found.ratios_BT[mask_BT]
    apart = {"policy_logprobs": rollout_BT[mask_BT], "reference_logprobs": anchor_BT[mask_BT]}
    return {
        "rollout/ratio_mean": float(ratios_N.mean()),
        "rollout/ratio_min": float(ratios_N.min()),
        "rollout/ratio_max": float(ratios_N.max()),
        "rollout/weight_mean": float(found.weights_BT[mask_BT].mean()),
        "rollout/weight_limited": float(found.limited_BT[mask_BT].float().mean()),
        "rollout/engine_kl_k1": float(k1(**apart).mean()),
        "rollout/engine_kl_k3": float(k3(**apart).mean()),
    }


def minibatches(packs: Sequence[T], *, packs_per_step: int, seed: int) -> list[list[T]]:
    """The packs of an epoch in a seeded order, `packs_per_step` to an optimizer step: packs are shuffled,
    never torn.
    """
    order = [packs[int(index)] for index in permutation(len(packs), seed)]
    return [order[start : start + packs_per_step] for start in range(0, len(order), packs_per_step)]


def _repeated_share(responses: Sequence[Sequence[int]], n: int = 4) -> float:
    """Mean over the responses of the share of n-grams that stood earlier in the same response; 0 for shorter
    ones.
    """
    shares = []
    for ids in responses:
        grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def _packed(rollouts: Sequence[Rollout], max_length: int, device: torch.device) -> RolloutPack:
    packed = pack_responses(
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.response_ids for rollout in rollouts],
        max_length=max_length,
        device=device,
    )
    logprobs_BT = torch.zeros(packed.mask_BT.shape)
    for row_T, rollout in zip(logprobs_BT, rollouts, strict=True):
        row_T[: len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    return RolloutPack(
        rollouts=tuple(rollouts),
        packed=packed,
        rollout_logprobs_BT=logprobs_BT.to(device),
        truncated_B=torch.tensor([rollout.finish_reason == "length" for rollout in rollouts], device=device),
    )


def _ends(pack: RolloutPack, judgement: Judgement, config: PPOConfig) -> ResponseEnds:
    return end_responses(
        scores_B=judgement.scores_B,
        mask_BT=pack.packed.mask_BT,
        truncated_B=pack.truncated_B,
        missing_eos=config.truncation,
        penalty=config.missing_eos_penalty if config.truncation == "penalty" else None,
        last_values_B=judgement.final_values_B,
    )


def _advantages(judgement: Judgement, ends: ResponseEnds, config: PPOConfig, kl_coef: float) -> Advantages:
    rewards_BT = token_rewards(
        scores_B=ends.scores_B,
        anchor_logprobs_BT=judgement.anchor_logprobs_BT,
        reference_logprobs_BT=judgement.reference_logprobs_BT,
        mask_BT=ends.mask_BT,
        kl_coef=kl_coef if config.kl_placement == "reward" else 0.0,
    )
    return gae(
        rewards_BT=rewards_BT,
        values_BT=judgement.values_BT,
        mask_BT=ends.mask_BT,
        final_values_B=ends.final_values_B,
        gamma=config.gamma,
        lam=config.gae_lambda,
    )


def _summary(
    packs: Sequence[RolloutPack],
    judgements: Sequence[Judgement],
    experiences: Sequence[Experience],
    kl_coef: float,
) -> dict[str, float]:
    mask_BT = torch.cat([pack.packed.mask_BT for pack in packs])
    trained_BT = torch.cat([experience.mask_BT for experience in experiences])
    scores_B = torch.cat([judgement.scores_B for judgement in judgements])
    entropies_BT = torch.cat([judgement.entropies_BT for judgement in judgements])
    differences_N = engine_differences(packs, judgements)
    returns_BT = torch.cat([experience.returns_BT for experience in experiences])
    values_BT = torch.cat([experience.anchor_values_BT for experience in experiences])
    spread = masked_stats(values=returns_BT, mask=trained_BT).std.square()
    unexplained = masked_stats(values=returns_BT - values_BT, mask=trained_BT).std.square()
    summary = {
        "rollout/score": float(scores_B.mean()),
        "rollout/score_std": float(scores_B.std(unbiased=False)),
        "rollout/length": float(mask_BT.sum(-1).float().mean()),
        "rollout/truncated": float(torch.cat([pack.truncated_B for pack in packs]).float().mean()),
        "rollout/repeated": _repeated_share(
            [rollout.response_ids for pack in packs for rollout in pack.rollouts]
        ),
        "rollout/entropy": float(masked_stats(values=entropies_BT, mask=mask_BT).mean),
        "rollout/kl_coef": kl_coef,
        "rollout/engine_max_abs_diff": float(differences_N.max()),
        "rollout/engine_mean_abs_diff": float(differences_N.mean()),
        "ppo/explained_variance": float(1 - unexplained / spread) if spread > 0 else 0.0,
    }
    kls = [judgement.kl_B for judgement in judgements if judgement.kl_B is not None]
    return summary | {"rollout/kl": float(torch.cat(kls).mean())} if kls else summary
