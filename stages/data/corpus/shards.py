"""Token shards: prepare writes them, pretrain and evaluate memory-map them. Neither needs Ray or torch.

    documents --row packer--> rows of segments --write_shards--> files --TokenShards.row--> trainer

    train-00000.bin ...    token ids, little endian, whole rows of context_length slots
    segment_lengths.bin    tokens of every segment of every row, one after another
    segment_offsets.bin    uint64 (rows + 1): where each row's lengths begin in segment_lengths.bin
    heldout.bin            ids of the held-out documents, one after another, a separator at both ends of each
    heldout_lengths.bin    uint32, tokens of each of them
    index.json             dtypes, packing, context_length, separator, rows, tokens, slots, utilisation; bytes
                           and blake3 of every file above

Padding is in no segment: the reader leaves it out, so it is neither attended nor a target, nor does it go
through the model. Needs numpy only. Owns the layout of the files; does not own what a row holds
(row_packers), the text or the tokenizer.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3

from rollout.ground.whole import Measured, holds
from stages.data.corpus.row_packers import PACKERS, Packing, Row, TokenIds, between, separated
from stages.errors import DataError

FORMAT = 2
"""Of the layout; a reader refuses any other."""
INDEX, HELDOUT, HELDOUT_LENGTHS = "index.json", "heldout.bin", "heldout_lengths.bin"
SEGMENT_LENGTHS, SEGMENT_OFFSETS = "segment_lengths.bin", "segment_offsets.bin"
OFFSET_DTYPE, DOCUMENT_LENGTH_DTYPE = np.dtype("<u8"), np.dtype("<u4")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCounts:
    """What was written. Separators count as tokens, padding does not."""

    rows: int
    tokens_train: int  # in rows, repeated ones too
    tokens_text: int  # of the training documents themselves: no separators, nothing twice, dropped ones too
    tokens_dropped: int  # concat: the last, partial row
    tokens_repeated: int  # best_fit, bucket: in the piece or chunk before as well
    tokens_heldout: int
    utilisation: float  # tokens per slot of the rows; 0 without a row


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row as a trainer reads it.

    Example: `0 5 6 0 7 0 8 9` under concat, separator 0 -> lengths (3, 2, 3), all but the first a target;
    `0 5 6 0 0 7 0` under best_fit -> lengths (4, 3), all but the first and the fifth.
    """

    ids: np.ndarray  # int64 (tokens,): without the padding
    lengths: tuple[int, ...]  # tokens of each segment; their sum is len(ids)
    is_target: np.ndarray  # bool (tokens,): the tokens to predict, each from the one before it


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_shards(
    directory: Path,
    documents: Iterable[TokenIds],
    heldout: Iterable[TokenIds],
    *,
    packing: Packing,
    separator_id: int,
    vocab_size: int,
    context_length: int,
    shard_tokens: int,
) -> ShardCounts:
    """Write the shards of `documents` (token ids without separators), those of `heldout`, then index.json.

    Both are read once, in order, `documents` first; memory is bounded by a window of pieces or by a row per
    chunk length, however many they are, and the bytes are a function of the arguments. Shards hold whole
    rows, shard_tokens slots at most (but one row at least).
    """
    dtype = token_dtype(vocab_size)
    counts: Counter[str] = Counter()
    ready = separated(documents, separator_id, dtype, counts, closed=packing != "concat")
    train = _TrainFiles(
        directory,
        slots_per_row=context_length,
        rows_per_shard=max(1, shard_tokens // context_length),
        dtype=dtype,
        padding_id=separator_id,
    )
    with train:
        for row in PACKERS[packing](ready, context_length, counts):
            train.add(row)
    heldout_entry = _write_heldout(directory, heldout, separator_id, dtype)
    index = {
        "format": FORMAT,
        "packing": packing,
        "dtype": dtype.str,
        "context_length": context_length,
        "vocab_size": vocab_size,
        "separator_id": separator_id,
        "rows": train.rows,
        "tokens": train.tokens,
        "slots": train.slots,
        "utilisation": train.utilisation,
        "shards": train.shards,
        "segments": train.segments,
        "heldout": heldout_entry,
    }
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return ShardCounts(
        rows=train.rows,
        tokens_train=train.tokens,
        tokens_text=counts["text"],
        tokens_dropped=counts["dropped"],
        tokens_repeated=counts["repeated"],
        tokens_heldout=heldout_entry["tokens"],
        utilisation=train.utilisation,
    )


class _WrittenFile:
    """A file that is written in order, and what the index says of it."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._stream: BinaryIO = path.open("wb")
        self._hasher = blake3()
        self._bytes = 0

    def write(self, numbers: np.ndarray) -> None:
        data = numbers.tobytes()
        self._stream.write(data)
        self._hasher.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, Any]:
        self._stream.close()
        return {"file": self._name, "bytes": self._bytes, "blake3": self._hasher.hexdigest()}


class _TrainFiles:
    """Shards and segments while they are written; afterwards `shards` and `segments` hold their entries."""

    def __init__(
        self, directory: Path, *, slots_per_row: int, rows_per_shard: int, dtype: np.dtype, padding_id: int
    ) -> None:
        self.rows = self.tokens = 0
        self.shards: list[dict[str, Any]] = []
        self.segments: dict[str, Any] = {}
        self._directory = directory
        self._rows_per_shard = rows_per_shard
        self._padding = np.full(slots_per_row, padding_id, dtype)
        self._shard: _WrittenFile | None = None
        self._shard_rows = self._shard_tokens = 0
        self._length_dtype = np.dtype("<u2" if slots_per_row < 2**16 else "<u4")
        self._num_segments = 0

    @property
    def slots(self) -> int:
        """Of all rows."""
        return self.rows * len(self._padding)

    @property
    def utilisation(self) -> float:
        """Tokens per slot; 0 without a row."""
        return self.tokens / self.slots if self.rows else 0.0

    def __enter__(self) -> "_TrainFiles":
        self._lengths = _WrittenFile(self._directory / SEGMENT_LENGTHS)
        self._offsets = _WrittenFile(self._directory / SEGMENT_OFFSETS)
        self._offsets.write(np.zeros(1, OFFSET_DTYPE))
        return self

    def __exit__(self, *_: object) -> None:
        self._close_shard()
        self.segments = {
            "dtype": self._length_dtype.str,
            "lengths": self._lengths.close(),
            "offsets": self._offsets.close(),
        }

    def add(self, row: Row) -> None:
        if self._shard is None:
            self._shard = _WrittenFile(self._directory / f"train-{len(self.shards):05d}.bin")
        self._shard.write(row.ids)
        self._shard.write(self._padding[len(row.ids) :])
        self._lengths.write(np.array(row.lengths, self._length_dtype))
        self._num_segments += len(row.lengths)
        self._offsets.write(np.array([self._num_segments], OFFSET_DTYPE))
        self.rows, self._shard_rows = self.rows + 1, self._shard_rows + 1
        self.tokens, self._shard_tokens = self.tokens + len(row.ids), self._shard_tokens + len(row.ids)
        if self._shard_rows == self._rows_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        self.shards.append({**self._shard.close(), "rows": self._shard_rows, "tokens": self._shard_tokens})
        self._shard, self._shard_rows, self._shard_tokens = None, 0, 0


def _write_heldout(
    directory: Path, heldout: Iterable[TokenIds], separator_id: int, dtype: np.dtype
) -> dict[str, Any]:
    """The index's entry of the held-out documents."""
    ids_file, lengths_file = _WrittenFile(directory / HELDOUT), _WrittenFile(directory / HELDOUT_LENGTHS)
    tokens = documents = 0
    for ids in heldout:
        document = between(ids, separator_id, dtype)
        ids_file.write(document)
        lengths_file.write(np.array([len(document)], DOCUMENT_LENGTH_DTYPE))
        tokens, documents = tokens + len(document), documents + 1
    return {
        "tokens": tokens,
        "documents": documents,
        "ids": ids_file.close(),
        "lengths": lengths_file.close(),
    }


class TokenShards:
    """The training rows of a prepare artifact, memory-mapped. DataError for files that are not whole."""

    context_length: int  # slots per row
    packing: Packing
    vocab_size: int  # every id is below it
    separator_id: int

    def __init__(self, directory: Path) -> None:
        index = _read_index(directory)
        self.context_length = index["context_length"]
        self.packing = index["packing"]
        self.vocab_size = index["vocab_size"]
        self.separator_id = index["separator_id"]
        self._shards = [_mapped(directory, shard, index["dtype"]) for shard in index["shards"]]
        segments = index["segments"]
        self._lengths = _mapped(directory, segments["lengths"], segments["dtype"])
        self._offsets = _mapped(directory, segments["offsets"], OFFSET_DTYPE)
        rows = [len(shard) // self.context_length for shard in self._shards]
        self._ends = np.cumsum(rows, dtype=np.int64)  # rows up to and including each shard
        if len(self._offsets) != len(self) + 1 or int(self._offsets[-1]) != len(self._lengths):
            raise DataError(
                f"{directory / SEGMENT_OFFSETS}: does not belong to these shards; run rlhf prepare again"
            )

    def __len__(self) -> int:
        """Rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> TokenRow:
        """Row `index`."""
        lengths = self._segments_of(index)
        tokens = int(lengths.sum())
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - (int(self._ends[number - 1]) if number else 0)) * self.context_length
        is_target = np.ones(tokens, bool)
        is_target[self._untrained(lengths)] = False
        return TokenRow(
            ids=self._shards[number][start : start + tokens].astype(np.int64),
            lengths=tuple(lengths.tolist()),
            is_target=is_target,
        )

    def num_tokens(self, index: int) -> int:
        """How many tokens row `index` has, from the lengths alone."""
        return int(self._segments_of(index).sum())

    def num_targets(self, index: int) -> int:
        """How many tokens of row `index` are targets, from the lengths alone."""
        lengths = self._segments_of(index)
        return int(lengths.sum()) - len(self._untrained(lengths))

    def _segments_of(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._lengths[int(self._offsets[index]) : int(self._offsets[index + 1])].astype(np.int64)

    def _untrained(self, lengths: np.ndarray) -> np.ndarray:
        """Places in a row that nothing predicts: the first token of each segment - under concat of the first
        one, because the others begin with the separator that ends the document before.
        """
        starts = np.cumsum(lengths) - lengths
        return starts[:1] if self.packing == "concat" else starts


def heldout_sequences(directory: Path, max_tokens: int) -> list[np.ndarray]:
    """Held-out documents as int64 arrays of 2..max_tokens ids; perplexity predicts all but each first one.

    A document is `separator, its ids, separator`; a longer one is cut into windows that overlap by one token,
    so that every token of every document is predicted exactly once whatever max_tokens is. DataError for
    files that are not whole.
    """
    assert max_tokens >= 2, "a window predicts at least one token"
    index = _read_index(directory)
    tokens = _mapped(directory, index["heldout"]["ids"], index["dtype"])
    lengths = _mapped(directory, index["heldout"]["lengths"], DOCUMENT_LENGTH_DTYPE)
    starts = np.cumsum([0, *lengths.tolist()])
    windows = []
    for first, end in pairwise(starts):
        windows += [
            tokens[at : min(at + max_tokens, end)].astype(np.int64)
            for at in range(first, end - 1, max_tokens - 1)
        ]
    return windows


def check_digests(directory: Path) -> None:
    """DataError when a file's bytes are not those that were written. Reads all of them: for trainers outside
    a run of the pipeline, which checks its artifacts itself.
    """
    index = _read_index(directory)
    entries = [*index["shards"], index["segments"]["lengths"], index["segments"]["offsets"]]
    for entry in [*entries, index["heldout"]["ids"], index["heldout"]["lengths"]]:
        measured = Measured(size=entry["bytes"], blake3=entry["blake3"])
        if not holds(_whole_file(directory, entry), measured):
            raise DataError(
                f"{directory / entry['file']}: not the bytes that were written; run rlhf prepare again"
            )


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a directory that rlhf prepare wrote")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); run rlhf prepare again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path}: not an index of format {FORMAT}; run rlhf prepare of this version")
    return index


def _whole_file(directory: Path, entry: dict[str, Any]) -> Path:
    """The path of an index entry. DataError when its size is not the index's."""
    path = directory / entry["file"]
    size = path.stat().st_size if path.is_file() else None
    if size != entry["bytes"]:
        found = "no such file" if size is None else f"{size} bytes"
        raise DataError(
            f"{path}: {found}, where {INDEX} says {entry['bytes']} bytes; copy it again, or run rlhf prepare"
        )
    return path


def _mapped(directory: Path, entry: dict[str, Any], dtype: np.dtype | str) -> np.ndarray:
    """The numbers of a file, read when they are looked at."""
    path = _whole_file(directory, entry)
    return np.memmap(path, dtype, mode="r") if entry["bytes"] else np.zeros(0, dtype)
