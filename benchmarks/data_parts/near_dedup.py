"""Near duplicates: planted copies of known similarity, found by this project and by datasketch.

    passages --mixtures--> originals --edited--> copies, true Jaccard by sets of word tuples
    all, shuffled --signatures--> one array --+--> band_keys + near_duplicates (reads texts to verify)
                                              +--> datasketch MinHash + MinHashLSH: query, then insert

Both sides run in a process of their own on the same signatures. Nothing here uses the hashes that are judged:
the truth is computed from words.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data_parts.processes import in_child, peak_mib, start_of_peak
from data_parts.texts import mixtures, passages, read_text, write_jsonl
from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig
from stages.data.corpus.blocks import Corpus
from stages.data.corpus.filtering import Filter, filter_block
from stages.data.corpus.near_duplicates import band_keys, lsh_bands, near_duplicates, shingles, signatures
from stages.data.corpus.words import normalised_words
from stages.data.reading.readers import splits_of

JACCARD, NGRAM, NUM_PERM = 0.8, 5, 128
PASSAGE_WORDS, PASSAGES = 25, 6
COPIES_FRAC, MAX_EDITS = 0.1, 6
BANDS = ((0.8, 0.85), (0.85, 0.9), (0.9, 1.01))


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """The documents in order and which of them are copies."""

    texts: list[str]
    partner: Mapping[int, int]  # later document of each planted pair -> the earlier one
    jaccard: Mapping[int, float]  # later document -> true similarity of the pair
    most_shared: int  # passages that two originals have in common at most


def measure(files: Sequence[Path], num_documents: int) -> dict[str, Any]:
    """Recall, precision, seconds and peak memory of both sides."""
    with TemporaryDirectory(prefix="bench-dedup-") as name:
        directory = Path(name)
        made = in_child(_make, files=files, num_documents=num_documents, directory=directory)
        sides = {
            "this project": in_child(_by_this_project, directory=directory),
            "datasketch, the same bands": in_child(
                _by_datasketch, bands=lsh_bands(NUM_PERM, JACCARD), directory=directory
            ),
            "datasketch, its own bands": in_child(_by_datasketch, bands=None, directory=directory),
        }
        planted, truth = made.pop("planted"), _truth(directory)
        for side in sides.values():
            side |= _judged(side.pop("found"), planted, truth)
    similar = [value for value in planted.values() if value >= JACCARD]
    return {**made, "sides": sides, "pairs_above": len(similar), "pairs_below": len(planted) - len(similar)}


# Documents


def plant(text: str, num_documents: int, seed: int = 0) -> Planted:
    """Originals of PASSAGES passages, a tenth of them with an edited copy, all in random order."""
    rng = np.random.default_rng(seed)
    found = passages(text, PASSAGE_WORDS)
    num_copies = int(num_documents * COPIES_FRAC)
    members = mixtures(len(found), num_documents - num_copies, PASSAGES, seed)
    texts = [" ".join(found[index] for index in row) for row in members.tolist()]
    copied = rng.choice(len(texts), num_copies, replace=False)
    vocabulary = sorted(set(normalised_words(text)))
    copies = [_edited(texts[original], vocabulary, rng) for original in copied.tolist()]
    place = rng.permutation(num_documents)  # of each text
    pairs = [
        (sorted(place[[original, len(texts) + at]].tolist()), _jaccard(texts[original], copies[at]))
        for at, original in enumerate(copied.tolist())
    ]
    ordered = [""] * num_documents
    for at, one in zip(place.tolist(), [*texts, *copies], strict=True):
        ordered[at] = one
    return Planted(
        texts=ordered,
        partner={later: earlier for (earlier, later), _ in pairs},
        jaccard={later: similarity for (_, later), similarity in pairs},
        most_shared=_most_shared(members),
    )


def _edited(text: str, vocabulary: Sequence[str], rng: np.random.Generator) -> str:
    """1 to MAX_EDITS words replaced by others of the text, or left out."""
    words = text.split(" ")
    for at in rng.choice(len(words), rng.integers(1, MAX_EDITS + 1), replace=False).tolist():
        words[at] = vocabulary[int(rng.integers(len(vocabulary)))] if rng.random() < 0.5 else ""
    return " ".join(word for word in words if word)


def _jaccard(one: str, other: str) -> float:
    """Of the sets of runs of NGRAM words, by the words themselves."""
    sets = [_word_runs(text) for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def _word_runs(text: str) -> set[tuple[str, ...]]:
    words = normalised_words(text)
    return {tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)}


def _most_shared(members: np.ndarray) -> int:
    """Passages that two documents have in common at most; 1 is not told from 0."""
    ordered = np.sort(members, axis=1)
    pairs = np.concatenate(
        [ordered[:, a] * (members.max() + 1) + ordered[:, b] for a, b in combinations(range(PASSAGES), 2)]
    )
    owners = np.tile(np.arange(len(members)), len(pairs) // len(members))
    order = np.argsort(pairs, kind="stable")
    edges = np.flatnonzero(np.diff(pairs[order], prepend=-1, append=-1))
    shared: Counter[tuple[int, int]] = Counter()  # two documents -> pairs of passages in common
    for start, end in pairwise(edges.tolist()):
        if end - start > 1:
            shared.update(combinations(sorted(owners[order[start:end]].tolist()), 2))
    most = max((count for (a, b), count in shared.items() if a != b), default=0)
    return next(k for k in range(1, PASSAGES + 1) if k * (k - 1) // 2 >= most)


def _make(files: Sequence[Path], num_documents: int, directory: Path) -> dict[str, Any]:
    """Documents and signatures on the disk."""
    planted = plant(read_text(files), num_documents)
    start = time.perf_counter()
    signed = signatures(planted.texts, ngram=NGRAM, num_perm=NUM_PERM, seed=0)
    seconds = time.perf_counter() - start
    np.save(directory / "signatures.npy", signed)
    later = np.array(sorted(planted.partner), np.int64)
    earlier = np.array([planted.partner[one] for one in later.tolist()], np.int64)
    np.save(directory / "planted.npy", np.stack([earlier, later]))
    file = directory / "documents.jsonl"
    write_jsonl(file, planted.texts)
    config = PrepareConfig(data=[DataSource(path=str(file))], exact_dedup=False)
    (split,) = splits_of(config.data[0], 2**40)
    filter_block(directory, 0, split, config.data[0], config, Filter(config, []))
    return {
        "planted": planted.jaccard,
        "documents": num_documents,
        "megabytes": sum(len(text.encode()) for text in planted.texts) / 1e6,
        "most_shared": planted.most_shared,
        "passages_per_document": PASSAGES,
        "seconds_signatures": seconds,
    }


# The two sides: {later document: an earlier one that it is taken for a copy of}


def _by_this_project(directory: Path) -> dict[str, Any]:
    signed = np.load(directory / "signatures.npy")
    corpus = Corpus(directory, [len(signed)], [0])
    at_start, start = start_of_peak(), time.perf_counter()
    keys = band_keys(signed, lsh_bands(NUM_PERM, JACCARD))
    bands_done = time.perf_counter()
    originals = near_duplicates(
        lambda band: keys[:, band],
        keys.shape[1],
        lambda document: shingles(corpus.text(document), NGRAM),
        JACCARD,
    )
    end = time.perf_counter()
    corpus.close()
    copies = np.flatnonzero(originals >= 0)
    return {
        "bands": lsh_bands(NUM_PERM, JACCARD),
        "seconds": end - start,
        "seconds_bands": bands_done - start,
        "peak_mib": peak_mib(),
        "start_mib": at_start,
        "found": {copy: [int(originals[copy])] for copy in copies.tolist()},
    }


def _by_datasketch(directory: Path, bands: tuple[int, int] | None) -> dict[str, Any]:
    from datasketch import LeanMinHash, MinHashLSH

    signed = np.load(directory / "signatures.npy")
    at_start, start = start_of_peak(), time.perf_counter()
    index = MinHashLSH(threshold=JACCARD, num_perm=NUM_PERM, params=bands)
    found: dict[int, list[int]] = {}
    for document, row in enumerate(signed):
        minhash = LeanMinHash(seed=0, hashvalues=row, scheme="affine32")  # the cheapest of its kinds
        if candidates := index.query(minhash):
            found[document] = sorted(candidates)
        else:
            index.insert(document, minhash, check_duplication=False)
    return {
        "bands": (index.b, index.r),
        "seconds": time.perf_counter() - start,
        "peak_mib": peak_mib(),
        "start_mib": at_start,
        "found": found,
    }


# Verdict


def _truth(directory: Path) -> dict[int, int]:
    earlier, later = np.load(directory / "planted.npy").tolist()
    return dict(zip(later, earlier, strict=True))


def _judged(
    found: Mapping[int, list[int]], jaccard: Mapping[int, float], partner: Mapping[int, int]
) -> dict[str, Any]:
    """A pair is found when the later document is dropped for the earlier; a drop is right when it is a pair
    that is similar enough.
    """
    hits = {later for later, candidates in found.items() if partner.get(later) in candidates}
    right = sum(jaccard[later] >= JACCARD for later in hits)
    recall = {}
    for low, high in ((JACCARD, 1.01), *BANDS):
        wanted = [later for later, similarity in jaccard.items() if low <= similarity < high]
        recall[f"{low:g} to {min(high, 1.0):g}"] = [sum(later in hits for later in wanted), len(wanted)]
    return {"dropped": len(found), "right": right, "recall": recall}
