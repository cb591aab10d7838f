"""Near duplicates: MinHash finds candidate pairs, the true Jaccard similarity of their shingles decides.

    texts --signatures--> (D, P) --band_keys--> keys (D, B) --near_duplicates--> the earlier copy, or -1
                                                                   |
                                        shingles_of(document) <----+  only for documents that share a key

Legend: D documents, P hash functions (num_perm), B bands of R rows each, M memberships in shared buckets.

A shingle is a run of `ngram` words (`words.normalised_words`); a document with fewer words is one shingle,
one without any word has none and is never a copy. Everything is a function of the documents in their order:
not of how they were cut into blocks.
Owns signatures, bands and the decision. Does not own where keys and texts are kept (prepare).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from stages.data.words import HashedWords, blocks_of, hash_words, mixed, ngrams, offsets_of

MIN_RECALL = 0.95
"""Share of the pairs exactly at the threshold that shall become candidates."""
CACHED_BYTES = 256 * 2**20
"""Shingle sets that are kept in memory for the next comparisons."""
COMPARED_AT_ONCE = 64

Shingles = NDArray[np.uint64]
"""A document's shingles: sorted hashes, each once."""
NO_ORIGINAL = -1


def shingles(text: str, ngram: int) -> Shingles:
    """uint64, sorted: the hashes of the document's runs of `ngram` words."""
    hashes, _ = _shingle_rows(hash_words([text]), ngram)
    return np.unique(hashes)


def signatures(texts: Sequence[str], *, ngram: int, num_perm: int, seed: int) -> NDArray[np.uint32]:
    """uint32 (D, P): two entries of a column are equal with a probability of the Jaccard similarity."""
    blocks = [
        _minhash(*_shingle_rows(hash_words(block), ngram), num_perm=num_perm, seed=seed)
        for block in blocks_of(texts)
    ]
    return np.concatenate([np.empty((0, num_perm), np.uint32), *blocks])


def _minhash(
    hashes: NDArray[np.uint64], offsets: NDArray[np.int64], *, num_perm: int, seed: int
) -> NDArray[np.uint32]:
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), num_perm, seed)
    return np.array(matrix.to_rows(), np.uint32)


def _shingle_rows(words: HashedWords, ngram: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """All shingles of the documents end to end (repeated ones too), and the (D + 1,) offsets of each."""
    runs_W = ngrams(words, ngram)
    lengths_D, starts_D = words.lengths_D, words.offsets[:-1]
    whole_W = np.arange(len(runs_W)) + ngram <= words.ends_W
    short = (lengths_D > 0) & (lengths_D < ngram)
    runs_W[starts_D[short]] = _short_runs(words, starts_D[short], lengths_D[short])
    whole_W[starts_D[short]] = True
    num_shingles_D = np.where(short, 1, np.maximum(lengths_D - ngram + 1, 0))
    return runs_W[whole_W], offsets_of(num_shingles_D)


def _short_runs(
    words: HashedWords, starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """One hash per document that has fewer words than a shingle: of all its words and their number."""
    runs = lengths.astype(np.uint64)
    for index in range(int(lengths.max(initial=0))):
        longer = lengths > index
        runs[longer] = mixed(runs[longer] + words.hashes_W[starts[longer] + index])
    return runs


def lsh_bands(num_perm: int, jaccard: float) -> tuple[int, int]:
    """(B, R): the most rows per band with which at least MIN_RECALL of the pairs at the threshold are found.

    A pair of similarity s agrees in all R rows of a band with probability s^R, in one of B bands at least
    with 1 - (1 - s^R)^B, where B = floor(P / R). More rows make fewer false candidates. Where not even R = 1
    finds MIN_RECALL (a low threshold, few hash functions), that is taken.
    """
    for rows in range(num_perm, 1, -1):
        num_bands = num_perm // rows
        if 1 - (1 - jaccard**rows) ** num_bands >= MIN_RECALL:
            return num_bands, rows
    return num_perm, 1


def band_keys(signatures_DP: NDArray[np.uint32], bands: tuple[int, int]) -> NDArray[np.uint64]:
    """uint64 (D, B): one hash per band of a signature; equal in all rows of a band means an equal key."""
    num_bands, rows = bands
    used = signatures_DP[:, : num_bands * rows]
    keys = np.zeros((len(used), num_bands), np.uint64)
    for row in range(rows):
        keys = mixed(keys + used[:, row::rows] + np.uint64(1))
    return keys


def near_duplicates(
    keys_of_band: Callable[[int], NDArray[np.uint64]],
    num_bands: int,
    shingles_of: Callable[[int], Shingles],
    jaccard: float,
) -> NDArray[np.int64]:
    """int64 (D,): NO_ORIGINAL (-1) for a document that is kept, else the first kept one that it is a copy of.

    In document order: a document is dropped if and only if an earlier document that is itself kept shares a
    key with it in some band and has a Jaccard similarity of at least `jaccard`. `keys_of_band(b)` is uint64
    (D,); `shingles_of(d)` is called for documents that share a key only.

    A document is compared with the kept members of its buckets alone, so that n copies of one text cost n
    comparisons. Memory: the keys of one band, 16 bytes per membership in a bucket that is shared, and
    CACHED_BYTES of shingles.
    """
    num_documents, documents_M, buckets_M = _shared_buckets(keys_of_band, num_bands)
    originals = np.full(num_documents, NO_ORIGINAL, np.int64)
    kept_in: dict[int, list[int]] = {}
    compared = _Comparison(shingles_of, num_documents, jaccard)
    for document, buckets in _by_document(documents_M, buckets_M):
        candidates = sorted({other for bucket in buckets for other in kept_in.setdefault(bucket, [])})
        originals[document] = compared.first_similar(document, candidates)
        if originals[document] == NO_ORIGINAL and compared.may_be_copied(document):
            for bucket in buckets:
                kept_in[bucket].append(document)
    return originals


def _shared_buckets(
    keys_of_band: Callable[[int], NDArray[np.uint64]], num_bands: int
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """D, and for each membership in a bucket of two or more documents: the document and the bucket."""
    num_documents = num_buckets = 0
    documents, buckets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for band in range(num_bands):
        keys = keys_of_band(band)
        num_documents = len(keys)
        order = np.argsort(keys, kind="stable")
        as_before = np.zeros(num_documents, np.bool_)
        as_before[1:] = keys[order[1:]] == keys[order[:-1]]
        first = ~as_before
        first[:-1] &= as_before[1:]  # of a bucket of several
        first[-1:] = False
        shared = first | as_before
        documents.append(order[shared])
        buckets.append(num_buckets + np.cumsum(first)[shared] - 1)
        num_buckets += int(np.count_nonzero(first))
    return num_documents, np.concatenate(documents), np.concatenate(buckets)


def _by_document(
    documents_M: NDArray[np.int64], buckets_M: NDArray[np.int64]
) -> Iterator[tuple[int, list[int]]]:
    """Each document that shares a bucket, in order, with its buckets."""
    order = np.argsort(documents_M, kind="stable")
    starts = np.flatnonzero(np.diff(documents_M[order], prepend=-1))
    for start, end in pairwise([*starts, len(order)]):
        yield int(documents_M[order[start]]), buckets_M[order[start:end]].tolist()


class _Comparison:
    """True Jaccard similarities, with the shingle sets used last held in memory."""

    def __init__(self, shingles_of: Callable[[int], Shingles], num_documents: int, jaccard: float) -> None:
        self._shingles_of = shingles_of
        self._jaccard = jaccard
        self._cache: OrderedDict[int, Shingles] = OrderedDict()
        self._cached_bytes = 0
        self._sizes_D = np.full(num_documents, -1, np.int64)  # -1: not asked for yet

    def first_similar(self, document: int, candidates: Sequence[int]) -> int:
        """The first candidate (they are in order) that is similar enough, or NO_ORIGINAL."""
        if not candidates:
            return NO_ORIGINAL
        mine = self._shingles(document)
        possible = self._of_possible_size(len(mine), np.array(candidates))
        for start in range(0, len(possible), COMPARED_AT_ONCE):
            some = possible[start : start + COMPARED_AT_ONCE]
            similar = jaccards(mine, [self._shingles(other) for other in some.tolist()]) >= self._jaccard
            if similar.any():
                return int(some[similar.argmax()])
        return NO_ORIGINAL

    def may_be_copied(self, document: int) -> bool:
        """Whether later documents have to be compared with this one: those without words are equal to none.

        True where it is not known yet: to ask would load documents that nothing is compared with.
        """
        return bool(self._sizes_D[document] != 0)

    def _of_possible_size(self, size: int, candidates: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those whose number of shingles allows the similarity: it is at most the smaller by the larger."""
        for other in candidates[self._sizes_D[candidates] < 0].tolist():
            self._shingles(other)
        sizes = self._sizes_D[candidates]
        larger = np.maximum(np.maximum(sizes, size), 1)
        return candidates[np.minimum(sizes, size) / larger >= self._jaccard]

    def _shingles(self, document: int) -> Shingles:
        if document in self._cache:
            self._cache.move_to_end(document)
            return self._cache[document]
        loaded = self._shingles_of(document)
        self._sizes_D[document] = len(loaded)
        self._cache[document] = loaded
        self._cached_bytes += loaded.nbytes
        while self._cached_bytes > CACHED_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return loaded


def jaccards(one: Shingles, others: Sequence[Shingles]) -> NDArray[np.float64]:
    """Jaccard similarity of one shingle set with each of the others: shared by all; none of an empty one."""
    sizes = np.array([len(other) for other in others])
    flat = np.concatenate(others)
    if not len(one) or not len(flat):
        return np.zeros(len(others))
    places = np.minimum(np.searchsorted(one, flat), len(one) - 1)
    found = offsets_of(one[places] == flat)
    ends = np.cumsum(sizes)
    shared = found[ends] - found[ends - sizes]
    return shared / (len(one) + sizes - shared)
