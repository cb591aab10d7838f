"""Attention over a packed row, one sequence at a time: the numbers of transformers' block-diagonal mask.

    model(**row.model_inputs()) -> each layer: split, causal SDPA, join

With the mask, sdpa computes all N x N scores of a row of N tokens and throws most away. Measured on two
(shared) CPU cores, forward and backward, mask against this: the demo's model with 16 sequences of 60 tokens
2.1-2.3 times as long, of 256 tokens 5.2-6.3 times; two layers of SmolLM2's size with 16 sequences of 300
tokens 5.7-9.9 times. The mask itself is not built either (`no_unread_mask`). Without `sequence_lengths` the
forward is plain sdpa, mask and all, so that the same model also runs padded and in `generate`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

PACKED_ATTENTION = "packed_sdpa"
"""`attn_implementation` of models that are given `sequence_lengths`."""


def register_packed_attention() -> str:
    """Make PACKED_ATTENTION known to transformers in this process; returns the name."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, _mask_where_it_is_read)
    return PACKED_ATTENTION


_has_lengths: ContextVar[bool] = ContextVar("_has_lengths", default=False)


@contextmanager
def no_unread_mask(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Around a forward on `inputs`: where they have lengths, no layer but those with a sliding window reads
    the mask, so transformers, which makes it before it comes to the layers, need not. For a row of N tokens
    it has N x N bytes: of 16,384 tokens 256 MiB and 0.8 s of one core, in each forward.
    """
    token = _has_lengths.set(inputs.get("sequence_lengths") is not None)
    try:
        yield
    finally:
        _has_lengths.reset(token)


def _mask_where_it_is_read(**options: Any) -> Tensor | None:
    """transformers' mask interface; `local_size` is there for a sliding window."""
    if _has_lengths.get() and options.get("local_size") is None:
        return None
    return sdpa_mask(**options)


def packed_attention(
    module: nn.Module,
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KND: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, N, H, D) for H query heads of width D, and no weights.

    Layers with a sliding window keep the mask, which knows it.
    """
    if sequence_lengths is None or sliding_window is not None:
        return sdpa_attention_forward(
            module,
            query_1HND,
            key_1KND,
            value_1KND,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    assert query_1HND.shape[2] == key_1KND.shape[2] == sum(sequence_lengths), "packed rows have no cache"
    parts = (part.split(list(sequence_lengths), dim=2) for part in (query_1HND, key_1KND, value_1KND))
    grouped = query_1HND.shape[1] != key_1KND.shape[1]
    outputs = [
        scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
        )
        for query, key, value in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None
