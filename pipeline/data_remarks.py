"""What `rlhf check` says of a dataset beside its figures: the files it is read from, and what is odd in it.

Owns: the words. Does not own: which files are read (stages.data.reading.places), what is counted
(stages.data.observations). Light import.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.stage_table import data_of
from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig
from stages.data.reading.directories import DEFAULT_SPLIT, split_of
from stages.data.reading.files import COMPRESSIONS, kind_of, one_line, shown
from stages.data.reading.hub import is_hub_id
from stages.data.reading.places import found_at
from stages.data.reading.table_rows import DELIMITERS, delimiter_of

if TYPE_CHECKING:
    from stages.data.chat.tokenizer import ChatTokenizer
    from stages.data.observations import Observed
    from stages.data.validation import Validated

NUM_FILES = 12
"""Named of one dataset."""
NUM_MARKERS = 4
"""Shown of those that its texts hold."""


def files_read(source: DataSource, found: "Validated") -> Iterator[str]:
    """The files of a directory or glob with their rows, what is left out, and how odd csv files are read."""
    if is_hub_id(source.path):
        return
    directory = Path(source.path)
    if directory.is_dir() or len(found.files) > 1:
        yield _listed(found.files, directory)
    if directory.is_dir():
        if reasons := found_at(source.path, source.split).reasons(directory):
            yield f"left out: {reasons}"
        if source.split == DEFAULT_SPLIT:
            yield from _told_by_some(found.files, directory)
    elif source.split != DEFAULT_SPLIT:
        yield f"split: {one_line(source.split)} picks nothing here: a named file or glob is read whole"
    yield from _copies(found.files)
    for path, _ in found.files:
        if kind_of(path).kind == "csv" and (sign := delimiter_of(path, source.header)) != ",":
            yield f"{_below(path, directory)}: its cells are separated by {DELIMITERS.get(sign, repr(sign))}"


def _told_by_some(files: Sequence[tuple[Path, int]], directory: Path) -> Iterator[str]:
    """Where the names of some files tell a split, the same one, the others may be of another."""
    split = {path: split_of(path, directory) for path, _ in files}
    told = {name for name in split.values() if name is not None}
    others = [_below(path, directory) for path in split if split[path] is None]
    if len(told) == 1 and others:
        more = f" and {len(others) - NUM_FILES} more" if len(others) > NUM_FILES else ""
        yield (
            f"only the split {told.pop()} is told by names: {', '.join(others[:NUM_FILES])}{more} "
            f"{'tells' if len(others) == 1 else 'tell'} none, and {'is' if len(others) == 1 else 'are'} read "
            "with it; name the files if not all are meant"
        )


def _copies(files: Sequence[tuple[Path, int]]) -> Iterator[str]:
    """Of files that differ in their kind alone and have as many rows, one may be a copy of the other."""
    same: dict[tuple[Path, int], list[str]] = {}
    for path, rows in files:
        same.setdefault((_without_kind(path), rows), []).append(path.name)
    for (_, rows), names in same.items():
        if rows and len(names) > 1:
            named = one_line(" and ".join(names))
            yield f"{named} have {_rows(rows)} each: all are read, is one a copy of another?"


def _without_kind(path: Path) -> Path:
    """Example: d/a for d/a.jsonl.gz."""
    path = path.with_suffix("") if path.suffix[1:].lower() in COMPRESSIONS else path
    return path.with_suffix("") if path.suffix else path


def _listed(files: Sequence[tuple[Path, int]], directory: Path) -> str:
    names = [f"{_below(path, directory)} ({_rows(rows)})" for path, rows in files[:NUM_FILES]]
    if others := files[NUM_FILES:]:
        names.append(f"{len(others)} more ({_rows(sum(rows for _, rows in others))})")
    return f"{len(files)} {'file' if len(files) == 1 else 'files'}: {', '.join(names)}"


def _rows(number: int) -> str:
    return f"{number} {'row' if number == 1 else 'rows'}"


def _below(path: Path, directory: Path) -> str:
    """The path within its directory; as `shown` where it is not in one."""
    is_below = path != directory and path.is_relative_to(directory)
    return one_line(path.relative_to(directory)) if is_below else shown(path)


def remarks(
    stage: str,
    seen: "Observed",
    observed: "Mapping[str, Sequence[Observed]]",
    chat: "ChatTokenizer | None",
) -> Iterator[str]:
    """What is odd in one dataset, over all of its rows. `observed`: those of all stages."""
    if seen.turns_left_out:
        yield (
            f"{seen.turns_left_out} {'turn' if seen.turns_left_out == 1 else 'turns'} after the last answer "
            f"left out, in {seen.records_cut} of {seen.num_records} records: nothing there can be trained"
        )
    if seen.templated:
        yield _templated(seen, chat)
    if seen.contradicted:
        yield (
            f"in {seen.contradicted} of {seen.num_records} pairs the score of the chosen answer is not above "
            f"that of the rejected one ({one_line(seen.first_contradicted)})"
        )
    if seen.evaluation_texts_too_short:
        number, short = seen.evaluation_texts, seen.evaluation_texts_too_short
        yield (
            f"decontamination looks for {number - short} of {number} texts: {short} "
            f"{'has' if short == 1 else 'have'} fewer words than {PrepareConfig.KEY}.decontaminate_ngram"
        )
    if data_of(stage).asks == "to evaluate":
        yield from _trained_on(seen, observed)


def _templated(seen: "Observed", chat: "ChatTokenizer | None") -> str:
    markers = [marker for marker, _ in seen.markers.most_common(NUM_MARKERS)]
    headers = {text for one in seen.headers for text in (one.user, one.assistant)}
    is_own = any(marker in headers or (chat is not None and marker in chat.template) for marker in markers)
    whose = "the chat template's own markers" if is_own else "markers of a chat template"
    return (
        f"{seen.templated} of {seen.num_records} records hold {whose} ({one_line(', '.join(markers))}), "
        "as if templated already: they are read as plain text, inside another template; give the bare "
        "messages"
    )


def _trained_on(seen: "Observed", observed: "Mapping[str, Sequence[Observed]]") -> Iterator[str]:
    from stages.data.observations import trained_on

    for stage, trained in observed.items():
        if data_of(stage).asks != "to train":
            continue
        number, first = trained_on(seen, trained)
        if not number:
            continue
        is_apart = seen.part == "heldout" and all(
            one.part == "train" for one in trained if trained_on(seen, [one])[0]
        )
        advice = (
            "part: goes by the exact text of the first question, white space too, and by heldout_frac; write "
            "both the same way there and here"
            if is_apart
            else "part: train there and part: heldout here keep them apart"
        )
        yield (
            f"{number} of {seen.num_records} prompts are prompts that {stage} trains on (such as "
            f"'{one_line(first)}'): {advice}"
        )


def left_out(datasets: Mapping[str, Mapping[str, DataSource]]) -> Iterator[str]:
    """A line for every directory among the datasets of which files are not read. Raises DataError."""
    for key, source in chain.from_iterable(sources.items() for sources in datasets.values()):
        directory = Path(source.path)
        is_local = not is_hub_id(source.path) and directory.is_dir()
        if is_local and (reasons := found_at(source.path, source.split).reasons(directory)):
            yield f"{key}: of {shown(directory)} left out: {reasons}"
