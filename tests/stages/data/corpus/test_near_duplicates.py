"""Near duplicates: hand-computed similarities, invariances, recall on planted copies, big buckets."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from datasketch import MinHash

from stages.data.corpus import words
from stages.data.corpus.near_duplicates import (
    CACHED_BYTES,
    MIN_RECALL,
    Shingles,
    band_keys,
    fingerprint,
    jaccards,
    lsh_bands,
    most_shared,
    near_duplicates,
    shingles,
    signatures,
)


def text_of(rng: random.Random, num_words: int) -> str:
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(num_words))


def copy_with_changes(rng: random.Random, text: str, num_changes: int) -> str:
    changed = text.split()
    for place in rng.sample(range(len(changed)), num_changes):
        changed[place] = f"new{rng.randrange(10**9)}"
    return " ".join(changed)


def keys_of(texts: Sequence[str], jaccard: float, *, ngram: int = 5, num_perm: int = 128, seed: int = 0):
    """uint64 (D, B)."""
    rows = signatures(texts, ngram=ngram, num_perm=num_perm, seed=seed)
    return band_keys(rows, lsh_bands(num_perm, jaccard))


def originals(texts: Sequence[str], jaccard: float, *, ngram: int = 5, num_perm: int = 128) -> list[int]:
    """The whole way from texts to the document that each is a copy of."""
    keys = keys_of(texts, jaccard, ngram=ngram, num_perm=num_perm)
    found = near_duplicates(
        lambda band: keys[:, band], keys.shape[1], lambda document: shingles(texts[document], ngram), jaccard
    )
    assert found.dtype == np.int64
    return found.tolist()


def decided(
    sets: Sequence[set[int]], jaccard: float, keys: Sequence[Sequence[int]] | None = None
) -> list[int]:
    """The decision alone, on given shingle sets; all share one bucket unless keys (D, B) are given."""
    table = np.array(keys if keys is not None else [[1]] * len(sets), np.uint64)
    arrays = [np.array(sorted(one), np.uint64) for one in sets]
    return near_duplicates(lambda band: table[:, band], table.shape[1], arrays.__getitem__, jaccard).tolist()


def by_definition(arrays: Sequence[Shingles], keys: np.ndarray, jaccard: float) -> list[int]:
    """The sentence of the docstring, word for word, with Python sets."""
    sets, result = [set(array.tolist()) for array in arrays], []
    for document, mine in enumerate(sets):
        similar = [
            other
            for other in range(document)
            if result[other] == -1
            and (keys[other] == keys[document]).any()
            and mine
            and len(mine & sets[other]) / len(mine | sets[other]) >= jaccard
        ]
        result.append(similar[0] if similar else -1)
    return result


def test_jaccard_is_shared_over_all_shingles():
    one = np.array([1, 2, 3, 4], np.uint64)
    others = [[1, 2, 3, 4], [3, 4, 5, 6], [7], [], [4], [0, 1, 2, 3, 4, 5]]
    found = jaccards(one, [np.array(other, np.uint64) for other in others])
    assert found.tolist() == [1, 2 / 6, 0, 0, 1 / 4, 4 / 6]
    assert jaccards(np.empty(0, np.uint64), [one, np.empty(0, np.uint64)]).tolist() == [0, 0]


def test_fingerprints_never_promise_less_than_is_shared():
    rng = np.random.default_rng(4)
    for size in (0, 1, 30, 500, 3000):
        one = np.unique(rng.integers(0, 2**63, size).astype(np.uint64))
        others = [
            np.union1d(one[: int(share * size)], rng.integers(0, 2**63, extra).astype(np.uint64))
            for share in (0, 0.5, 0.9, 1)
            for extra in (0, 3, 100, 2000)
        ]
        sizes = np.array([len(other) for other in others])
        most = most_shared(
            len(one), fingerprint(one), sizes, np.array([fingerprint(other) for other in others])
        )
        shared = np.array([len(np.intersect1d(one, other)) for other in others])
        assert (most >= shared).all()
        assert most[12] == shared[12] == size  # the same set
        assert size != 500 or most[9] < 500  # 450 of 500 shared: known to be fewer than all


def test_shingles_are_the_distinct_runs_of_words_sorted():
    found = shingles("a b a b a b a", 3)  # aba, bab, aba, bab, aba
    assert len(found) == 2 and found[0] < found[1]
    assert set(found) == {shingles("a b a", 3)[0], shingles("b a b", 3)[0]}
    assert shingles("A, b;\nA", 3).tolist() == shingles("a b a", 3).tolist()


def test_a_document_shorter_than_a_shingle_is_one_shingle_of_its_own():
    short = [shingles(text, 5) for text in ("a", "a b", "b a", "a b c d", "a b c d e", "")]
    assert [len(one) for one in short] == [1, 1, 1, 1, 1, 0]
    assert len({int(one[0]) for one in short[:5]}) == 5


def test_short_documents_are_copies_only_of_equal_words():
    texts = ["Read more.", "read more", "Read less.", "more read", "Read", "READ MORE!"]
    assert originals(texts, 0.8) == [-1, 0, -1, -1, -1, 0]


def test_documents_without_words_are_copies_of_nothing():
    assert originals(["", "---", "", "a b c d e f", "***", "a b c d e f"], 0.8) == [-1, -1, -1, -1, -1, 3]


def test_a_document_at_the_threshold_is_dropped_and_one_below_is_kept():
    assert decided([{1, 2, 3, 4, 5}, {1, 2, 3, 4}], 0.8) == [-1, 0]  # 4 / 5
    assert decided([{1, 2, 3, 4, 5}, {1, 2, 3, 4}], 0.81) == [-1, -1]
    assert decided([{1, 2, 3, 4}, {1, 2, 3, 5}], 0.6) == [-1, 0]  # 3 / 5
    assert decided([{1, 2, 3}, {1, 2, 3}], 1.0) == [-1, 0]


def test_a_copy_of_a_dropped_document_only_is_kept():
    chain = [{1, 2, 3, 4}, {2, 3, 4, 5}, {3, 4, 5, 6}]  # neighbours share 3 of 5, the ends 2 of 6
    assert decided(chain, 0.6) == [-1, 0, -1]
    assert decided(chain, 0.3) == [-1, 0, 0]


def test_the_first_kept_copy_is_named():
    assert decided([{1, 2}, {7, 8}, {1, 2, 3}, {1, 2}, {7, 8}], 0.6) == [-1, -1, 0, 0, 1]


def test_only_documents_that_share_a_key_are_compared():
    same = [{1, 2, 3}] * 4
    assert decided(same, 0.5, keys=[[1, 5], [2, 6], [3, 6], [3, 7]]) == [-1, -1, 1, -1]
    assert decided(same, 0.5, keys=[[1, 2], [2, 1], [3, 3], [4, 4]]) == [-1] * 4


def test_a_copy_connects_through_any_band():
    assert decided([{1, 2}, {9}, {1, 2}], 0.5, keys=[[1, 5], [1, 6], [2, 5]]) == [-1, -1, 0]


def test_no_documents_and_one_document():
    assert near_duplicates(lambda band: np.empty(0, np.uint64), 3, lambda document: 1 / 0, 0.5).tolist() == []
    assert decided([{1, 2}], 0.5) == [-1]


@pytest.mark.parametrize("jaccard", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_decision_is_the_one_of_the_definition(jaccard, seed):
    rng = np.random.default_rng(seed)
    arrays = [np.unique(rng.integers(0, 9, rng.integers(0, 9)).astype(np.uint64)) for _ in range(150)]
    keys = rng.integers(0, 6, (150, 3)).astype(np.uint64)
    found = near_duplicates(lambda band: keys[:, band], 3, arrays.__getitem__, jaccard).tolist()
    assert found == by_definition(arrays, keys, jaccard)
    assert -1 in found and max(found) > 0


def test_bands_have_the_most_rows_that_reach_the_recall():
    assert lsh_bands(128, 0.8) == (18, 7)  # 1 - (1 - 0.8^7)^18 = 0.986; 16 bands of 8: 0.947
    assert lsh_bands(128, 1.0) == (1, 128)
    assert lsh_bands(16, 0.1) == (16, 1)  # 1 - 0.9^16 = 0.81: no banding reaches it
    for num_perm in (16, 64, 128, 256, 1024):
        for jaccard in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
            num_bands, rows = lsh_bands(num_perm, jaccard)
            assert num_bands * rows <= num_perm
            assert rows == 1 or 1 - (1 - jaccard**rows) ** num_bands >= MIN_RECALL
            more_bands = num_perm // (rows + 1)
            assert 1 - (1 - jaccard ** (rows + 1)) ** more_bands < MIN_RECALL


def test_keys_are_equal_exactly_where_all_rows_of_a_band_are():
    rows = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 9, 5], [2, 1, 3, 4, 9], [3, 4, 1, 2, 5]], np.uint32)
    keys = band_keys(rows, (2, 2))
    assert keys.shape == (4, 2) and keys.dtype == np.uint64
    assert (keys[0] == keys[1]).tolist() == [True, False]
    assert (keys[0] == keys[2]).tolist() == [False, True]
    assert keys[0, 0] != keys[0, 1] and keys[0, 0] != keys[2, 0]


def test_a_signature_depends_on_its_document_and_the_seed_alone(monkeypatch):
    rng = random.Random(1)
    texts = [text_of(rng, rng.choice([0, 1, 3, 5, 30, 200])) for _ in range(60)]
    settings = {"ngram": 5, "num_perm": 64}
    together = signatures(texts, **settings, seed=7)
    assert together.shape == (60, 64) and together.dtype == np.uint32
    alone = [signatures([text], **settings, seed=7) for text in texts]
    assert np.array_equal(together, np.concatenate(alone))
    assert np.array_equal(together[::-1], signatures(texts[::-1], **settings, seed=7))
    monkeypatch.setattr(words.blocks_of, "__defaults__", (100,))
    assert np.array_equal(together, signatures(texts, **settings, seed=7))
    assert not np.array_equal(together, signatures(texts, **settings, seed=8))
    assert signatures([], **settings, seed=7).shape == (0, 64)


@pytest.mark.parametrize("num_changes", [2, 6, 15, 40])
def test_signatures_agree_as_often_as_the_documents_are_similar(num_changes):
    rng = random.Random(num_changes)
    one = text_of(rng, 400)
    other = copy_with_changes(rng, one, num_changes)
    truth = jaccards(shingles(one, 5), [shingles(other, 5)])[0]
    first, second = signatures([one, other], ngram=5, num_perm=1024, seed=3)
    assert np.mean(first == second) == pytest.approx(truth, abs=0.06)  # four standard deviations
    assert datasketch_estimate(one, other) == pytest.approx(truth, abs=0.06)


def datasketch_estimate(one: str, other: str) -> float:
    sketches = [MinHash(num_perm=1024, seed=3), MinHash(num_perm=1024, seed=3)]
    for sketch, text in zip(sketches, (one, other), strict=True):
        sketch.update_batch([shingle.tobytes() for shingle in shingles(text, 5)])
    return sketches[0].jaccard(sketches[1])


@pytest.mark.parametrize("jaccard", [0.5, 0.7, 0.8, 0.9])
def test_planted_copies_are_found_and_nothing_else_is_dropped(jaccard):
    rng = random.Random(5)
    sources = [text_of(rng, rng.randint(60, 200)) for _ in range(150)]
    copies = [copy_with_changes(rng, text, rng.randint(0, len(text.split()) // 12)) for text in sources]
    truth = [
        jaccards(shingles(source, 5), [shingles(copy, 5)])[0]
        for source, copy in zip(sources, copies, strict=True)
    ]
    found = originals(sources + copies, jaccard)
    assert found[:150] == [-1] * 150
    assert all(found[150 + index] in (-1, index) for index in range(150))
    dropped = np.array(found[150:]) >= 0
    similar = np.array(truth) >= jaccard
    assert not dropped[~similar].any()
    assert similar.sum() > 20 and dropped[similar].mean() >= MIN_RECALL


def test_recall_just_at_the_threshold_is_as_promised():
    rng = random.Random(11)
    sources = [text_of(rng, 102) for _ in range(400)]  # 98 shingles; 2 words changed apart: 88 of 108 shared
    copies = []
    for source in sources:
        changed = source.split()
        changed[rng.randrange(20, 40)] = "x"
        changed[rng.randrange(60, 80)] = "y"
        copies.append(" ".join(changed))
    threshold = 88 / 108
    dropped = np.array(originals(sources + copies, threshold)[400:]) >= 0
    assert dropped.mean() >= MIN_RECALL - 0.02


def test_a_bucket_of_ten_thousand_copies_costs_one_comparison_each():
    boilerplate = np.arange(40, dtype=np.uint64)
    asked = np.zeros(10_000, int)

    def shingles_of(document: int) -> Shingles:
        asked[document] += 1
        return boilerplate

    found = near_duplicates(lambda band: np.zeros(10_000, np.uint64), 18, shingles_of, 0.8)
    assert found.tolist() == [-1] + [0] * 9999
    assert asked.max() == 1


def test_a_bucket_of_unequal_documents_is_decided_as_defined():
    rng = np.random.default_rng(2)
    arrays = [np.unique(rng.integers(0, 60, 40).astype(np.uint64)) for _ in range(400)]
    keys = np.zeros((400, 2), np.uint64)
    found = near_duplicates(lambda band: keys[:, band], 2, arrays.__getitem__, 0.6).tolist()
    assert found == by_definition(arrays, keys, 0.6)
    assert 150 < found.count(-1) < 399  # so that more are kept than are compared at once


def test_shingles_that_no_longer_fit_in_memory_are_asked_for_again(monkeypatch):
    monkeypatch.setattr("stages.data.corpus.near_duplicates.CACHED_BYTES", 400)
    sets = [{index, index + 1000, index + 2000} for index in range(60)] * 2
    assert decided(sets, 0.9) == [-1] * 60 + list(range(60))
    assert CACHED_BYTES >= 2**20
