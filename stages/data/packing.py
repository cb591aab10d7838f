"""Packing: several sequences in one row, without padding and without seeing each other.

    lengths --plan_packs--> PackPlan --pack--> PackedRow --model--> per-token values --split--> per sequence

Legend: N tokens of one packed row, S sequences in it.

The forward is always `model(**row.model_inputs())`: position ids that restart per sequence,
attention_mask=None and use_cache=False, on which transformers builds the block-diagonal mask itself (with a
cache it silently drops it), and the lengths, by which our models attend instead. Masks come from lengths,
never from comparing ids with a pad id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """Sequences laid end to end in one row.

    Example: pack([[7, 8, 9], [5, 6]]) -> input_ids_1N [[7, 8, 9, 5, 6]], position_ids_1N [[0, 1, 2, 0, 1]],
    starts (0, 3), lengths (3, 2).
    """

    input_ids_1N: Tensor  # int64 (1, N)
    position_ids_1N: Tensor  # int64 (1, N), restarting at 0 with every sequence
    starts: tuple[int, ...]  # first token of each sequence
    lengths: tuple[int, ...]  # tokens of each sequence

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.input_ids_1N.shape[1])

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of every forward on this row."""
        return {
            "input_ids": self.input_ids_1N,
            "position_ids": self.position_ids_1N,
            "attention_mask": None,
            "use_cache": False,
            "sequence_lengths": self.lengths,  # read by training.packed_attention alone
        }

    def to(self, device: torch.device | str) -> "PackedRow":
        """The same row on another device."""
        return PackedRow(
            input_ids_1N=self.input_ids_1N.to(device),
            position_ids_1N=self.position_ids_1N.to(device),
            starts=self.starts,
            lengths=self.lengths,
        )

    def split(self, values_N: Tensor) -> list[Tensor]:
        """Per-token values (N, ...) as S views, one per sequence: values, hidden states, log-probs."""
        return split(values_N, self.lengths)

    def last_tokens(self) -> Tensor:
        """int64 (S,): the index of each sequence's last token: where a reward model reads."""
        ends = [start + length - 1 for start, length in zip(self.starts, self.lengths, strict=True)]
        return torch.tensor(ends, device=self.input_ids_1N.device)


def pack(sequences: Sequence[Sequence[int]]) -> PackedRow:
    """Lay non-empty sequences of token ids end to end in one row."""
    lengths = tuple(len(sequence) for sequence in sequences)
    assert lengths and min(lengths) > 0, "a pack holds at least one sequence, and no empty one"
    starts = tuple(sum(lengths[:index]) for index in range(len(lengths)))
    return PackedRow(
        input_ids_1N=torch.tensor(
            [[int(token) for sequence in sequences for token in sequence]], dtype=torch.int64
        ),
        position_ids_1N=torch.cat([torch.arange(length) for length in lengths])[None],
        starts=starts,
        lengths=lengths,
    )


def split(values_N: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Per-token values (N, ...) as views of the given lengths."""
    assert values_N.shape[0] == sum(lengths), f"{values_N.shape[0]} values for {sum(lengths)} tokens"
    return list(torch.split(values_N, list(lengths)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """Who shares a row: each pack is a tuple of sequence indices; every index is in exactly one pack."""

    packs: tuple[tuple[int, ...], ...]


def plan_packs(lengths: Sequence[int], micro_batch_size: int) -> PackPlan:
    """ceil(S / micro_batch_size) packs of at most micro_batch_size sequences, token counts about equal.

    Longest first into the pack with the fewest tokens that has room; ties by index, so deterministic.
    """
    num_packs = -(-len(lengths) // micro_batch_size)
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    tokens = [0] * num_packs
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = min(
            (p for p in range(num_packs) if len(packs[p]) < micro_batch_size), key=lambda p: (tokens[p], p)
        )
        packs[target].append(index)
        tokens[target] += lengths[index]
    return PackPlan(packs=tuple(tuple(sorted(members)) for members in packs))
