"""Masked sums, means, statistics and whitening: the only place that knows what "over the real tokens" means.

    values, mask --> [sum, count] --sum_over_ranks--> mean --> squares --sum_over_ranks--> std --> whitened

Owns: reductions under a boolean mask, and moving ragged values [N] to padded [B, T] and back. Does not own:
which tokens are real (the caller's lengths say that, never a comparison with a pad id), nor
torch.distributed: a caller with several ranks passes `sum_over_ranks`, and every rank must then call, even
one whose mask is empty.

Legend: B sequences, T response tokens (padded), N response tokens (concatenated). Masks are torch.bool and
have exactly the shape of what they mask: nothing broadcasts. What stands under a False is irrelevant, NaN
included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]
"""Takes this rank's tensor, returns the elementwise sum over all ranks (an all-reduce; may work in place)."""

WHITEN_EPS = 1e-8  # added to the variance, as in lm-human-preferences (Ziegler et al. 2019, `whiten`)


def on_one_rank(local: Tensor) -> Tensor:
    """The `sum_over_ranks` of a world of one."""
    return local


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedStats:
    """Moments over the True positions, all ranks together; zeros where there are none."""

    count: Tensor  # scalar float64, positions
    mean: Tensor  # scalar float64
    std: Tensor  # scalar float64, population (divided by count, so one token has 0 and not NaN)


def check_mask(*, mask: Tensor, **tensors: Tensor) -> None:
    """Raise TypeError unless `mask` is boolean, ValueError naming the tensor whose shape is not the mask's.

    An integer mask selects rows when it indexes, a float one may be an importance weight, and [B] against [B,
    T] broadcasts to a wrong answer: the three are refused here, once.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, got {mask.dtype}; build it from lengths with length_mask")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its mask {tuple(mask.shape)}")


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 if it is so already: no loss is computed in 16 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def zero_masked(*, values: Tensor, mask: Tensor) -> Tensor:
    """`values` with zeros where `mask` is False. No gradient, and no NaN, passes a False."""
    check_mask(mask=mask, values=values)
    return torch.where(mask, values, torch.zeros_like(values))


def masked_sum(*, values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` (any shape) where `mask` (same shape) is True; a scalar."""
    return zero_masked(values=values, mask=mask).sum()


@torch.no_grad()
def masked_stats(*, values: Tensor, mask: Tensor, sum_over_ranks: SumOverRanks = on_one_rank) -> MaskedStats:
    """Moments of `values` (any shape) where `mask` is True, over all ranks.

    Two passes in float64 (mean first, then squared deviations from it): no cancellation. Two all-reduces.
    """
    kept = zero_masked(values=values, mask=mask).double()
    total, count = sum_over_ranks(torch.stack([kept.sum(), mask.sum().double()])).unbind()
    mean = total / count.clamp(min=1)
    squares = sum_over_ranks(((kept - mean).square() * mask).sum())
    return MaskedStats(count=count, mean=mean, std=(squares / count.clamp(min=1)).sqrt())


@torch.no_grad()
def masked_whiten(
    *, values: Tensor, mask: Tensor, shift_mean: bool, sum_over_ranks: SumOverRanks = on_one_rank
) -> Tensor:
    """`values` (any shape) scaled to unit variance over all ranks' True positions; 0 where masked.

    With `shift_mean` the mean becomes 0 (advantages); without, it stays (rewards). A single token, or equal
    ones, give 0 (their mean, without `shift_mean`), never NaN. Call once per rollout batch, never per
    minibatch.
    Source: "The N Implementation Details of RLHF with PPO" (2023), detail on whitening.
    """
    stats = masked_stats(values=values, mask=mask, sum_over_ranks=sum_over_ranks)
    whitened = (values.double() - stats.mean) * (stats.std.square() + WHITEN_EPS).rsqrt()
    if not shift_mean:
        whitened = whitened + stats.mean
    return zero_masked(values=whitened, mask=mask).to(values.dtype)


def length_mask(*, lengths: Sequence[int], max_length: int, device: torch.device | str) -> Tensor:
    """mask_BT, True on the first `lengths[b]` of `max_length` columns. ValueError: a length not in 0..max."""
    if any(not 0 <= length <= max_length for length in lengths):
        raise ValueError(f"lengths must be in 0..{max_length}, got {min(lengths)}..{max(lengths)}")
    lengths_B = torch.tensor(lengths, dtype=torch.int64, device=device)
    return torch.arange(max_length, device=device) < lengths_B[:, None]


def pad_ragged(*, values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """values_BT: the values laid into the True positions row by row, zeros elsewhere; differentiable.

    ValueError unless N is the number of True positions. `values_BT[mask_BT]` is the way back.
    """
    check_mask(mask=mask_BT)
    if values_N.shape != (int(mask_BT.sum()),):
        raise ValueError(
            f"{tuple(values_N.shape)} values for a mask with {int(mask_BT.sum())} True positions"
        )
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)
