"""Token shards: prepare writes them, pretrain and evaluate memory-map them.

    train-00000.bin ...   token ids, little endian, whole rows of context_length
    heldout.bin           token ids of the held-out documents, one after another, each with a separator at both ends
    index.json            dtype, context_length, separator id, tokens per shard, lengths of the held-out documents

Needs numpy only. Owns the layout; does not own the text or the tokenizer.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


def write_shards(
    directory: Path,
    documents: Iterable[Sequence[int]],
    heldout: Iterable[Sequence[int]],
    *,
    separator_id: int,
    vocab_size: int,
    context_length: int,
    shard_tokens: int,
):
    """Write shards and index.json."""
    raise NotImplementedError


class TokenShards:
    """The training rows of a prepare artifact: `len(shards)` rows of `context_length` token ids, memory-mapped."""

    def __init__(self, directory: Path) -> None:
        self.context_length: int = 0
        self.vocab_size: int = 0
        self.separator_id: int = 0
        raise NotImplementedError

    def __len__(self) -> int:
        """Rows."""
        raise NotImplementedError

    def row(self, index: int) -> np.ndarray:
        """int64 (context_length,): row `index`."""
        raise NotImplementedError


def heldout_sequences(directory: Path, max_tokens: int) -> list[np.ndarray]:
    """Held-out documents as int64 arrays of 2..max_tokens ids, for perplexity: predict every token but each first one.

    A document is `separator, its ids, separator`; a longer one is cut into windows that overlap by one token, so that
    every token of every document is predicted exactly once whatever max_tokens is.
    """
    raise NotImplementedError
