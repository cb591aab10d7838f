"""Blocks: the filtered documents of prepare as one list, and their token ids, block by block on the disk.

    blocks of filtering --Corpus--> document d: text, characters, digest
    block + tokenizer --encode_block--> 000007.tokens + .lengths + .encoded.json --documents--> ids

Owns: reading the files of filtered blocks, and the files of encoded ones. A record is written last, so a
killed run finds what is whole and makes the rest. Does not own: what passes (filtering), what is taken
(selection), the layout of the result (shards).
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from rollout.ground.whole import whole_record, write_record

CHARS_AT_ONCE = 2**21
"""Characters filtered or tokenised at once: bounds memory where one file is one block."""
MAX_OPEN_FILES = 64
T = TypeVar("T")


def batches(items: Iterator[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive items, some CHARS_AT_ONCE together."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= CHARS_AT_ONCE:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class Corpus:
    """The filtered blocks as one list of documents: document d of `len(corpus)` is `text(d)`."""

    def __init__(self, directory: Path, sizes: Sequence[int], sources: Sequence[int]) -> None:
        """`sizes`: documents of every block; `sources`: index of the source each block is of."""
        self.directory = directory
        self.starts = np.cumsum([0, *sizes], dtype=np.int64)  # first document of each block, and the end
        self._sources = np.array(sources, np.int64)

    def __len__(self) -> int:
        """Documents."""
        return int(self.starts[-1])

    @property
    def num_blocks(self) -> int:
        """Blocks, the empty ones too."""
        return len(self.starts) - 1

    @cached_property
    def source_of(self) -> np.ndarray:
        """int64 (D,): index of the source of every document."""
        return np.repeat(self._sources, np.diff(self.starts))

    @cached_property
    def digests(self) -> np.ndarray:
        """uint64 (D, 2): the first 16 bytes of the blake3 of every text."""
        return self._column("digests")

    @cached_property
    def chars(self) -> np.ndarray:
        """int64 (D,): characters of every text."""
        return self._column("chars")

    @property
    def shares(self) -> np.ndarray:
        """float64 (D,): `content_share` of every text."""
        return self.digests[:, 0] / 2.0**64

    def band(self, index: int) -> np.ndarray:
        """uint64 (D,): one LSH band's key of every document; a key is read from the disk each time."""
        sizes = np.diff(self.starts).tolist()
        return np.concatenate(
            [
                np.fromfile(
                    self.directory / f"{number:06d}.bands", np.uint64, count=size, offset=8 * size * index
                )
                for number, size in enumerate(sizes)
            ]
        )

    def text(self, document: int) -> str:
        """The text of one document, read from the disk."""
        number = int(np.searchsorted(self.starts, document, side="right")) - 1
        ends = self._ends(number)
        at = document - int(self.starts[number])
        start = int(ends[at - 1]) if at else 0
        return os.pread(self._file(number), int(ends[at]) - start, start).decode()

    def texts(self, block: int) -> Iterator[str]:
        """The texts of one block, in order, read as they are asked for."""
        start = 0
        with (self.directory / f"{block:06d}.text").open("rb") as stream:
            for end in self._ends(block).tolist():
                yield stream.read(end - start).decode()
                start = end

    def close(self) -> None:
        """Close the files that `text` opened."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([self._arrays(number)[name] for number in range(self.num_blocks)])

    def _arrays(self, block: int) -> Mapping[str, np.ndarray]:
        return np.load(self.directory / f"{block:06d}.npz")

    def _ends(self, block: int) -> np.ndarray:
        if block not in self._ends_of:
            self._ends_of[block] = self._arrays(block)["ends"]
        return self._ends_of[block]

    def _file(self, block: int) -> int:
        if block not in self._files:
            if len(self._files) == MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[block] = os.open(self.directory / f"{block:06d}.text", os.O_RDONLY)
        return self._files[block]

    @cached_property
    def _ends_of(self) -> dict[int, np.ndarray]:
        return {}

    @cached_property
    def _files(self) -> dict[int, int]:
        return {}


def encode_block(
    corpus: Corpus,
    block: int,
    wanted: np.ndarray,
    encode: Callable[[list[str]], list[np.ndarray]],
    dtype: np.dtype,
    *,
    tokenizer: str,
) -> None:
    """Tokenise the `wanted` documents (bool, of this block) to disk. What is whole there already, and of the
    same `tokenizer` (a digest), is taken.
    """
    record = corpus.directory / f"{block:06d}.encoded.json"
    if (found := whole_record(record)) is not None and found["tokenizer"] == tokenizer:
        return
    lengths = np.zeros(len(wanted), np.int64)
    tokens_file = corpus.directory / f"{block:06d}.tokens"
    with tokens_file.open("wb") as stream:
        texts = ((at, text) for at, text in enumerate(corpus.texts(block)) if wanted[at])
        for batch in batches(texts, lambda item: len(item[1])):
            for (at, _), ids in zip(batch, encode([text for _, text in batch]), strict=True):
                lengths[at] = len(ids)
                stream.write(ids.astype(dtype, copy=False).tobytes())
    lengths_file = corpus.directory / f"{block:06d}.lengths"
    lengths_file.write_bytes(lengths.tobytes())
    write_record(record, [tokens_file, lengths_file], {"tokenizer": tokenizer})


def documents(corpus: Corpus, which: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Token ids of the documents `which` (in runs of rising numbers), a block in memory at a time."""
    block_of = np.searchsorted(corpus.starts, which, side="right") - 1
    edges = np.flatnonzero(np.diff(block_of, prepend=-1, append=-1))
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        block = int(block_of[first])
        tokens = _mapped(corpus.directory / f"{block:06d}.tokens", dtype)
        lengths = np.fromfile(corpus.directory / f"{block:06d}.lengths", np.int64)
        ends = np.cumsum(lengths)
        for at in (which[first:end] - corpus.starts[block]).tolist():
            yield tokens[ends[at] - lengths[at] : ends[at]]


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """The numbers of a file, read when they are looked at: a block may be a whole file of any size."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
