"""Rows: one split of a file -> rows of columns with the line each starts at, before any schema.

    FileSplit --opened--> lines --by kind--> RawRow        parquet, hub --record batches--> RawRow

Owns what a row is in each kind of file: csv and tsv cells, documents of a txt file, rows of Arrow tables
(JSON is json_rows'). Does not own files (files) or what a row means (schemas). Light import: pyarrow only
when used.

A .csv file is as RFC 4180 says: cells with commas, quotes or line ends stand in quotes. In a .tsv file a
quote is a sign like any other: the datasets distributed so (GLUE's) have quotes in their text and quote
nothing.
"""

import base64
import csv
import datetime
import decimal
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import DataSource
from stages.data.files import FileSplit, kind_of, lines_of, one_line, opened, reading, shown
from stages.data.json_rows import RawRow, decoded, json_rows, jsonl_rows
from stages.data.rows.advice import Advice
from stages.data.rows.cells import Binary
from stages.errors import DataError

if TYPE_CHECKING:
    import pyarrow

MAX_CELL_CHARS = 32_000_000
"""A csv cell longer than this is taken for a quote that is never closed."""
_AFTER_QUOTE = "expected after"
"""In what the csv module says where a quote is followed by text."""
_WHOLE_CELLS = re.compile(r'(?:(?:"[^"]*+(?:""[^"]*+)*+"|(?!")[^,]*+),)*+')
BATCH_ROWS = 256
"""Rows of a parquet file or hub dataset held as Python values at once."""


def raw_rows(split: FileSplit, source: DataSource) -> Iterator[RawRow]:
    """The rows of a split of a local file, in order. Raises DataError for what no later row can follow."""
    path, kind = split.path, kind_of(split.path)
    if source.header is not None and kind.kind not in ("csv", "tsv"):
        raise DataError(f"{shown(path)}: {Advice.LIST_OF_NAMES.line(kind=kind.kind)}")
    if kind.kind == "parquet":
        yield from _parquet_rows(path)
        return
    with reading(path), opened(path, kind.compression) as stream:
        lines = lines_of(stream, split)
        match kind.kind:
            case "jsonl":
                yield from jsonl_rows(lines, split.first_line)
            case "json":
                yield from json_rows(lines, path)
            case "csv":
                yield from _table_rows(_csv_cells(lines, path), path, source.header)
            case "tsv":
                yield from _table_rows(_tsv_cells(lines), path, source.header)
            case "txt":
                yield from _documents(_text_lines(lines, split.first_line), source.document)


# Lines of text


def _text_lines(lines: Iterable[bytes], first_line: int) -> Iterator[RawRow | tuple[int, str]]:
    """(line number, text without its line end), or the row that says what is wrong with the line."""
    for number, data in enumerate(lines, start=first_line):
        text = decoded(data, number)
        if isinstance(text, RawRow):
            yield text
        elif "\0" in text:
            yield _with_nul(number, text)
        else:
            yield number, text


def _with_nul(number: int, text: str) -> RawRow:
    column = text.index("\0") + 1
    problem = f"NUL byte at column {column}: a binary file, or UTF-16; convert with iconv or remove it"
    return RawRow(number, None, problem)


def _documents(lines: Iterable[RawRow | tuple[int, str]], document: str) -> Iterator[RawRow]:
    """The documents of a txt file: its lines, its blocks of lines between blank ones, or all of it."""
    block: list[str] = []
    start, problem = 1, ""
    for line in lines:
        number, text = line[0], "" if isinstance(line, RawRow) else line[1]
        is_blank = not isinstance(line, RawRow) and not text.strip()
        if is_blank and (document != "file"):
            if block:
                yield _document(start, block, problem)
            block, problem = [], ""
            continue
        start = start if block else number
        if isinstance(line, RawRow) and not problem:
            start, problem = number, line.problem  # the line to look at
        block.append(text)
        if document == "line":
            yield _document(start, block, problem)
            block, problem = [], ""
    if problem or any(text.strip() for text in block):
        yield _document(start, block, problem)


def _document(start: int, lines: Sequence[str], problem: str) -> RawRow:
    return RawRow(start, None if problem else {"text": "\n".join(lines)}, problem)


# Tables of text


def _table_rows(
    rows: Iterator[RawRow | tuple[int, list[str]]], path: Path, header: list[str] | None
) -> Iterator[RawRow]:
    """Cells under their column names: those of the first line, or the ones given."""
    names = _header_of(rows, path) if header is None else header
    if names is None:
        return
    if header is not None and (twice := _twice(header)) is not None:
        raise DataError(f"{shown(path)}: columns: '{_shortened(twice)}' stands twice; give each its own name")
    num_before = 0
    for row in rows:
        if isinstance(row, RawRow):
            yield row
            continue
        line, cells = row
        if len(cells) != len(names):
            expected = f"{len(names)} cells" + (
                "" if header is None else ", one for each name under columns:"
            )
            hint = _cells_hint(path, len(cells), len(names))
            yield RawRow(line, None, f"expected {expected}, got {len(cells)}{hint}")
            continue
        if header is not None and not num_before and cells == header:
            raise DataError(f"{shown(path)}:{line}: {Advice.HAS_HEADER.line()}")
        num_before += 1
        yield RawRow(line, dict(zip(names, cells, strict=True)))


def _cells_hint(path: Path, got: int, expected: int) -> str:
    if got > expected and kind_of(path).kind == "csv":
        return "; a cell that holds a comma must stand in quotes"
    return "; is it a csv file?" if got == 1 and kind_of(path).kind == "tsv" else ""


def _header_of(rows: Iterator[RawRow | tuple[int, list[str]]], path: Path) -> list[str] | None:
    """Column names from the header line; None if the file has no line. A nameless column (pandas' index) may
    be there once.
    """
    first = next(rows, None)
    if first is None:
        return None
    if isinstance(first, RawRow):
        raise DataError(f"{shown(path)}:{first.line}: {first.problem}")
    line, names = first
    if (twice := _twice(names)) is not None:
        raise DataError(f"{shown(path)}:{line}: {Advice.TWICE_IN_HEADER.line(column=_shortened(twice))}")
    return names


def _twice(names: Sequence[str]) -> str | None:
    """The first name that stands there again."""
    return next((name for at, name in enumerate(names) if name in names[:at]), None)


def _shortened(text: str) -> str:
    return one_line(text if len(text) <= 80 else f"{text[:80]}…")


def _tsv_cells(lines: Iterable[bytes]) -> Iterator[RawRow | tuple[int, list[str]]]:
    for line in _text_lines(lines, 1):
        if isinstance(line, RawRow):
            yield line
        elif line[1]:
            yield line[0], line[1].split("\t")


class _CsvLines:
    """Lines for the csv module, which wants text with line ends; remembers where it is and what was odd."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = lines
        self.number = 0  # of the line given last
        self.is_at_end = False
        self.start_row()

    def start_row(self) -> None:
        """The next line begins a row."""
        self.row_line = self.number + 1
        self.problem: RawRow | None = None
        self._row: list[str] = []

    @property
    def cell_line(self) -> int:
        """Number of the line in which the cell begins that the csv module could not read."""
        text = "".join(self._row)
        whole_cells = _WHOLE_CELLS.match(text)
        assert whole_cells is not None, "it matches no cell too"
        return self.row_line + text.count("\n", 0, whole_cells.end())

    def __iter__(self) -> Iterator[str]:
        for data in self._lines:
            self.number += 1
            self._row.append(self._text(data))
            yield self._row[-1]
        self.is_at_end = True

    def _text(self, data: bytes) -> str:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            wrong = decoded(data, self.number)
            assert isinstance(wrong, RawRow)
            self.problem, text = self.problem or wrong, data.decode(errors="replace")
        text = text.removeprefix("\ufeff") if self.number == 1 else text
        if "\0" in text:
            self.problem = self.problem or _with_nul(self.number, text)
        return text


def _csv_cells(lines: Iterable[bytes], path: Path) -> Iterator[RawRow | tuple[int, list[str]]]:
    csv.field_size_limit(MAX_CELL_CHARS)  # of the process; the default, 131072, is no text's limit
    feed = _CsvLines(lines)
    reader = csv.reader(feed, strict=True)
    while True:
        feed.start_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if (problem := _open_quote(error, feed)) is not None:  # where the next row starts is not known
                raise DataError(f"{shown(path)}:{feed.cell_line}: {problem}") from None
            yield feed.problem or RawRow(feed.number, None, _csv_problem(error))
            continue
        if feed.problem is not None:
            yield feed.problem
        elif cells:
            yield feed.row_line, cells


def _open_quote(error: csv.Error, feed: _CsvLines) -> str | None:
    """What is wrong with the row, if it is that a quote was not closed where it should be."""
    if feed.is_at_end:
        return "quote opened and never closed"
    if "field limit" in str(error):
        return f"quote opened and never closed, or a cell of more than {MAX_CELL_CHARS:,} characters"
    if _AFTER_QUOTE in str(error) and feed.cell_line < feed.number:
        return f"quote opened and never closed; the next one, in line {feed.number}, has text after it"
    return None


def _csv_problem(error: csv.Error) -> str:
    if _AFTER_QUOTE in str(error):
        return 'text after a closing quote; a quote within a cell is written ""'
    if "new-line character" in str(error):
        return "a carriage return that ends no line; convert the line ends to \\n"
    return f"not valid csv: {error}"


# Arrow tables


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow.parquet

    with reading(path), _parquet_faults(path):
        # otherwise a row group is held whole, and one may be the whole file
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    with file:
        _check_names(file.schema_arrow.names, path)
        batches = file.iter_batches(batch_size=BATCH_ROWS)
        row = 1
        while True:
            with reading(path), _parquet_faults(path):
                batch = next(batches, None)
            if batch is None:
                return
            yield from batch_rows(batch, first_row=row)
            row += batch.num_rows


def _check_names(names: Sequence[str], path: Path) -> None:
    if (twice := _twice(names)) is not None:
        raise DataError(f"{shown(path)}: column '{_shortened(twice)}' stands twice; rename one")


@contextmanager
def _parquet_faults(path: Path) -> Iterator[None]:
    """Turn Arrow's words for a broken parquet file into one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if _lacks_footer(path):
            raise EOFError from error
        raise DataError(f"{shown(path)}: not a valid parquet file, or damaged") from error


def _lacks_footer(path: Path) -> bool:
    """Whether the file begins like a parquet file but does not end like one."""
    with path.open("rb") as data:
        begins = b"PAR1".startswith(data.read(4))
        size = data.seek(0, 2)
        data.seek(max(0, size - 4))
        return begins and (size < 12 or data.read() != b"PAR1")


def batch_rows(batch: "pyarrow.RecordBatch", first_row: int) -> Iterator[RawRow]:
    """The rows of a record batch as JSON would hold them: numbers, text, lists, objects."""
    try:
        rows = _plain_rows(batch)
    except (ValueError, OverflowError):
        if batch.num_rows == 1:
            yield RawRow(first_row, None, _odd_column(batch))
            return
        for at in range(batch.num_rows):  # which row is it?
            yield from batch_rows(batch.slice(at, 1), first_row + at)
        return
    for number, columns in enumerate(rows, start=first_row):
        yield RawRow(number, columns)


def _plain_rows(batch: "pyarrow.RecordBatch") -> list[dict[str, Any]]:
    if all(_is_plain(kind) for kind in batch.schema.types):
        return batch.to_pylist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a map with a key twice: the last one counts
        rows = batch.to_pylist(maps_as_pydicts="lossy")
    return [{name: plain(value) for name, value in row.items()} for row in rows]


def _odd_column(batch: "pyarrow.RecordBatch") -> str:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist()
        except UnicodeDecodeError:
            return f"{_shortened(name)}: not UTF-8"
        except (ValueError, OverflowError):
            return f"{_shortened(name)}: a {column.type} that Python cannot hold"
    return "not readable"


def _is_plain(kind: "pyarrow.DataType") -> bool:
    """Whether Arrow gives this type's values as JSON would hold them."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_plain(kind.field(at).type) for at in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    tests: tuple[Callable[[Any], bool], ...] = (
        types.is_string,
        types.is_large_string,
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_null,
    )
    return any(test(kind) for test in tests)


def plain(value: Any) -> Any:
    """A value of an Arrow table as JSON would hold it: bytes that are UTF-8 as text (old parquet writers do
    not mark text as such), other bytes as Binary, decimals as numbers, times in ISO 8601 or seconds.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return Binary(base64.b64encode(value).decode())
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
