"""Filtering: the steps of prepare that look at one document at a time, and what they left out.

    FileSplit --filter_block--> 000007.text + .npz + .bands + .filtered.json    (what passed, what did not)

A block is filtered by a function of its own input alone, in whatever process; its record is written last, so
a killed run finds what is whole and makes the rest. Owns: the order of the steps, what was dropped by which.
Does not own: the rules (languages, quality, decontamination), rows (readers), how filtered blocks are read
(blocks).
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from rollout.ground.whole import whole_record, write_record
from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig
from stages.data.corpus import near_duplicates
from stages.data.corpus.blocks import batches
from stages.data.corpus.decontamination import Contamination
from stages.data.corpus.languages import identify
from stages.data.corpus.quality import judge
from stages.data.reading.files import FileSplit, shown
from stages.data.reading.readers import Counts, read_split, split_digest
from stages.errors import DataError

NUM_EXAMPLES = 5
"""Dropped documents shown per step."""
EXAMPLE_CHARS = 200
MINHASH_SEED = 0
"""Fixed: near copies do not depend on the run's seed."""
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
    reader = read_split(source, split, "documents")
    dropped = {step: Dropped() for step in STEPS}
    lengths: list[int] = []
    digests: list[bytes] = []
    chars: list[int] = []
    bands: list[np.ndarray] = []
    num_documents = 0
    text_file = directory / f"{number:06d}.text"
    with text_file.open("wb") as stream:
        for batch in batches((document.text for document in reader), len):
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
