"""Selection: what all documents of prepare decide together.

    Corpus --select--> Selection: duplicates out, the held-out share, the mixture of the sources, their order

The only part that sees all documents, with some 200 bytes for each. Owns: which documents are trained on, how
often and in which order. Does not own: how near duplicates are found (near_duplicates), the texts (blocks).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig
from stages.data.batches import repeats, stage_seed
from stages.data.corpus import near_duplicates
from stages.data.corpus.blocks import Corpus
from stages.data.corpus.filtering import NUM_EXAMPLES, Dropped
from stages.data.reading.files import shown
from stages.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What all documents together decide."""

    train: np.ndarray  # int64: documents in the order of the training text, repeated by weight
    heldout: np.ndarray  # int64: documents held out, in file order
    is_kept: np.ndarray  # bool (D,): whether a document is no duplicate
    dropped: Mapping[str, Dropped]  # duplicate, near_duplicate

    @property
    def num_kept(self) -> int:
        """Documents that are no duplicate."""
        return int(self.is_kept.sum())


def select(corpus: Corpus, config: PrepareConfig, seed: int) -> Selection:
    """Drop duplicates, hold out by content hash, mix the sources.

    Whether a document is held out does not depend on others, except that one always is: the lowest hash.
    Raises DataError where no document of a source is trained on.
    """
    dropped = {"duplicate": Dropped(), "near_duplicate": Dropped()}
    kept = np.ones(len(corpus), bool)
    if config.exact_dedup:
        kept = _first_occurrences(corpus.digests)
        _record_dropped(corpus, np.flatnonzero(~kept), "same text", dropped["duplicate"])
    if config.near_dedup is not None:
        near = _near_duplicates(corpus, np.flatnonzero(kept), config)
        kept[near] = False
        _record_dropped(corpus, near, "similar text", dropped["near_duplicate"])
    unique = np.flatnonzero(kept)
    is_heldout = held_out(corpus.shares[unique], config.heldout_frac)
    return Selection(
        train=_mixed(corpus, unique, is_heldout, config, seed),
        heldout=unique[is_heldout],
        is_kept=kept,
        dropped=dropped,
    )


def held_out(shares: np.ndarray, heldout_frac: float) -> np.ndarray:
    """bool (D,): which documents are held out, by their `content_share`."""
    return shares < max(heldout_frac, math.nextafter(shares.min(initial=1.0), 1))


def check_trained(source: DataSource, config: PrepareConfig, *, unique: int, train: int, taken: int) -> None:
    """Raise DataError where no document of a source is trained on: of the `unique` ones, which are no
    duplicates, `train` are not held out, and its share of the mixture takes `taken`.
    """
    if taken or not source.weight:
        return
    if not unique:
        problem = "no rows left: all are duplicates of documents before them; set weight: 0"
    elif not train:
        problem = (
            f"no rows left to train on: held out {unique} of {unique} ({config.KEY}.heldout_frac "
            f"{config.heldout_frac:g}, one document at least); add documents, or lower heldout_frac"
        )
    else:
        problem = (
            f"no rows at weight {source.weight:g} and mixing_temperature {config.mixing_temperature:g} of "
            f"{train}; raise weight, or set it to 0"
        )
    raise DataError(f"{shown(source.path)}: {problem}")


def _first_occurrences(digests: np.ndarray) -> np.ndarray:
    """bool (D,): whether no document before has the same digest."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    first = np.ones(len(digests), bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def _near_duplicates(corpus: Corpus, unique: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """The documents among `unique` that are a near copy of an earlier one that stays."""
    near = config.near_dedup
    assert near is not None
    num_bands, _ = near_duplicates.lsh_bands(near.num_perm, near.jaccard)
    original = near_duplicates.near_duplicates(
        lambda band: corpus.band(band)[unique],
        num_bands,
        lambda at: near_duplicates.shingles(corpus.text(int(unique[at])), near.ngram),
        near.jaccard,
    )
    corpus.close()
    return unique[original >= 0]


def _record_dropped(corpus: Corpus, documents: np.ndarray, rule: str, dropped: Dropped) -> None:
    for document in documents[:NUM_EXAMPLES].tolist():
        dropped.add(rule, corpus.text(document))
    if len(documents) > NUM_EXAMPLES:
        dropped.counts[rule] = len(documents)
    corpus.close()


def _mixed(
    corpus: Corpus, unique: np.ndarray, is_heldout: np.ndarray, config: PrepareConfig, seed: int
) -> np.ndarray:
    """Documents of the training text: source after source, each as often as its weight says."""
    source_of = corpus.source_of[unique]
    members = [unique[~is_heldout & (source_of == source)] for source in range(len(config.data))]
    chars = np.array([corpus.chars[documents].sum() for documents in members], np.float64)
    weights = mixing_weights(chars, [source.weight for source in config.data], config.mixing_temperature)
    mixed = [
        documents[repeats(len(documents), weight, stage_seed(seed, "prepare", "weight", source))]
        for source, (documents, weight) in enumerate(zip(members, weights, strict=True))
    ]
    num_unique = np.bincount(source_of, minlength=len(members)).tolist()
    for source, all_of_it, train, taken in zip(config.data, num_unique, members, mixed, strict=True):
        check_trained(source, config, unique=all_of_it, train=len(train), taken=len(taken))
    return np.concatenate(mixed)


def mixing_weights(chars: np.ndarray, weights: Sequence[float], temperature: float) -> list[float]:
    """How often each source's documents are taken.

    Shares of the mixture go with chars ** (1 / temperature), so that the whole stays as long as it was; the
    configured weights multiply that (Conneau and Lample 2019, with alpha = 1 / temperature).
    """
    scaled = (chars / max(1.0, chars.max(initial=0.0))) ** (1 / temperature)
    total, wanted = chars.sum(), scaled.sum()
    return [
        weight * float(total * scale / wanted / size) if size else weight
        for weight, scale, size in zip(weights, scaled, chars, strict=True)
    ]


def tokenizer_sample(corpus: Corpus, train: np.ndarray, max_chars: int) -> Iterator[str]:
    """Training documents whose content hashes are lowest, max_chars together at most (but one document), in
    the order and as often as they are trained on.
    """
    times = np.bincount(train, minlength=len(corpus))
    present = np.flatnonzero(times)
    by_hash = present[np.argsort(corpus.digests[present, 0], kind="stable")]
    fits = np.cumsum(corpus.chars[by_hash] * times[by_hash]) <= max_chars
    fits[:1] = True
    chosen = np.zeros(len(corpus), bool)
    chosen[by_hash[fits]] = True
    for document in train[chosen[train]].tolist():
        yield corpus.text(document)
    corpus.close()
