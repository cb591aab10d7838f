"""Token shards: prepare writes them, pretrain and evaluate memory-map them.

    train-00000.bin ...   token ids, little endian, whole rows of context_length
    heldout.bin           ids of the held-out documents, one after another, each with a separator at both ends
    index.json            dtype, context_length, separator, tokens per shard, lengths of held-out documents

Needs numpy only. Owns the layout; does not own the text or the tokenizer.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

INDEX, HELDOUT = "index.json", "heldout.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCounts:
    """What was written."""

    tokens_train: int  # in whole rows
    tokens_dropped: int  # the last, partial row
    tokens_heldout: int  # separators included
    rows: int


def write_shards(
    directory: Path,
    documents: Iterable[Sequence[int]],
    heldout: Iterable[Sequence[int]],
    *,
    separator_id: int,
    vocab_size: int,
    context_length: int,
    shard_tokens: int,
) -> ShardCounts:
    """Write shards and index.json: `separator, ids, separator, ids, ..., separator`, cut into rows.

    Every document follows a separator, the first one too, so a model learns how documents begin. A row may
    hold several documents or a part of one; the last partial row is left out. Shards hold whole rows,
    shard_tokens at most (but one row at least).
    """
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    tokens_per_shard = max(1, shard_tokens // context_length) * context_length
    shards: list[dict[str, Any]] = []
    left = np.zeros(0, dtype)
    for block in _blocks(documents, separator_id, dtype, tokens_per_shard):
        left = np.concatenate([left, block])
        while len(left) >= tokens_per_shard:
            shards.append(_write(directory, len(shards), left[:tokens_per_shard]))
            left = left[tokens_per_shard:]
    whole = len(left) // context_length * context_length
    if whole:
        shards.append(_write(directory, len(shards), left[:whole]))
    lengths = []
    with (directory / HELDOUT).open("wb") as stream:
        for ids in heldout:
            stream.write(np.array([separator_id, *ids, separator_id], dtype).tobytes())
            lengths.append(len(ids) + 2)
    tokens = sum(shard["tokens"] for shard in shards)
    index = {
        "dtype": dtype.str,
        "context_length": context_length,
        "vocab_size": vocab_size,
        "separator_id": separator_id,
        "shards": shards,
        "tokens": tokens,
        "rows": tokens // context_length,
        "heldout": {"file": HELDOUT, "tokens": sum(lengths), "lengths": lengths},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return ShardCounts(
        tokens_train=tokens,
        tokens_dropped=len(left) - whole,
        tokens_heldout=sum(lengths),
        rows=tokens // context_length,
    )


def _blocks(
    documents: Iterable[Sequence[int]], separator_id: int, dtype: np.dtype, block_tokens: int
) -> Iterator[np.ndarray]:
    """The separated documents as arrays of about block_tokens."""
    block = [separator_id]
    for ids in documents:
        block += [*ids, separator_id]
        if len(block) >= block_tokens:
            yield np.array(block, dtype)
            block = []
    yield np.array(block, dtype)


def _write(directory: Path, number: int, tokens: np.ndarray) -> dict[str, Any]:
    name = f"train-{number:05d}.bin"
    (directory / name).write_bytes(tokens.tobytes())
    return {"file": name, "tokens": len(tokens)}


class TokenShards:
    """The training rows of a prepare artifact, memory-mapped: `len(shards)` rows of `context_length` ids."""

    context_length: int  # tokens per row
    vocab_size: int  # every id is below it
    separator_id: int

    def __init__(self, directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        self.context_length = index["context_length"]
        self.vocab_size = index["vocab_size"]
        self.separator_id = index["separator_id"]
        self._shards = [
            np.memmap(directory / shard["file"], index["dtype"], mode="r", shape=(shard["tokens"],))
            for shard in index["shards"]
        ]
        rows = [len(shard) // self.context_length for shard in self._shards]
        self._ends = np.cumsum(rows, dtype=np.int64)  # rows up to and including each shard

    def __len__(self) -> int:
        """Rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> np.ndarray:
        """int64 (context_length,): row `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - (int(self._ends[number - 1]) if number else 0)) * self.context_length
        return self._shards[number][start : start + self.context_length].astype(np.int64)


def heldout_sequences(directory: Path, max_tokens: int) -> list[np.ndarray]:
    """Held-out documents as int64 arrays of 2..max_tokens ids; perplexity predicts all but each first one.

    A document is `separator, its ids, separator`; a longer one is cut into windows that overlap by one token,
    so that every token of every document is predicted exactly once whatever max_tokens is.
    """
    assert max_tokens >= 2, "a window predicts at least one token"
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    tokens = np.fromfile(directory / index["heldout"]["file"], index["dtype"]).astype(np.int64)
    starts = np.cumsum([0, *index["heldout"]["lengths"]])
    windows = []
    for first, end in pairwise(starts):
        windows += [tokens[at : min(at + max_tokens, end)] for at in range(first, end - 1, max_tokens - 1)]
    return windows
