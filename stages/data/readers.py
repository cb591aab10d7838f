"""Readers: local files of any accepted shape -> records, or one error line that names file, line and field.

    path, glob, directory --files_of--> files --rows--> columns --schemas--> records --weight--> Rows

Owns files, line numbers, bad rows, weights. Does not own what a row means (schemas) or tokens (chat). Imports
neither torch nor transformers. A .jsonl file is read line by line; a .txt file is one document per paragraph
(blocks of lines between blank lines), so that a single book can be deduplicated and split; a .json file is a
list of objects, or objects one after another. Each may be gzipped.
"""

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from blake3 import blake3

from stages.config import DataFormat, DataSource
from stages.data.batches import content_share, permutation, stage_seed
from stages.data.records import Conversation, Pair, Prompt, split_key
from stages.data.schemas import (
    SCHEMAS,
    Record,
    RowError,
    Schema,
    StageName,
    described,
    detect,
    fields_of,
    named,
)
from stages.errors import DataError

R = TypeVar("R")
T = TypeVar("T")
KINDS = ("jsonl", "json", "txt")
MAX_SKIPPED_FRAC = 0.01
"""Under on_bad_row: skip, the share of a source's rows (but at least one row) that may be left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Generic[R]):
    """What was read: records in file order (source after source, weights applied), and the rows left out."""

    records: list[R]
    num_skipped: int  # malformed rows left out under on_bad_row: skip
    num_filtered: int  # sound rows that give no record: labelled false, all responses tied


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """The start of one source, for `rlhf check`: the schema as given or detected, and its first records."""

    format: DataFormat
    columns: dict[str, str]  # field -> the column it is read from
    records: list[Any]  # Document, Conversation, Pair or Prompt


def read_conversations(sources: Sequence[DataSource], *, seed: int) -> Rows[Conversation]:
    """Conversations for sft. Raises DataError."""
    return read(sources, "sft", seed=seed)


def read_pairs(sources: Sequence[DataSource], *, seed: int) -> Rows[Pair]:
    """Preference pairs for reward. Raises DataError."""
    return read(sources, "reward", seed=seed)


def read_prompts(sources: Sequence[DataSource], *, seed: int) -> Rows[Prompt]:
    """Prompts for ppo and evaluate; each keeps its further columns in `row`. Raises DataError."""
    return read(sources, "ppo", seed=seed)


def read(sources: Sequence[DataSource], stage: StageName, *, seed: int) -> Rows[Any]:
    """The records that `stage` takes: the functions above by stage name, and documents for prepare."""
    records: list[Any] = []
    num_skipped = num_filtered = 0
    for index, source in enumerate(sources):
        if source.weight == 0:
            continue
        rows = read_source(source, stage)
        records += weighted(rows.records, source.weight, stage_seed(seed, "weight", index))
        num_skipped += rows.num_skipped
        num_filtered += rows.num_filtered
    if not records:
        raise DataError(f"{', '.join(shown(source.path) for source in sources) or stage}: no rows")
    return Rows(records=records, num_skipped=num_skipped, num_filtered=num_filtered)


def read_source(source: DataSource, stage: StageName) -> Rows[Any]:
    """All records of one source, once each, whatever its weight. Raises DataError."""
    reader = _SourceReader(source, stage)
    records = list(reader)
    reader.check_skipped()
    if not records:
        raise DataError(f"{shown(source.path)}: no rows")
    kept = [record for record in records if _in_part(record, source)]
    if not kept:
        raise DataError(
            f"{shown(source.path)}: no rows in part: {source.part} of {len(records)}; raise heldout_frac"
        )
    return Rows(records=kept, num_skipped=reader.num_skipped, num_filtered=reader.num_filtered)


def _in_part(record: Record, source: DataSource) -> bool:
    if source.part == "all":
        return True
    return (content_share(split_key(record)) < source.heldout_frac) == (source.part == "heldout")


def weighted(records: Sequence[T], weight: float, seed: int) -> list[T]:
    """Each record floor(weight) times, then a seeded choice of round(fraction * n) of them once more.

    The choice is made once: the same rows in every epoch.
    """
    whole, fraction = divmod(weight, 1)
    chosen = sorted(int(i) for i in permutation(len(records), seed)[: round(fraction * len(records))])
    return [*records] * int(whole) + [records[i] for i in chosen]


def first_rows(source: DataSource, stage: StageName, n: int) -> Preview:
    """Schema and first `n` records of one source, reading no further than them. Raises DataError."""
    reader = _SourceReader(source, stage)
    records = list(islice(reader, n))
    if reader.schema is None or not records:
        reader.check_skipped()
        raise DataError(f"{shown(source.path)}: no rows")
    return Preview(format=reader.schema.format, columns=reader.columns_seen, records=records)


def content_digest(source: DataSource) -> str:
    """blake3 of the source's file contents in path order. File names do not enter, the kind of file does."""
    total = blake3()
    for path in files_of(source.path):
        kind, gzipped = _kind(path)
        with _reading(path):
            contents = blake3().update_mmap(path).digest()
        total.update(f"{kind}{'.gz' if gzipped else ''}:".encode() + contents)
    return total.hexdigest()


def files_of(path: str) -> list[Path]:
    """The files behind a path, glob or directory (recursive, no hidden ones), sorted. Raises DataError."""
    place = Path(path)
    if place.is_dir():
        files = [
            file
            for file in sorted(place.rglob("*"))
            if file.is_file()
            and _is_readable_kind(file)
            and not any(part.startswith(".") for part in file.relative_to(place).parts)
        ]
        if not files:
            raise DataError(f"{shown(path)}: no {', '.join(KINDS)} file in this directory")
        return files
    if place.exists():
        return [place]
    found = [Path(match) for match in sorted(glob.glob(path, recursive=True)) if Path(match).is_file()]
    if not found:
        raise DataError(f"no such file: {shown(path)}")
    return found


def shown(path: str | Path) -> str:
    """The path as a person would write it: relative where it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


@dataclass(frozen=True, slots=True, kw_only=True)
class _RawRow:
    """A row before its schema: its columns, or what is wrong with it."""

    line: int  # where it starts, from 1
    columns: dict[str, Any] | None
    problem: str = ""


class _SourceReader(Iterator[Any]):
    """The records of one source, one by one; counts what it leaves out."""

    def __init__(self, source: DataSource, stage: StageName) -> None:
        self._source, self._stage = source, stage
        self.schema: Schema | None = self._stated_schema()
        self.columns_seen: dict[str, str] = {}
        self.num_rows = self.num_skipped = self.num_filtered = 0
        self._first_problem = ""
        self._files = files_of(source.path)
        self._records = self._read()

    def __next__(self) -> Record:
        return next(self._records)

    def check_skipped(self) -> None:
        """Raise DataError when more rows were left out than the cap allows."""
        if (
            self.num_skipped > max(1.0, MAX_SKIPPED_FRAC * self.num_rows)
            or self.num_skipped == self.num_rows > 0
        ):
            raise DataError(
                f"{self._first_problem} - and {self.num_skipped} of {self.num_rows} rows are bad, more than "
                f"on_bad_row: skip leaves out ({MAX_SKIPPED_FRAC:.0%}, at least one)"
            )

    def _read(self) -> Iterator[Record]:
        for path in self._files:
            for raw in _raw_rows(path):
                self.num_rows += 1
                try:
                    if raw.columns is None:
                        raise RowError(raw.problem)
                    records = self._parse(raw.columns)
                except RowError as error:
                    self._bad(f"{shown(path)}:{raw.line}: {error}")
                    continue
                self.num_filtered += not records
                yield from records

    def _parse(self, row: dict[str, Any]) -> tuple[Record, ...]:
        if self.schema is None:
            self.schema = detect(self._stage, row, self._source.column_of)
        cells = self.schema.cells(row, self._source.column_of, self._source.min_margin)
        records = self.schema.parse(cells)
        if not self.columns_seen:
            columns = {field: cells.column(field) for field in self.schema.aliases}
            self.columns_seen = {field: column for field, column in columns.items() if column is not None}
        return records

    def _bad(self, problem: str) -> None:
        if self._source.on_bad_row == "error":
            raise DataError(problem)
        self._first_problem = self._first_problem or problem
        self.num_skipped += 1

    def _stated_schema(self) -> Schema | None:
        """The schema `format:` names, once it and the names under `columns:` are known to exist."""
        source, possible = self._source, SCHEMAS[self._stage]
        schema = None if source.format is None else named(self._stage, source.format)
        if source.format is not None and schema is None:
            usable = " or ".join(schema.format for schema in possible)
            raise DataError(
                f"{shown(source.path)}: format {source.format} does not feed {self._stage}; use {usable}"
            )
        fields = fields_of(possible if schema is None else [schema])
        unknown = next((field for field in source.column_of if field not in fields), None)
        if unknown is not None:
            raise DataError(
                f"{shown(source.path)}: columns: no field '{unknown}'; fields are {', '.join(fields)}"
            )
        return schema


class _reading:  # used as a statement: `with _reading(path):`
    """Turn what the operating system or a decompressor says into one line about the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, EOFError):
            raise DataError(f"{shown(self._path)}: file ends early (truncated?)") from error
        if isinstance(error, gzip.BadGzipFile | zlib.error):
            raise DataError(f"{shown(self._path)}: not a valid gzip file, or damaged") from error
        if isinstance(error, OSError):
            raise DataError(f"{shown(self._path)}: cannot be read: {error.strerror or error}") from error


def _is_readable_kind(path: Path) -> bool:
    return path.name.removesuffix(".gz").rpartition(".")[2] in KINDS


def _kind(path: Path) -> tuple[str, bool]:
    """(jsonl | json | txt, whether gzipped)."""
    if not _is_readable_kind(path):
        raise DataError(
            f"{shown(path)}: cannot tell what it is by its name; {', '.join(KINDS)} and .gz of them are read"
        )
    return path.name.removesuffix(".gz").rpartition(".")[2], path.name.endswith(".gz")


def _raw_rows(path: Path) -> Iterator[_RawRow]:
    kind, gzipped = _kind(path)
    with _reading(path), gzip.open(path, "rb") if gzipped else path.open("rb") as stream:
        yield from {"jsonl": _jsonl_rows, "json": _json_rows, "txt": _paragraphs}[kind](stream, path)


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[int, str | RowError]]:
    """(line number, text without its line end), or what is wrong with the line."""
    for number, data in enumerate(stream, start=1):
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            column = len(data[: error.start].decode(errors="replace")) + 1
            yield (
                number,
                RowError(
                    f"not UTF-8 (byte 0x{data[error.start]:02X} at column {column}); convert with iconv"
                ),
            )
            continue
        yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")


def _jsonl_rows(stream: Iterable[bytes], path: Path) -> Iterator[_RawRow]:
    for number, line in _lines(stream):
        if isinstance(line, RowError):
            yield _RawRow(line=number, columns=None, problem=str(line))
        elif line.strip():
            try:
                yield _row_of(json.loads(line), number)
            except (ValueError, RecursionError) as error:
                yield _RawRow(line=number, columns=None, problem=_json_problem(error, line))


def _row_of(value: Any, line: int) -> _RawRow:
    if isinstance(value, dict):
        return _RawRow(line=line, columns=value)
    return _RawRow(
        line=line, columns=None, problem=f"expected an object {{column: value}}, got {described(value)}"
    )


def _paragraphs(stream: Iterable[bytes], path: Path) -> Iterator[_RawRow]:
    lines: list[str] = []
    start, problem = 1, ""
    for number, line in _lines(stream):
        if isinstance(line, str) and not line.strip():
            if lines:
                yield _paragraph(start, lines, problem)
            lines, problem = [], ""
            continue
        start = start if lines else number
        if isinstance(line, RowError) and not problem:
            start, problem = number, str(line)  # the line to look at
        lines.append("" if isinstance(line, RowError) else line)
    if lines:
        yield _paragraph(start, lines, problem)


def _paragraph(start: int, lines: list[str], problem: str) -> _RawRow:
    return _RawRow(line=start, columns=None if problem else {"text": "\n".join(lines)}, problem=problem)


_SPACE = re.compile(r"[ \t\n\r]*")


def _json_rows(stream: Iterable[bytes], path: Path) -> Iterator[_RawRow]:
    """The elements of a list, or values one after another. A syntax error ends the file."""
    lines = []
    for number, line in _lines(stream):
        if isinstance(line, RowError):
            raise DataError(f"{shown(path)}:{number}: {line}")
        lines.append(line)
    text = "\n".join(lines)
    at = _after_space(text, 0)
    in_list = text[at : at + 1] == "["
    at = _after_space(text, at + in_list)
    counted_to, line_number = 0, 1
    decoder = json.JSONDecoder()
    while at < len(text) and not (in_list and text[at] == "]"):
        line_number, counted_to = line_number + text.count("\n", counted_to, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line_number
            raise DataError(f"{shown(path)}:{where}: {_json_problem(error, text)}") from None
        yield _row_of(value, line_number)
        at = _after_space(text, at)
        if in_list and text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif in_list and text[at : at + 1] != "]":
            line_number += text.count("\n", counted_to, at)
            column = at - text.rfind("\n", 0, at)
            raise DataError(
                f"{shown(path)}:{line_number}: not valid JSON: missing ',' or ']' (column {column})"
            )
    if in_list and at >= len(text):
        raise DataError(f"{shown(path)}:{1 + text.count(chr(10))}: not valid JSON: the list is never closed")
    if in_list and _after_space(text, at + 1) < len(text):
        line_number = 1 + text.count("\n", 0, at)
        raise DataError(f"{shown(path)}:{line_number}: not valid JSON: more text after the list")


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


_JSON_WORDS = {
    "Expecting property name enclosed in double quotes": "expected a property name in double quotes",
    "Illegal trailing comma before end of object": "a comma before the closing '}'",
    "Illegal trailing comma before end of array": "a comma before the closing ']'",
    "Expecting value": "expected a value",
    "Expecting ':' delimiter": "missing ':'",
    "Unterminated string starting at": "text never closed",
    "Extra data": "more text after the end of the object",
    "Invalid control character at": "control character inside text",
}
_JSON_STRING = re.compile(r'"(?:\\.|[^"\\])*"', re.DOTALL)


def _json_problem(error: Exception, text: str) -> str:
    if isinstance(error, RecursionError):
        return "not valid JSON: nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return (
            f"not valid JSON: {str(error).partition(';')[0].lower()}"  # an integer of more than 4300 digits
        )
    words = _JSON_WORDS.get(error.msg, error.msg[:1].lower() + error.msg[1:])
    if error.msg == "Expecting ',' delimiter":
        words = f"missing ',' or '{_open_bracket(text[: error.pos])}'"
    return f"not valid JSON: {words} (column {error.colno})"


def _open_bracket(text: str) -> str:
    """The bracket that would close what is open at the end of `text`."""
    closing: list[str] = []
    for sign in re.findall(r"[\[\]{}]", _JSON_STRING.sub("", text)):
        if sign in "[{":
            closing.append("]" if sign == "[" else "}")
        elif closing:
            closing.pop()
    return closing[-1] if closing else "}"
