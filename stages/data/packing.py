"""Packing: several sequences in one row, without padding and without seeing each other.

    lengths --plan_packs--> PackPlan --pack--> PackedRow --model--> per-token values --split--> per sequence

Legend: N tokens of one packed row, S sequences in it. Who shares a row is planned in pack_plans.

The forward is always `model(**row.model_inputs())`: position ids that restart per sequence,
attention_mask=None and use_cache=False, on which transformers builds the block-diagonal mask itself (with a
cache it silently drops it), and the lengths, by which our models attend instead. Masks come from lengths,
never from comparing ids with a pad id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from stages.data.pack_plans import PackPlan, best_fit, plan_packs, utilisation

__all__ = [
    "PackPlan",
    "PackedRow",
    "best_fit",
    "pack",
    "packed_row",
    "plan_packs",
    "split",
    "utilisation",
]


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
    ids = [int(token) for sequence in sequences for token in sequence]
    return packed_row(torch.tensor(ids, dtype=torch.int64), [len(sequence) for sequence in sequences])


def packed_row(ids_N: Tensor, lengths: Sequence[int]) -> PackedRow:
    """The row of `ids_N` (int64), in which sequences of these lengths lie end to end already."""
    assert lengths and min(lengths) > 0, "a pack holds at least one sequence, and no empty one"
    assert len(ids_N) == sum(lengths), f"{len(ids_N)} ids for {sum(lengths)} tokens"
    starts = tuple(accumulate(lengths, initial=0))[:-1]
    starts_N = torch.tensor(starts).repeat_interleave(torch.tensor(lengths))
    return PackedRow(
        input_ids_1N=ids_N[None],
        position_ids_1N=(torch.arange(len(ids_N)) - starts_N)[None],
        starts=starts,
        lengths=tuple(lengths),
    )


def split(values_N: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Per-token values (N, ...) as views of the given lengths."""
    assert values_N.shape[0] == sum(lengths), f"{values_N.shape[0]} values for {sum(lengths)} tokens"
    return list(torch.split(values_N, list(lengths)))
