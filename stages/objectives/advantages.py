"""From a reward model's scores to advantages and returns.

    raw scores --normalise--> --clip--> process_scores
        --missing EOS--> end_responses --score on the last token, -beta k1 on every token--> token_rewards
        --GAE--> advantages, returns --masked.masked_whiten, advantages only--> the losses

That order is the only one: the clip bounds the score and never the KL penalty, and returns are taken before
whitening.

Owns: the numbers a rollout is judged by; nothing here carries a gradient. Does not own: the models, nor
whitening.

Legend: B sequences, T response tokens. Right-padded [B, T] with a boolean mask_BT: True on the tokens the
policy sampled and is to learn from. False may also stand inside a response (tool output): the result is then
that of the sequence with those tokens cut out. A row that is all False is inert.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.objectives.masked import check_mask, widened, zero_masked

MissingEos = Literal["penalty", "mask", "bootstrap"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseEnds:
    """How each response ends once the rule for truncated ones is applied; read by all that follows."""

    scores_B: Tensor  # score units, on the last token
    mask_BT: Tensor  # bool; a row dropped by "mask" is all False: it leaves numerator and count of every loss
    final_values_B: Tensor  # value of the state after the last token: 0 after EOS


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Both 0 where the mask is False."""

    advantages_BT: Tensor  # not whitened
    returns_BT: Tensor  # advantages + values: what the value model learns


@torch.no_grad()
def process_scores(*, raw_scores_B: Tensor, mean: float, std: float, clip: float | None) -> Tensor:
    """(raw - mean) / std, then clipped to +-clip (None: not), in float32.

    Dividing by std rescales beta: a `kl_coef` is per normalised score. mean 0 and std 1 leave the score as it
    is. ValueError unless std and clip are > 0.
    """
    if not std > 0:
        raise ValueError(f"the score's std must be > 0, got {std}: the reward model tells no responses apart")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0 or None, got {clip}")
    scores_B = (widened(raw_scores_B) - mean) / std
    return scores_B if clip is None else scores_B.clamp(-clip, clip)


@torch.no_grad()
def end_responses(
    *,
    scores_B: Tensor,
    mask_BT: Tensor,
    truncated_B: Tensor,
    missing_eos: MissingEos,
    penalty: float | None,
    last_values_B: Tensor | None,
) -> ResponseEnds:
    """Apply the configured rule to the responses cut off (`truncated_B`, bool: finish reason "length").

    penalty    their score loses `penalty` (>= 0, in units of the processed score); V after the end is 0.
    mask       their rows leave the mask, hence every numerator and every count.
    bootstrap  `last_values_B`, the value of the state after the last token, stands in
               for the score an unfinished response has not got: score 0, V after the end is that value.

    What the rule has no use for is ignored and may be None. ValueError when what it needs is missing.
    """
    check_mask(mask=mask_BT)
    check_mask(mask=truncated_B, scores_B=scores_B, the_rows_of_mask_BT=mask_BT.any(-1))
    nothing_B = torch.zeros_like(scores_B)
    if missing_eos == "penalty":
        if penalty is None or not penalty >= 0:
            raise ValueError(f'missing_eos "penalty" needs a penalty >= 0, got {penalty}')
        scores_B = torch.where(truncated_B, scores_B - penalty, scores_B)
        return ResponseEnds(scores_B=scores_B, mask_BT=mask_BT, final_values_B=nothing_B)
    if missing_eos == "mask":
        mask_BT = mask_BT & ~truncated_B[:, None]
        return ResponseEnds(scores_B=scores_B, mask_BT=mask_BT, final_values_B=nothing_B)
    if missing_eos == "bootstrap":
        if last_values_B is None:
            raise ValueError('missing_eos "bootstrap" needs last_values_B, the values at the last tokens')
        final_values_B = torch.where(truncated_B, last_values_B, nothing_B)
        scores_B = torch.where(truncated_B, nothing_B, scores_B)
        return ResponseEnds(scores_B=scores_B, mask_BT=mask_BT, final_values_B=final_values_B)
    raise ValueError(f"no rule {missing_eos!r} for a missing EOS; there are penalty, mask, bootstrap")


@torch.no_grad()
def token_rewards(
    *,
    scores_B: Tensor,
    anchor_logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor | None,
    mask_BT: Tensor,
    kl_coef: float,
) -> Tensor:
    """rewards_BT: -kl_coef * k1 on every response token, plus the score on the last one; 0 where masked.

    Summed over a response: score - kl_coef * KL(sequence). `reference_logprobs_BT` may be None at kl_coef 0
    (no reference forward); ValueError otherwise. Source: InstructGPT (arXiv 2203.02155), eq. 2; Ziegler et
    al. 2019.
    """
    check_mask(mask=mask_BT, anchor_logprobs_BT=anchor_logprobs_BT)
    check_mask(mask=mask_BT.any(-1), scores_B=scores_B)
    last_BT = last_token_mask(mask_BT=mask_BT)
    rewards_BT = torch.where(last_BT, scores_B[:, None], torch.zeros_like(anchor_logprobs_BT))
    if kl_coef == 0:
        return rewards_BT
    if reference_logprobs_BT is None:
        raise ValueError(f"kl_coef is {kl_coef} and there are no reference log-probs")
    k1_BT = zero_masked(values=anchor_logprobs_BT - reference_logprobs_BT, mask=mask_BT)
    return rewards_BT - kl_coef * k1_BT


def last_token_mask(*, mask_BT: Tensor) -> Tensor:
    """bool [B, T], True on the last True of each row; an all-False row stays so."""
    check_mask(mask=mask_BT)
    num_after_BT = mask_BT.flip(-1).cumsum(-1).flip(-1)
    return mask_BT & (num_after_BT == 1)


@torch.no_grad()
def gae(
    *,
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    final_values_B: Tensor,
    gamma: float,
    lam: float,
) -> Advantages:
    """Generalised advantage estimation over the True positions of each row, and its returns.

        delta_t = r_t + gamma V_{t+1} - V_t         A_t = delta_t + gamma lam A_{t+1}         R_t = A_t + V_t

    Boundary: after the last True, V = `final_values_B` (0 after EOS) and A = 0. `values_BT[:, t]` is the
    value before token t, read where the token is predicted. t+1 is the next True, so masked spans inside a
    response are skipped, not discounted. gamma = lam = 1 gives A = return - value. ValueError unless gamma
    and lam are in 0..1.
    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16.
    """
    check_mask(mask=mask_BT, rewards_BT=rewards_BT, values_BT=values_BT)
    check_mask(mask=mask_BT.any(-1), final_values_B=final_values_B)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must be in 0..1, got {gamma} and {lam}")
    rewards_BT, values_BT = widened(rewards_BT), widened(values_BT)
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B, next_advantage_B = widened(final_values_B), torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(mask_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        next_value_B = torch.where(mask_BT[:, t], values_BT[:, t], next_value_B)
        next_advantage_B = torch.where(mask_BT[:, t], advantage_B, next_advantage_B)
        advantages_BT[:, t] = torch.where(mask_BT[:, t], advantage_B, 0)
    returns_BT = zero_masked(values=advantages_BT + values_BT, mask=mask_BT)
    return Advantages(advantages_BT=advantages_BT, returns_BT=returns_BT)
