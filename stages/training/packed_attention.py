"""Attention over a packed row, one sequence at a time: the numbers of transformers' block-diagonal mask.

    model(**row.model_inputs()) -> each layer: split, causal SDPA, join

With the mask, sdpa computes all N x N scores of a row of N tokens and throws most away. Measured on two
(shared) CPU cores, forward and backward, mask against this: the demo's model with 16 sequences of 60 tokens
2.1-2.3 times as long, of 256 tokens 5.2-6.3 times; two layers of SmolLM2's size with 16 sequences of 300
tokens 5.7-9.9 times. Without `sequence_lengths` the forward is plain sdpa, mask and all, so that the same
model also runs padded and in `generate`.
"""

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
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, sdpa_mask)
    return PACKED_ATTENTION


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
