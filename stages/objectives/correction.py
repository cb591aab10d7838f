"""Rollout correction: what the engine sampled, weighed as if the trainer had.

    anchor, rollout log-probs --ratio of tokens | responses--> limits of the type --> weights of the loss

An engine in bf16, or one that is some versions behind, samples from another distribution than the policy
whose gradient is wanted. Weights of anchor / rollout, detached, make up for that: they multiply the policy
loss and nothing else (no KL term, no value loss, no entropy), and they never touch a denominator, so what a
mask zeroes still counts. The ratio that PPO clips stays policy / anchor: with the ratio to the rollout *and*
weights the difference would count twice (Hilton et al. 2021, arXiv 2110.00641).

Owns: the types. Does not own: their default limits (the config).
Legend: B responses, T response tokens. k: probability under the trainer over that under the engine.

type               k of                        weight
off                a token                     1
token_truncate     a token                     min(k, max)                     truncated importance sampling
token_mask         a token                     k where min <= k <= max, else 0 IcePop, arXiv 2510.18855
sequence_truncate  a response: exp of the sum  min(k, max)
sequence_mask      a response: exp of the sum  k where min <= k <= max, else 0
geometric_mask     a response: exp of the mean k where min <= k <= max, else 0
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.objectives.kl import sequence_log_ratio
from stages.objectives.logprobs import bounded_exp
from stages.objectives.losses import limited_weights
from stages.objectives.masked import check_mask, zero_masked

CorrectionType = Literal[
    "off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionWeights:
    """Of every token; what is of a whole response stands at each of its tokens. 0 where masked."""

    ratios_BT: Tensor  # k, before the limits
    weights_BT: Tensor  # float32, without gradient: what multiplies the policy loss
    limited_BT: Tensor  # bool, True where k lies beyond the limits: truncated, or masked


@torch.no_grad()
def correction_weights(
    *,
    anchor_logprobs_BT: Tensor,
    rollout_logprobs_BT: Tensor,
    mask_BT: Tensor,
    kind: CorrectionType,
    min_weight: float,
    max_weight: float,
) -> CorrectionWeights:
    """The weights of one pack of responses under the correction `kind`.

    Both log-probs are at the temperature that was sampled at. NaN stays NaN: a step with it is not taken.
    ValueError unless 0 <= min_weight <= 1 <= max_weight, and min_weight is 0 where nothing masks.
    """
    check_mask(mask=mask_BT, anchor_logprobs_BT=anchor_logprobs_BT, rollout_logprobs_BT=rollout_logprobs_BT)
    level, _, beyond = kind.partition("_")
    log_k_BT = _log_ratio(level, anchor_logprobs_BT, rollout_logprobs_BT, mask_BT)
    ratios_BT = zero_masked(values=bounded_exp(log_k_BT), mask=mask_BT)
    if kind == "off":
        return CorrectionWeights(
            ratios_BT=ratios_BT,
            weights_BT=mask_BT.to(ratios_BT.dtype),
            limited_BT=torch.zeros_like(mask_BT),
        )
    limited = limited_weights(
        log_k_BT, min_weight, max_weight, "truncate" if beyond == "truncate" else "mask"
    )
    weights_BT = zero_masked(values=limited, mask=mask_BT)
    return CorrectionWeights(
        ratios_BT=ratios_BT, weights_BT=weights_BT, limited_BT=(weights_BT != ratios_BT) & mask_BT
    )


def _log_ratio(level: str, anchor_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log k [B, T] of tokens, or of the responses they belong to."""
    if level in ("off", "token"):
        return zero_masked(values=anchor_BT - rollout_BT, mask=mask_BT)
    log_k_B = sequence_log_ratio(
        policy_logprobs_BT=anchor_BT, reference_logprobs_BT=rollout_BT, mask_BT=mask_BT
    )
    if level == "geometric":
        log_k_B = log_k_B / mask_BT.sum(-1).clamp(min=1)
    return log_k_B[:, None].expand(mask_BT.shape)
