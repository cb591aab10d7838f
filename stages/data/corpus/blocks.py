"""The corpus on its way through prepare, block by block on disk.

    FileSplit --filter_block--> 000007.text + .npz + .bands + .filtered.json    (what passed, what did not)
    all blocks --select--> Selection                              (duplicates out, held-out share, order)
    block + tokenizer --encode_block--> 000007.tokens + .lengths + .encoded.json
    Selection + tokens --documents--> ids in the order in which they are packed

A block is filtered and encoded by a function of its own input alone, in whatever process; its record is
written last, so a killed run finds what is whole and makes the rest. Between the two stands the only part
that sees all documents, with some 200 bytes for each. Owns: files and order of this work. Does not own: the
rules (languages, quality, near_duplicates, decontamination), rows (readers), layout of the result (shards).
"""

import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from blake3 import blake3

from rollout.ground.whole import whole_record, write_record
from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig
from stages.data.batches import repeats, stage_seed
from stages.data.corpus import near_duplicates
from stages.data.corpus.decontamination import Contamination
from stages.data.corpus.languages import identify
from stages.data.corpus.quality import judge
from stages.data.reading.files import FileSplit, shown
from stages.data.reading.readers import Counts, read_split, split_digest
from stages.errors import DataError

NUM_EXAMPLES = 5
"""Dropped documents shown per step."""
EXAMPLE_CHARS = 200
CHARS_AT_ONCE = 2**21
"""Characters filtered or tokenised at once: bounds memory where one file is one block."""
MAX_OPEN_FILES = 64
MINHASH_SEED = 0
"""Fixed: near copies do not depend on the run's seed."""
T = TypeVar("T")
STEPS = ("length", "language", "quality", "contamination", "duplicate", "near_duplicate")


@dataclass(slots=True)
class Dropped:
    """What one step left out: how many by which rule, and the first few, shortened."""

    counts: Counter[str] = field(default_factory=Counter)  # rule -> documents
    examples: list[list[str]] = field(default_factory=list)  # [rule, start of the document]

    def add(self, rule: str, text: str) -> None:
        """Count one document."""
        self.counts[rule] += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append([rule, text[:EXAMPLE_CHARS]])

    def extend(self, other: "Dropped") -> None:
        """Count what a later block left out."""
        self.counts += other.counts
        self.examples = [*self.examples, *other.examples][:NUM_EXAMPLES]

    @property
    def total(self) -> int:
        """Documents, by whatever rule."""
        return self.counts.total()


def all_dropped(parts: Iterable[Mapping[str, Dropped]]) -> dict[str, Dropped]:
    """Step -> what it left out, over all parts."""
    total = {step: Dropped() for step in STEPS}
    for part in parts:
        for step, dropped in part.items():
            total[step].extend(dropped)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """What became of one block: the content of its `.filtered.json`."""

    counts: Counts  # of rows and records, before `part:` chose some
    num_documents: int  # read
    num_kept: int
    dropped: Mapping[str, Dropped]  # step -> what it left out

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        dropped = {
            step: {"counts": dict(one.counts), "examples": one.examples} for step, one in self.dropped.items()
        }
        return {
            "counts": asdict(self.counts),
            "num_documents": self.num_documents,
            "num_kept": self.num_kept,
            "dropped": dropped,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "BlockReport":
        """The inverse of `to_json`."""
        dropped = {
            step: Dropped(counts=Counter(one["counts"]), examples=one["examples"])
            for step, one in value["dropped"].items()
        }
        return cls(
            counts=Counts(**value["counts"]),
            num_documents=value["num_documents"],
            num_kept=value["num_kept"],
            dropped=dropped,
        )


def normalise(text: str, unicode_form: str | None) -> str:
    """Line ends to `\\n`, the Unicode normal form, no white space around the document."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if unicode_form is not None:  # first: NFKC makes spaces of other signs
        text = unicodedata.normalize(unicode_form, text)  # type: ignore[arg-type]
    return text.strip()


class Filter:
    """The steps that look at one document at a time, in their order."""

    def __init__(self, config: PrepareConfig, evaluation_texts: Sequence[str]) -> None:
        self._config = config
        self._contamination = (
            Contamination(evaluation_texts, config.decontaminate_ngram) if evaluation_texts else None
        )

    def __call__(self, texts: Sequence[str], dropped: Mapping[str, Dropped]) -> list[str]:
        """The documents that stay, as they stay (normalised, without the lines a rule removed).

        A step gives for each text (the text it leaves or shows, the rule it breaks or None).
        """
        kept = [(at, normalise(text, self._config.unicode_form)) for at, text in enumerate(texts)]
        left_out: list[tuple[int, str, str, str]] = []
        for step, broken_rules in (
            ("length", self._lengths),
            ("language", self._languages),
            ("quality", self._quality),
            ("length", self._lengths),  # c4 removes lines
            ("contamination", self._contaminated),
        ):
            verdicts = broken_rules([text for _, text in kept])
            judged = [(at, *verdict) for (at, _), verdict in zip(kept, verdicts, strict=True)]
            left_out += [(at, step, rule, text) for at, text, rule in judged if rule is not None]
            kept = [(at, text) for at, text, rule in judged if rule is None]
        for _, step, rule, text in sorted(left_out):  # as the documents come, however they are batched
            dropped[step].add(rule, text)
        return [text for _, text in kept]

    def _lengths(self, texts: Sequence[str]) -> list[tuple[str, str | None]]:
        def rule(text: str) -> str | None:
            if len(text) < self._config.min_chars:
                return "too_short"
            return "too_long" if len(text) > self._config.max_chars else None

        return [(text, rule(text)) for text in texts]

    def _languages(self, texts: Sequence[str]) -> list[tuple[str, str | None]]:
        wanted, config = set(self._config.languages), self._config
        if not wanted:
            return [(text, None) for text in texts]

        def rule(language: str, score: float) -> str | None:
            if language not in wanted:
                return language
            return f"{language}, uncertain" if score < config.min_language_score else None

        return [(text, rule(*found)) for text, found in zip(texts, identify(texts), strict=True)]

    def _quality(self, texts: Sequence[str]) -> list[tuple[str, str | None]]:
        if not self._config.quality:
            return [(text, None) for text in texts]
        return [(verdict.text, verdict.broken) for verdict in judge(texts, self._config.quality)]

    def _contaminated(self, texts: Sequence[str]) -> list[tuple[str, str | None]]:
        if self._contamination is None:
            return [(text, None) for text in texts]
        rule = f"{self._config.decontaminate_ngram} words in common"
        return [
            (text, None) if run is None else (f"[{run}] in: {text}", rule)
            for text, run in zip(texts, self._contamination.shared_runs(texts), strict=True)
        ]


def check_passed(source: DataSource, num_passed: int, dropped: Mapping[str, Dropped]) -> None:
    """Raise DataError where no document of a source passed the steps that look at one at a time."""
    if not num_passed:
        total = sum(one.total for one in dropped.values())
        rules = [
            f"{num} by {step} ({rule})"
            for step, one in dropped.items()
            for rule, num in sorted(one.counts.items())
        ]
        raise DataError(
            f"{shown(source.path)}: no rows left of {total} (dropped: {', '.join(rules)}); set milder rules, "
            "or weight: 0"
        )


def filter_block(
    directory: Path, number: int, split: FileSplit, source: DataSource, config: PrepareConfig, keeps: Filter
) -> BlockReport:
    """Read one split, keep what passes, write it to `directory`. What is whole there already, and was made
    from what the split holds now, is taken.

    Raises DataError.
    """
    record = directory / f"{number:06d}.filtered.json"
    if (found := whole_record(record)) is not None and found["split"] == split_digest(split, source):
        return BlockReport.from_json(found["report"])
    reader = read_split(source, split, "prepare")
    dropped = {step: Dropped() for step in STEPS}
    lengths: list[int] = []
    digests: list[bytes] = []
    chars: list[int] = []
    bands: list[np.ndarray] = []
    num_documents = 0
    text_file = directory / f"{number:06d}.text"
    with text_file.open("wb") as stream:
        for batch in _batches((document.text for document in reader), len):
            num_documents += len(batch)
            kept = keeps(batch, dropped)
            encoded = [text.encode() for text in kept]
            stream.writelines(encoded)
            lengths += map(len, encoded)
            chars += map(len, kept)
            digests += [blake3(data).digest(16) for data in encoded]
            bands.append(_band_keys(kept, config))
    arrays_file, bands_file = (directory / f"{number:06d}.{suffix}" for suffix in ("npz", "bands"))
    np.concatenate([*bands, _band_keys([], config)]).T.tofile(bands_file)
    np.savez(
        arrays_file,
        ends=np.cumsum(np.array(lengths, np.int64), dtype=np.int64),
        chars=np.array(chars, np.int64),
        digests=np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2),
    )
    report = BlockReport(
        counts=reader.counts,
        num_documents=num_documents,
        num_kept=len(lengths),
        dropped=dropped,
    )
    content = {"report": report.to_json(), "split": split_digest(split, source)}
    write_record(record, [text_file, arrays_file, bands_file], content)
    return report


def _band_keys(texts: Sequence[str], config: PrepareConfig) -> np.ndarray:
    """uint64 (documents, bands); no band where near duplicates are not looked for."""
    near = config.near_dedup
    if near is None:
        return np.zeros((len(texts), 0), np.uint64)
    found = near_duplicates.signatures(texts, ngram=near.ngram, num_perm=near.num_perm, seed=MINHASH_SEED)
    return near_duplicates.band_keys(found, near_duplicates.lsh_bands(near.num_perm, near.jaccard))


def _batches(items: Iterator[T], size: Callable[[T], int]) -> Iterator[list[T]]:
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
            f"no rows left to train on: held out {unique} of {unique} (prepare.heldout_frac "
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
        for batch in _batches(texts, lambda item: len(item[1])):
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
