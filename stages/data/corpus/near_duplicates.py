"""Near duplicates: MinHash finds candidate pairs, the true Jaccard similarity of their shingles decides.

    texts --signatures--> (D, P) --band_keys--> keys (D, B) --near_duplicates--> the earlier copy, or -1
                                                                   |
                                        shingles_of(document) <----+  only for documents that share a key

Legend: D documents, P hash functions (num_perm), B bands of R rows each, M memberships in shared buckets, S
documents that share a bucket.

A shingle is a run of `ngram` words (`words.normalised_words`); a document with fewer words is one shingle,
one without any word has none and is never a copy. Everything is a function of the documents in their order:
not of how they were cut into blocks.
Owns signatures, bands and the decision. Does not own where keys and texts are kept (prepare).
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from stages.data.corpus.words import HashedWords, blocks_of, hash_words, mixed, ngrams, offsets_of

MIN_RECALL = 0.95
"""Share of the pairs exactly at the threshold that shall become candidates."""
CACHED_BYTES = 256 * 2**20
"""Shingle sets that are kept in memory for the next comparisons."""
COMPARED_AT_ONCE = 64
FINGERPRINT_BITS = 512

Shingles = NDArray[np.uint64]
"""A document's shingles: sorted hashes, each once."""
NO_ORIGINAL = -1
SIGNATURE_NUMBERS = 2**20
"""Entries of signatures that are computed at once."""


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
    """Some documents at a time: the library hands signatures over as lists of Python's integers."""
    documents = max(1, SIGNATURE_NUMBERS // num_perm)
    found = np.empty((len(offsets) - 1, num_perm), np.uint32)
    for start in range(0, len(found), documents):
        part = offsets[start : start + documents + 1]
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            hashes[part[0] : part[-1]], (part - part[0]).astype(np.uint64), num_perm, seed
        )
        found[start : start + documents] = matrix.to_rows()
    return found


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
    comparisons; and of those with the ones alone whose fingerprints allow the similarity, so that n documents
    of one template, none a copy, cost n^2 / 2 looks at 64 bytes. Memory: the keys of one band; of documents
    that share a key 72 bytes each, 24 for each bucket that one is in, about 200 for each such bucket; and
    CACHED_BYTES of shingles.
    """
    num_documents, documents_M, buckets_M = _shared_buckets(keys_of_band, num_bands)
    documents_S = np.unique(documents_M)
    originals = np.full(num_documents, NO_ORIGINAL, np.int64)
    kept_in: dict[int, array[int]] = {}
    comparison = _Comparison(shingles_of, documents_S, jaccard)
    for rank, buckets in enumerate(_by_document(documents_M, buckets_M)):
        original = comparison.first_similar(rank, _members(kept_in[b] for b in buckets if b in kept_in))
        if original != NO_ORIGINAL:
            originals[documents_S[rank]] = documents_S[original]
        elif comparison.may_be_copied(rank):
            for bucket in buckets:
                kept_in.setdefault(bucket, array("q")).append(rank)
    return originals


def _members(kept_ranks: Iterable["array[int]"]) -> NDArray[np.int64]:
    """The ranks in any of the buckets, in order, each once."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *map(np.asarray, kept_ranks)]))


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


def _by_document(documents_M: NDArray[np.int64], buckets_M: NDArray[np.int64]) -> Iterator[list[int]]:
    """The buckets of each document that shares one, in document order."""
    order = np.argsort(documents_M, kind="stable")
    starts = np.flatnonzero(np.diff(documents_M[order], prepend=-1))
    for start, end in pairwise([*starts, len(order)]):
        yield buckets_M[order[start:end]].tolist()


class _Comparison:
    """True Jaccard similarities of documents by their rank among the S that share a bucket.

    The shingle sets used last are held in memory; sizes and fingerprints of all that were asked for.
    """

    def __init__(
        self, shingles_of: Callable[[int], Shingles], documents_S: NDArray[np.int64], jaccard: float
    ) -> None:
        self._shingles_of = shingles_of
        self._documents_S = documents_S
        self._jaccard = jaccard
        self._cache: OrderedDict[int, Shingles] = OrderedDict()
        self._cached_bytes = 0
        self._sizes_S = np.full(len(documents_S), -1, np.int64)  # -1: not asked for yet
        self._fingerprints_S = np.zeros((len(documents_S), FINGERPRINT_BITS // 64), np.uint64)

    def first_similar(self, rank: int, candidates: NDArray[np.int64]) -> int:
        """The first candidate (they are in order) that is similar enough, or NO_ORIGINAL."""
        if not len(candidates):
            return NO_ORIGINAL
        mine = self._shingles(rank)
        possible = self._possible(rank, candidates)
        for start in range(0, len(possible), COMPARED_AT_ONCE):
            some = possible[start : start + COMPARED_AT_ONCE]
            similar = jaccards(mine, [self._shingles(other) for other in some.tolist()]) >= self._jaccard
            if similar.any():
                return int(some[similar.argmax()])
        return NO_ORIGINAL

    def may_be_copied(self, rank: int) -> bool:
        """Whether later documents have to be compared with this one: those without words are equal to none.

        True where it is not known yet: to ask would load documents that nothing is compared with.
        """
        return bool(self._sizes_S[rank] != 0)

    def _possible(self, rank: int, candidates: NDArray[np.int64]) -> NDArray[np.int64]:
        """The candidates whose sizes and fingerprints allow the similarity."""
        for other in candidates[self._sizes_S[candidates] < 0].tolist():
            self._shingles(other)
        size, sizes = self._sizes_S[rank], self._sizes_S[candidates]
        most = most_shared(size, self._fingerprints_S[rank], sizes, self._fingerprints_S[candidates])
        return candidates[most / np.maximum(size + sizes - most, 1) >= self._jaccard]

    def _shingles(self, rank: int) -> Shingles:
        if rank in self._cache:
            self._cache.move_to_end(rank)
            return self._cache[rank]
        loaded = self._shingles_of(int(self._documents_S[rank]))
        self._sizes_S[rank], self._fingerprints_S[rank] = len(loaded), fingerprint(loaded)
        self._cache[rank] = loaded
        self._cached_bytes += loaded.nbytes
        while self._cached_bytes > CACHED_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return loaded


def fingerprint(one: Shingles) -> NDArray[np.uint64]:
    """uint64 (FINGERPRINT_BITS / 64,): every shingle flips one bit, chosen by its hash."""
    flips = np.bincount((one % np.uint64(FINGERPRINT_BITS)).astype(np.int64), minlength=FINGERPRINT_BITS)
    return np.packbits(flips & 1).view(np.uint64)


def most_shared(
    size: int, mine: NDArray[np.uint64], sizes_K: NDArray[np.int64], fingerprints_K: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """(K,): how many shingles a set can share at most with each of K others, by sizes and fingerprints.

    A shingle that only one of two sets has flips one bit that the other's does not: fingerprints that differ
    in n bits are of sets that differ in n shingles at least, so that 2 * shared <= size + other size - n
    (the bitmap filter of Sandes et al. 2017, with parities).
    """
    differing_K = np.bitwise_count(fingerprints_K ^ mine).sum(axis=1, dtype=np.int64)
    return np.minimum((size + sizes_K - differing_K) // 2, np.minimum(size, sizes_K))


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
