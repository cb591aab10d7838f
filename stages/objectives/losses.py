"""The losses of every stage: masked sums over a denominator that is passed in.

    masks of the whole optimizer step, all ranks --aggregation_denominator--> denominator, first of all
    each micro-batch: loss per token --weights of the aggregation--> masked sum --/ denominator--> backward

So a batch may be split into micro-batches, packs or ranks in any way and padded to any width: the gradients
*add up* (they are summed over ranks, not averaged) to the same thing. Data masks (padding, observations,
failed rewards, truncation) leave the count. Importance masks do not: they are weights of 0, and weights never
touch a denominator.

Owns: the language-model, preference, policy, value, entropy and KL losses, and what a "mean" is. Does not
own: coefficients (the recipe adds the terms up), nor advantages.

Legend: B sequences, T response tokens, S tokens of a whole row, V vocabulary, P pairs. Log-probs carry their
owner: policy_ (being trained), anchor_ (the trainer's own before this step's updates), rollout_ (the
engine's), reference_ (frozen). `token_sums` hold detached sums over the mask, to be added up over
micro-batches and ranks and then divided by the token count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.objectives.kl import estimate_kl, k3, sequence_log_ratio
from stages.objectives.logprobs import bounded_exp
from stages.objectives.masked import SumOverRanks, check_mask, masked_sum, on_one_rank, widened, zero_masked

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"]
BeyondCap = Literal["truncate", "mask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """A share of the step's policy loss, and what to watch."""

    loss: Tensor  # scalar, differentiable
    token_sums: Mapping[str, Tensor]  # clip_frac, clip_frac_low, clip_frac_high, dual_clip_frac, ratio,
    #                                   approx_kl_anchor_k1, approx_kl_anchor_k3
    ratio_min: Tensor  # scalar; inf when the mask is empty, so a minimum over micro-batches stays right
    ratio_max: Tensor  # scalar; -inf when the mask is empty


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """A share of the step's value loss, and what to watch."""

    loss: Tensor  # scalar, differentiable
    token_sums: Mapping[str, Tensor]  # value_clip_frac, value_squared_error (unclipped), value


def aggregation_denominator(
    *,
    masks: Sequence[Tensor],
    aggregation: Aggregation,
    constant_length: float | None,
    sum_over_ranks: SumOverRanks = on_one_rank,
) -> Tensor:
    """What every loss of one optimizer step is divided by: scalar float32, the same on all ranks.

    masks: this rank's [B, T] masks of *all* micro-batches of the step (B and T may differ; a rank with
    nothing passes a mask without True). A sequence that is all masked is not counted; a step without one
    token has denominator 1, hence loss 0.

    token_mean                 tokens
    sequence_mean_token_mean   sequences
    sequence_mean_token_sum    sequences
    constant                   sequences * constant_length (Dr. GRPO, arXiv 2503.20783: the generation budget)

    ValueError if `constant_length` is missing for "constant", given for another, or not > 0.
    """
    if (aggregation == "constant") != (constant_length is not None):
        raise ValueError(f"constant_length is {constant_length} with aggregation {aggregation!r}")
    if constant_length is not None and not constant_length > 0:
        raise ValueError(f"constant_length must be > 0, got {constant_length}")
    _check_aggregation(aggregation)
    for mask in masks:
        check_mask(mask=mask)
    units = masks if aggregation == "token_mean" else [mask.any(-1) for mask in masks]
    counts = [unit.sum() for unit in units]
    count = sum_over_ranks(torch.stack(counts).sum().float()).clamp(min=1)
    return count if constant_length is None else count * constant_length


def aggregate(*, values_BT: Tensor, mask_BT: Tensor, aggregation: Aggregation, denominator: Tensor) -> Tensor:
    """This micro-batch's share of the step's mean: weighted masked sum / denominator; a scalar."""
    _check_aggregation(aggregation)
    kept_BT = zero_masked(values=values_BT, mask=mask_BT)
    if aggregation == "sequence_mean_token_mean":
        kept_BT = kept_BT / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return kept_BT.sum() / denominator


def target_mask(*, loss_mask_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
    """bool [B, S], True on the tokens a causal LM is trained to predict; its sum is the count of the loss.

    loss_mask_BS: bool, the tokens to learn (assistant tokens, EOS included). A sequence's first token
    (position id 0) is never a target: nothing predicts it, and in a packed row the token before belongs to
    someone else. Nor is the first column, whatever its position id.
    """
    check_mask(mask=loss_mask_BS, position_ids_BS=position_ids_BS)
    not_first_S = torch.arange(loss_mask_BS.shape[1], device=loss_mask_BS.device) > 0
    return loss_mask_BS & (position_ids_BS > 0) & not_first_S


def causal_lm_loss_sum(*, logprobs_BS: Tensor, target_mask_BS: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the True tokens of `target_mask_BS` (from `target_mask`); a scalar.

    logprobs_BS: column t is the log-prob of the token at t + 1; the last column predicts nothing and is left
    out. The mask is aligned with the input ids: the one shift is inside. Divide by the step's number of
    targets.
    """
    check_mask(mask=target_mask_BS, logprobs_BS=logprobs_BS)
    return -masked_sum(values=logprobs_BS[:, :-1], mask=target_mask_BS[:, 1:])


def pair_loss_sum(*, chosen_scores_P: Tensor, rejected_scores_P: Tensor, margins_P: Tensor) -> Tensor:
    """Bradley-Terry loss -log sigmoid(chosen - rejected - margin), summed over the pairs; a scalar.

    Scores in raw units, margins >= 0 in the same (zeros: none). Divide by the step's number of pairs.
    Source: InstructGPT (arXiv 2203.02155), eq. 1; margins: Llama 2 (2307.09288), eq. 2.
    """
    if not chosen_scores_P.shape == rejected_scores_P.shape == margins_P.shape:
        raise ValueError(
            f"scores and margins of pairs have shapes {tuple(chosen_scores_P.shape)}, "
            f"{tuple(rejected_scores_P.shape)} and {tuple(margins_P.shape)}"
        )
    return -F.logsigmoid(widened(chosen_scores_P) - widened(rejected_scores_P) - margins_P).sum()


def policy_loss(
    *,
    policy_logprobs_BT: Tensor,
    anchor_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    importance_weights_BT: Tensor | None,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    aggregation: Aggregation,
    denominator: Tensor,
) -> PolicyLoss:
    """PPO's clipped surrogate: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = policy / anchor.

    dual_clip: for A < 0 the loss is at most -A * dual_clip (None: unbounded). importance_weights_BT (anchor /
    rollout, see `token_importance_weights`; None: 1) multiply the loss, detached. Anchor and advantages get
    no gradient. Clip fractions count tokens whose loss is *strictly* the clipped one, i.e. without gradient:
    high, A > 0 and r > 1 + clip_high; low, A < 0 and r < 1 - clip_low; dual, A < 0 and r > dual_clip. A ratio
    merely out of range on the harmless side does not count. ValueError unless 0 <= clip_low < 1, clip_high >=
    0, dual_clip > 1 + clip_high.
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; asymmetric: DAPO (2503.14476); dual: Ye et al.
    2020 (1912.09729), eq. 5.
    """
    _check_clip(clip_low, clip_high, dual_clip)
    check_mask(mask=mask_BT, policy_logprobs_BT=policy_logprobs_BT, anchor_logprobs_BT=anchor_logprobs_BT)
    advantages_BT = zero_masked(values=advantages_BT.detach(), mask=mask_BT)
    log_ratio_BT = zero_masked(values=policy_logprobs_BT - anchor_logprobs_BT.detach(), mask=mask_BT)
    ratio_BT = bounded_exp(log_ratio_BT)
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    losses_BT = torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)
    high_BT = (advantages_BT > 0) & (ratio_BT > 1 + clip_high)
    low_BT = (advantages_BT < 0) & (ratio_BT < 1 - clip_low)
    dual_BT = torch.zeros_like(mask_BT)
    if dual_clip is not None:
        dual_BT = (advantages_BT < 0) & (ratio_BT > dual_clip)
        losses_BT = torch.where(dual_BT, -advantages_BT * dual_clip, losses_BT)
    if importance_weights_BT is not None:
        check_mask(mask=mask_BT, importance_weights_BT=importance_weights_BT)
        losses_BT = losses_BT * importance_weights_BT.detach()
    token_sums = {
        "clip_frac": high_BT | low_BT,
        "clip_frac_low": low_BT,
        "clip_frac_high": high_BT,
        "dual_clip_frac": dual_BT,
        "ratio": ratio_BT,
        "approx_kl_anchor_k1": -log_ratio_BT,
        "approx_kl_anchor_k3": k3(
            policy_logprobs=torch.zeros_like(log_ratio_BT), reference_logprobs=log_ratio_BT
        ),
    }
    return PolicyLoss(
        loss=aggregate(
            values_BT=losses_BT, mask_BT=mask_BT, aggregation=aggregation, denominator=denominator
        ),
        token_sums=_sums(token_sums, mask_BT),
        ratio_min=-_masked_max(-ratio_BT.detach(), mask_BT),
        ratio_max=_masked_max(ratio_BT.detach(), mask_BT),
    )


def value_loss(
    *,
    values_BT: Tensor,
    anchor_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    clip: float | None,
    aggregation: Aggregation,
    denominator: Tensor,
) -> ValueLoss:
    """max((V - R)^2, (clip(V, anchor - clip, anchor + clip) - R)^2) / 2 per token; clip None: (V - R)^2 / 2.

    anchor_values_BT: the values before this step's updates, the same that GAE read. Neither they nor the
    returns get a gradient. The clip fraction counts tokens whose loss is strictly the clipped one. ValueError
    unless clip > 0.
    Source: "The N Implementation Details of RLHF with PPO" (2023); PPO's own code (`ppo2`).
    """
    check_mask(mask=mask_BT, values_BT=values_BT, anchor_values_BT=anchor_values_BT, returns_BT=returns_BT)
    if clip is not None and not clip > 0:
        raise ValueError(f"the value clip must be > 0 or None, got {clip}")
    # Zeroed before squaring: what stands in the padding may be NaN.
    errors_BT = zero_masked(values=values_BT - returns_BT.detach(), mask=mask_BT)
    squares_BT, clipped_BT = errors_BT.square(), torch.zeros_like(mask_BT)
    losses_BT = squares_BT
    if clip is not None:
        move_BT = (values_BT - anchor_values_BT.detach()).clamp(-clip, clip)
        clipped_errors_BT = anchor_values_BT.detach() + move_BT - returns_BT.detach()
        clipped_squares_BT = zero_masked(values=clipped_errors_BT, mask=mask_BT).square()
        losses_BT = torch.maximum(squares_BT, clipped_squares_BT)
        clipped_BT = clipped_squares_BT > squares_BT
    token_sums = {"value_clip_frac": clipped_BT, "value_squared_error": squares_BT, "value": values_BT}
    return ValueLoss(
        loss=aggregate(
            values_BT=losses_BT / 2, mask_BT=mask_BT, aggregation=aggregation, denominator=denominator
        ),
        token_sums=_sums(token_sums, mask_BT),
    )


def entropy_bonus(
    *, entropies_BT: Tensor, mask_BT: Tensor, aggregation: Aggregation, denominator: Tensor
) -> Tensor:
    """This micro-batch's share of the mean entropy (nats); a scalar to *subtract*, times its coefficient."""
    return aggregate(
        values_BT=entropies_BT, mask_BT=mask_BT, aggregation=aggregation, denominator=denominator
    )


def sequence_kl_loss(
    *,
    policy_logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor,
    importance_weights_B: Tensor | None,
    mask_BT: Tensor,
    denominator: Tensor,
) -> Tensor:
    """k2 on whole responses: the sum over them of w (sum_t log(policy / reference))^2 / 2, / denominator.

    On the policy's own samples its expected gradient is that of KL(policy || reference), exactly. Off-policy
    pass w = `sequence_importance_weights` of the policy against what sampled (detached here); None says the
    samples are the policy's own. `denominator` is that of the policy loss beside it: the sum of both is then
    a constant times the KL-regularised objective, whose optimum is pi*, with "token_mean",
    "sequence_mean_token_sum" and "constant" alike. Not with "sequence_mean_token_mean": there each policy
    term is divided by its own length besides, and no factor is common to both.
    """
    log_ratio_B = sequence_log_ratio(
        policy_logprobs_BT=policy_logprobs_BT,
        reference_logprobs_BT=reference_logprobs_BT.detach(),
        mask_BT=mask_BT,
    )
    losses_B = log_ratio_B.square() / 2
    if importance_weights_B is not None:
        check_mask(mask=mask_BT.any(-1), importance_weights_B=importance_weights_B)
        losses_B = losses_B * importance_weights_B.detach()
    return losses_B.sum() / denominator


def kl_surrogate_loss(
    *,
    policy_logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor,
    importance_weights_BT: Tensor | None,
    mask_BT: Tensor,
    estimator: Literal["k2", "k3"],
    aggregation: Aggregation,
    denominator: Tensor,
) -> Tensor:
    """Per-token k2 or k3 as a loss (GRPO's KL term): a regulariser with another optimum than pi*, see `kl`.

    k3's gradient is that of the forward KL; k2's sees no future token. Off-policy pass w =
    `token_importance_weights` of the policy against what sampled (detached here); None says the samples are
    the policy's own. ValueError for k1: as a loss its expected gradient is zero. Source: DeepSeekMath (arXiv
    2402.03300), eq. 4.
    """
    if estimator not in ("k2", "k3"):
        raise ValueError(f"a KL surrogate is k2 or k3, got {estimator!r}")
    check_mask(
        mask=mask_BT, policy_logprobs_BT=policy_logprobs_BT, reference_logprobs_BT=reference_logprobs_BT
    )
    reference_logprobs_BT = reference_logprobs_BT.detach()
    losses_BT = estimate_kl(
        estimator=estimator,
        policy_logprobs=zero_masked(values=policy_logprobs_BT, mask=mask_BT),
        reference_logprobs=zero_masked(values=reference_logprobs_BT, mask=mask_BT),
    )
    if importance_weights_BT is not None:
        check_mask(mask=mask_BT, importance_weights_BT=importance_weights_BT)
        losses_BT = losses_BT * importance_weights_BT.detach()
    return aggregate(values_BT=losses_BT, mask_BT=mask_BT, aggregation=aggregation, denominator=denominator)


@torch.no_grad()
def token_importance_weights(
    *, logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, max_weight: float, beyond: BeyondCap
) -> Tensor:
    """weights_BT = exp(logprobs - rollout) per token, capped from above only; 0 where masked.

    logprobs_BT: whose expectation is wanted (anchor for the policy loss, policy for a KL loss). Above
    `max_weight` (math.inf: no cap) a weight is `max_weight` ("truncate") or 0 ("mask"; the token stays in
    every count). ValueError unless max_weight >= 1. Source: truncated importance sampling, Ionides 2008;
    Espeholt et al. 2018 (arXiv 1802.01561).
    """
    check_mask(mask=mask_BT, logprobs_BT=logprobs_BT, rollout_logprobs_BT=rollout_logprobs_BT)
    log_ratio_BT = zero_masked(values=logprobs_BT - rollout_logprobs_BT, mask=mask_BT)
    return limited_weights(log_ratio_BT, 0.0, max_weight, beyond) * mask_BT


@torch.no_grad()
def sequence_importance_weights(
    *, logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, max_weight: float, beyond: BeyondCap
) -> Tensor:
    """weights_B = exp(sum_t (logprobs - rollout)), else as `token_importance_weights`; 1 for an empty row."""
    log_ratio_B = sequence_log_ratio(
        policy_logprobs_BT=logprobs_BT, reference_logprobs_BT=rollout_logprobs_BT, mask_BT=mask_BT
    )
    return limited_weights(log_ratio_B, 0.0, max_weight, beyond)


@torch.no_grad()
def limited_weights(log_ratio: Tensor, min_weight: float, max_weight: float, beyond: BeyondCap) -> Tensor:
    """exp(log_ratio), any shape; above `max_weight` (math.inf: no cap) it is `max_weight` ("truncate"), above
    it or below `min_weight` 0 ("mask").

    NaN stays NaN. ValueError unless 0 <= min_weight <= 1 <= max_weight, and min_weight is 0 with "truncate".
    """
    if not max_weight >= 1:
        raise ValueError(f"max_weight must be >= 1 (math.inf: no cap), got {max_weight}")
    if beyond not in ("truncate", "mask"):
        raise ValueError(f'a weight beyond its cap is "truncate" or "mask", got {beyond!r}')
    if not 0 <= min_weight <= (0 if beyond == "truncate" else 1):
        raise ValueError(f"truncation caps from above only; of a mask min_weight is 0..1, got {min_weight}")
    weights = bounded_exp(log_ratio)
    beyond_limits = (weights > max_weight) | (weights < min_weight)
    return torch.where(beyond_limits, max_weight if beyond == "truncate" else 0.0, weights)


def _check_aggregation(aggregation: Aggregation) -> None:
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"no aggregation {aggregation!r}; there are {', '.join(get_args(Aggregation))}")


def _check_clip(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise ValueError(f"clip_low must be in 0..1 and clip_high >= 0, got {clip_low} and {clip_high}")
    if dual_clip is not None and not dual_clip > 1 + clip_high:
        raise ValueError(f"dual_clip must be above 1 + clip_high = {1 + clip_high}, got {dual_clip}")


def _sums(values: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, Tensor]:
    return {name: masked_sum(values=value.detach().float(), mask=mask_BT) for name, value in values.items()}


def _masked_max(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    kept = values_BT.masked_fill(~mask_BT, -torch.inf).flatten()
    return F.pad(kept, (0, 1), value=-torch.inf).amax()  # the pad: a micro-batch of width 0 has a maximum too
