"""Attention over a packed row, one sequence at a time: the numbers of transformers' eager attention.

    CausalLM | TokenScorer --packed(inputs)--> transformers makes the mask: the lengths, instead of N x N
        --attention_mask--> each layer: split by lengths, causal attention, join

With a real mask, sdpa computes all N x N scores of a row of N tokens and throws most away. Measured on two
(shared) CPU cores, forward and backward, mask against this: the demo's model with 16 sequences of 60 tokens
2.1-2.3 times as long, of 256 tokens 5.2-6.3 times; two layers of SmolLM2's size with 16 sequences of 300
tokens 5.7-9.9 times. The lengths take the mask's place as an argument, so they reach every layer that reads a
mask, in the recomputation of gradient checkpointing too. A layer that gets none is an error. What attention
is asked for (scaling, softcap, sinks, sliding windows) is computed or refused, here and without lengths:
padded rows and `generate` run on the same model.

Owns: what attention computes. Does not own: layers that mix tokens without attention (packing_probe), limits
that a config states (model_rules). Legend: N tokens of a row, L of one sequence, H query heads, K heads of
keys and values, D width of a head.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from stages.errors import ModelError
from stages.objectives.masked import widened

PACKED_ATTENTION = "packed"
"""`attn_implementation` of the models of training."""
UNREAD = frozenset(
    {
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",  # None: packed rows have no cache, and elsewhere the layer has updated it
        "position_ids",
        "return_dict",
        "sequence_lengths",
        "use_cache",
    }
)
"""What layers hand to attention besides, and no implementation of transformers reads."""


def register_packed_attention() -> str:
    """Make PACKED_ATTENTION known to transformers in this process; returns the name."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, _mask_of)
    return PACKED_ATTENTION


_row_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("_row_lengths", default=None)


@contextmanager
def packed(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Around a model's forward on what it yields: `inputs` (see `PackedRow.model_inputs`) without the
    lengths, which transformers then finds where it makes its masks. Inputs without lengths are padded rows.
    """
    lengths = inputs.get("sequence_lengths")
    token = _row_lengths.set(lengths)
    try:
        yield {name: value for name, value in inputs.items() if name != "sequence_lengths"}
    finally:
        _row_lengths.reset(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a layer asks of attention, beyond a mask."""

    scaling: float | None  # of the scores; None: 1 / sqrt(D)
    softcap: float | None  # scores become softcap * tanh(scores / softcap)
    sinks_H: Tensor | None  # a further score per head, whose share of the softmax goes nowhere
    dropout: float

    @property
    def is_plain(self) -> bool:
        """Whether sdpa computes it."""
        return self.softcap is None and self.sinks_H is None


def packed_attention(
    module: nn.Module,
    query_RHND: Tensor,
    key_RKND: Tensor,
    value_RKND: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (R, N, H, D) for R rows, and no weights. Raises ModelError for what
    it would have to leave out.
    """
    unknown = {name for name, value in others.items() if value is not None} - UNREAD
    if unknown:
        raise ModelError(f"its attention asks for {', '.join(sorted(unknown))}, which is not computed here")
    wanted = Wanted(scaling=scaling, softcap=softcap, sinks_H=s_aux, dropout=dropout)
    if _is_lengths(attention_mask):
        assert attention_mask is not None
        if position_bias is not None or is_causal is False:
            raise ModelError(
                "its attention is not causal or adds a bias by position, so rows cannot be packed"
            )
        return _by_lengths(query_RHND, key_RKND, value_RKND, attention_mask, sliding_window, wanted), None
    if _row_lengths.get() is not None:
        raise ModelError("its layers do not hand the mask of a packed row to their attention")
    if wanted.is_plain:
        return sdpa_attention_forward(
            module,
            query_RHND,
            key_RKND,
            value_RKND,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
        )
    if position_bias is not None or is_causal is False:
        raise ModelError(
            "its attention combines a softcap or sinks with a bias by position or no causal mask"
        )
    return _explicit(query_RHND, key_RKND, value_RKND, attention_mask, wanted).transpose(
        1, 2
    ).contiguous(), None


def _mask_of(**options: Any) -> Tensor | None:
    """transformers' mask interface. For a packed row int64 (1 + S): what bites in it (0: nothing; a window's
    size; less than 0: of what is no window), then the lengths of its S sequences; else sdpa's mask.

    `local_size` is there for windows and for chunks; which of them it is, the function of the mask tells. A
    mask may be made that no layer takes (qwen2_moe without windows), so it is for the layer to refuse it.
    """
    lengths = _row_lengths.get()
    if lengths is None:
        return sdpa_mask(**options)
    if options["use_vmap"] or "allow_is_bidirectional_skip" in options:
        raise ModelError("its mask is not that of causal attention, so sequences cannot be packed")
    local_size = options.get("local_size")
    if local_size is None or local_size >= max(lengths):
        return torch.tensor([0, *lengths])
    is_window = local_size > 0 and _is_window(
        options["mask_function"], local_size, lengths, options["device"]
    )
    return torch.tensor([local_size if is_window else -max(local_size, 1), *lengths])


def _is_window(
    mask_function: Callable[..., Tensor], size: int, lengths: Sequence[int], device: torch.device
) -> bool:
    """Whether each token of the longest sequence still sees the one `size` - 1 before it; of a chunk only the
    last token does.
    """
    longest = max(lengths)
    start = sum(lengths[: lengths.index(longest)])
    queries = torch.arange(start + size - 1, start + longest, device=device)
    first = torch.zeros_like(queries)
    return bool(mask_function(first, first, queries, queries - (size - 1)).all())


def _is_lengths(mask: Tensor | None) -> bool:
    """Whether `_mask_of` made it from lengths; a real mask is bool or a float, and has 4 dimensions."""
    return mask is not None and mask.ndim == 1 and mask.dtype == torch.int64


def _by_lengths(
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KND: Tensor,
    mask: Tensor,
    sliding_window: int | None,
    wanted: Wanted,
) -> Tensor:
    window, *lengths = mask.tolist()
    if window < 0:
        raise ModelError(
            f"its mask ends after {-window} tokens and is no window; set model.context_length: {-window}"
        )
    if window and sliding_window not in (None, window):
        raise ModelError(
            f"its mask has a window of {window} tokens and its attention asks for one of {sliding_window}"
        )
    assert query_1HND.shape[2] == key_1KND.shape[2] == sum(lengths), "packed rows have no cache"
    parts = (part.split(lengths, dim=2) for part in (query_1HND, key_1KND, value_1KND))
    outputs = [_causal(query, key, value, window, wanted) for query, key, value in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int, wanted: Wanted) -> Tensor:
    """Causal attention of one sequence (1, H, L, D), within its last `window` tokens where that is not 0."""
    length = query.shape[2]
    mask_LL = _within(length, window, query.device) if 0 < window < length else None
    if not wanted.is_plain:
        return _explicit(query, key, value, mask_LL, wanted)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask_LL,
        is_causal=mask_LL is None,
        scale=wanted.scaling,
        dropout_p=wanted.dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _within(length: int, window: int, device: torch.device) -> Tensor:
    """bool (L, L): a token sees itself and the `window` - 1 tokens before it."""
    mask_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask_LL.triu(1 - window)


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, wanted: Wanted) -> Tensor:
    """Attention (R, H, N, D) written out, for what sdpa has no argument: slow, and all scores at once, in
    fp32 where the inputs are bf16, as sdpa and vLLM keep them (bf16 rounds a score near 20 by up to 0.06).

    `mask`: bool or to be added; None: causal, the last query standing at the last key. Source: Gemma 2 (arXiv
    2408.00118), section 2: softcap; gpt-oss: sinks.
    """
    if wanted.dropout:
        raise ModelError("its attention combines dropout with a softcap or sinks")
    dtype = query.dtype
    query, key, value = widened(query), widened(key), widened(value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = 1 / math.sqrt(query.shape[-1]) if wanted.scaling is None else wanted.scaling
    scores = query @ key.transpose(2, 3) * scaling
    if wanted.softcap is not None:
        scores = wanted.softcap * torch.tanh(scores / wanted.softcap)
    if mask is None:
        num_queries, num_keys = scores.shape[-2:]
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(
            num_keys - num_queries
        )
    scores = (
        scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if mask.dtype == torch.bool
        else scores + mask.to(scores.dtype)
    )
    num_keys = scores.shape[-1]
    if wanted.sinks_H is not None:
        sinks = wanted.sinks_H.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., :num_keys]
    return (weights @ value).to(dtype)
