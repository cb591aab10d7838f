"""Validation: a stage's data read to the end, and what is certain to end the stage found before it runs.

    DataSource --readers--> records, all of them --> Validated, or DataError

Looks at all that needs no tokenizer, because none is known yet. Owns: what can be told so early.
Does not own: the rules (readers, corpus). The stages ask the same rules again of what they have left.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rollout.ground.section import Section
from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig
from stages.config.reward import RewardConfig
from stages.data.batches import content_share, repeats
from stages.data.corpus.filtering import STEPS, Dropped, Filter, check_passed
from stages.data.corpus.languages import check_languages
from stages.data.corpus.selection import check_trained, held_out
from stages.data.observations import Observed
from stages.data.reading.hub import is_hub_id
from stages.data.reading.readers import (
    Counts,
    check_counts,
    check_sides,
    check_weight,
    is_held_out,
    read_whole,
)
from stages.data.reading.records import Document, Pair
from stages.data.reading.schemas import Kind

Look = Callable[[Any], None]
"""What is done with every record that is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """What a source holds."""

    counts: Counts
    num_records: int  # of the source's `part:`
    files: tuple[tuple[Path, int], ...]  # each with its rows, in order; none of a hub dataset


def validate(
    sources: Sequence[DataSource], kind: Kind, config: Section, observed: Sequence[Observed] = ()
) -> list[Validated]:
    """Read all `sources` (none of weight 0) as the stage of this section will; each of `observed` looks at
    the records of one of them, in order. Raises DataError.
    """
    looks: list[Look] = [one.look for one in observed] or [_nothing for _ in sources]
    match config:
        case PrepareConfig():
            return _documents(sources, config)  # which nobody asks or answers
        case RewardConfig():
            return _pairs(sources, config, looks)
    return [_read(source, kind, look) for source, look in zip(sources, looks, strict=True)]


def _nothing(record: Any) -> None: ...


def _read(source: DataSource, kind: Kind, *looks: Look, group_column: str | None = None) -> Validated:
    """Call all `looks` with every record."""
    reader = read_whole(source, kind, group_column)
    num_records = 0
    for record in reader:
        num_records += 1
        for look in looks:
            look(record)
    check_counts(source, reader.counts, num_records)
    if kind != "documents":  # whose sources are weighed against each other
        check_weight(source, num_records)
    files = tuple(reader.rows_of.items()) if not is_hub_id(source.path) else ()
    return Validated(counts=reader.counts, num_records=num_records, files=files)


def _pairs(sources: Sequence[DataSource], config: RewardConfig, looks: Sequence[Look]) -> list[Validated]:
    """Both sides of the held-out share must have a pair."""
    sides: Counter[bool] = Counter()

    def count(pair: Pair) -> None:
        sides[is_held_out(pair, config.heldout_frac)] += 1

    found = [
        _read(source, "pairs", count, look, group_column=config.group_column)
        for source, look in zip(sources, looks, strict=True)
    ]
    check_sides(sources, num_train=sides[False], num_heldout=sides[True])
    return found


def _documents(sources: Sequence[DataSource], config: PrepareConfig) -> list[Validated]:
    """Of every source a document must pass normal form and length, and not be held out; what weights take is
    known here only where they alone decide the mixture.
    """
    if config.languages:
        check_languages(config.languages)
    keeps = Filter(config.model_copy(update={"languages": [], "quality": []}), ())
    found, shares = zip(*(_passed(source, keeps) for source in sources), strict=True)
    is_heldout = held_out(np.concatenate(shares), config.heldout_frac)
    ends = np.cumsum([len(passed) for passed in shares])
    for source, heldout in zip(sources, np.split(is_heldout, ends[:-1]), strict=True):
        train = int((~heldout).sum())
        taken = train if config.mixing_temperature != 1 else len(repeats(train, source.weight, seed=0))
        check_trained(source, config, unique=len(heldout), train=train, taken=taken)
    return list(found)


def _passed(source: DataSource, keeps: Filter) -> tuple[Validated, np.ndarray]:
    """The `content_share` of every document that `keeps` leaves, too."""
    dropped = {step: Dropped() for step in STEPS}
    shares = array("d")

    def look(document: Document) -> None:
        shares.extend(content_share(text) for text in keeps([document.text], dropped))

    found = _read(source, "documents", look)
    check_passed(source, len(shares), dropped)
    return found, np.frombuffer(shares)
