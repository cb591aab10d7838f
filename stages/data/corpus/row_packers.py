"""Row packers: documents -> rows of segments, in one of three ways. Numbers in, numbers out.

A *segment* is a run of tokens of one document: no token sees another segment, and positions restart with it.
The packings differ in what a segment is:

concat    `separator, ids, separator, ids, ..., separator` cut where a row ends: no slot is empty. A segment
          is a document from the separator before it on; what a row end cuts off is a segment of its own in
          the next row. A separator serves twice: it is the first *input* of its document, which so learns to
          begin, and the last *target* of the document before, which so learns to end. It stands there
          whatever document follows, so the target tells nothing of another document, and nothing needs to be
          written twice: every token of a row but the first is a target. The last, partial row is left out.
best_fit  `separator, ids, separator` of each document; one longer than a row is cut into pieces, each of
          which begins with the last token of the one before. Packed best-fit decreasing within windows
          (`WINDOW_TOKENS`). What is left of a row is padding.
bucket    `separator, ids, separator` of each document, cut into chunks of powers of two (`chunk_spans`); a
          row holds chunks of one length. Where context_length is a power of two, only the last row of each
          length has padding.

In best_fit and bucket a segment's neighbour may be anything, so each document has both its separators, and
every token of a segment but its first is a target. Padding (separators on the disk) is in no segment.

Needs numpy only. Owns what a row holds; does not own the files (shards), the text or the tokenizer.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stages.data.pack_plans import best_fit

TokenIds = Sequence[int] | np.ndarray
Packing = Literal["concat", "best_fit", "bucket"]
MIN_CHUNK = 16
"""Shortest chunk of a longer document under bucket: the tokens the end of a document is told from."""
WINDOW_TOKENS = 2**21
"""Tokens of the pieces that best_fit chooses among at once: what bounds its memory (4 bytes each)."""
WINDOW_PIECES = 2**15
"""And how many pieces: each costs about 100 bytes besides its tokens."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a row packer yields."""

    ids: np.ndarray  # at most context_length tokens
    lengths: Sequence[int]


Packer = Callable[[Iterable[np.ndarray], int, Counter[str]], Iterator[Row]]
"""(documents with their separators, context_length, counts of tokens dropped and repeated) -> rows."""


def chunk_spans(num_tokens: int, context_length: int) -> list[tuple[int, int]]:
    """(start, length) of the chunks of a document under bucket; every length is a power of two.

    The largest power that fits (in the row too), again and again, down to MIN_CHUNK. What then remains is
    read by a last chunk that reaches back: the document's last MIN_CHUNK tokens (of a document shorter than
    that, the largest power within it). So nothing is dropped and no end is predicted from next to nothing;
    fewer than MIN_CHUNK tokens of a document stand in two chunks, and are counted.

    Source: dataset decomposition, Pouransari et al. 2024 (arXiv 2405.13226), which leaves short chunks out.

    Example: 85 tokens in rows of 32 -> (0, 32), (32, 32), (64, 16), (69, 16)
    """
    assert num_tokens >= 2, "a document has its separators at least"
    largest = _power_below(min(num_tokens, context_length))
    shortest = min(MIN_CHUNK, largest)
    spans = []
    start = 0
    while (remaining := num_tokens - start) >= shortest:
        length = min(largest, _power_below(remaining))
        spans.append((start, length))
        start += length
    if remaining:
        spans.append((num_tokens - shortest, shortest))
    return spans


def _power_below(number: int) -> int:
    """The largest power of two that is not above `number`."""
    return 1 << (number.bit_length() - 1)


def separated(
    documents: Iterable[TokenIds],
    separator_id: int,
    dtype: np.dtype,
    counts: Counter[str],
    *,
    closed: bool,
) -> Iterator[np.ndarray]:
    """`separator, ids` of every document, and a separator behind each (`closed`) or behind the last alone."""
    for ids in documents:
        counts["text"] += len(ids)
        yield between(ids, separator_id, dtype)[: None if closed else -1]
    if not closed:
        yield np.array([separator_id], dtype)


def between(ids: TokenIds, separator_id: int, dtype: np.dtype) -> np.ndarray:
    """`separator, ids, separator`."""
    document = np.full(len(ids) + 2, separator_id, dtype)
    document[1:-1] = ids
    return document


def _concat_rows(documents: Iterable[np.ndarray], context_length: int, counts: Counter[str]) -> Iterator[Row]:
    parts: list[np.ndarray] = []
    free = context_length
    for document in documents:
        start = 0
        while start < len(document):
            parts.append(document[start : start + free])
            start += len(parts[-1])
            free -= len(parts[-1])
            if not free:
                yield _row(parts)
                parts, free = [], context_length
    counts["dropped"] += context_length - free


def _best_fit_rows(
    documents: Iterable[np.ndarray], context_length: int, counts: Counter[str]
) -> Iterator[Row]:
    for window in _windows(_pieces(documents, context_length, counts)):
        plan = best_fit([len(piece) for piece in window], context_length)
        for members in plan.packs:
            yield _row([window[index] for index in members])


def _pieces(documents: Iterable[np.ndarray], max_tokens: int, counts: Counter[str]) -> Iterator[np.ndarray]:
    """Documents, the longer ones cut. Each piece begins with the last token of the one before it, its first
    input, so that every token is predicted, also the separator that ends a document.
    """
    for document in documents:
        for start in range(0, len(document) - 1, max_tokens - 1):
            counts["repeated"] += start > 0
            yield document[start : start + max_tokens]


def _windows(pieces: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Consecutive pieces, so many as are held at once."""
    window: list[np.ndarray] = []
    tokens = 0
    for piece in pieces:
        window.append(piece)
        tokens += len(piece)
        if tokens >= WINDOW_TOKENS or len(window) >= WINDOW_PIECES:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def _bucket_rows(documents: Iterable[np.ndarray], context_length: int, counts: Counter[str]) -> Iterator[Row]:
    buckets: dict[int, list[np.ndarray]] = {}  # length -> chunks of a row that is not full yet
    for document in documents:
        spans = chunk_spans(len(document), context_length)
        counts["repeated"] += sum(length for _, length in spans) - len(document)
        for start, length in spans:
            bucket = buckets.setdefault(length, [])
            bucket.append(document[start : start + length])
            if len(bucket) == context_length // length:
                yield _row(bucket)
                buckets[length] = []
    for _, bucket in sorted(buckets.items()):
        if bucket:
            yield _row(bucket)


def _row(parts: Sequence[np.ndarray]) -> Row:
    return Row(np.concatenate(parts), [len(part) for part in parts])


PACKERS: dict[Packing, Packer] = {
    "concat": _concat_rows,
    "best_fit": _best_fit_rows,
    "bucket": _bucket_rows,
}
