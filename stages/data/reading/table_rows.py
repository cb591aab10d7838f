"""Table rows: the lines of a csv or tsv file -> rows of cells under their column names.

    lines --cells--> [cells] --header, or columns: [...]--> RawRow

A .csv file is as RFC 4180 says: cells with commas, quotes or line ends stand in quotes. Spreadsheets in many
countries write semicolons instead; so where the first line has no comma between cells, the one other sign of
DELIMITERS that separates it separates all lines. In a .tsv file a quote is a sign like any other: the
datasets distributed so (GLUE's) have quotes in their text and quote nothing.
Owns cells, delimiters and headers. Does not own lines and files (files) or what a row means (schemas).
"""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from stages.data.reading.files import kind_of, opened, reading, shown, shown_column
from stages.data.reading.json_rows import RawRow, decoded
from stages.data.reading.rows.advice import Advice
from stages.data.reading.text_rows import text_lines, with_nul
from stages.errors import DataError

MAX_CELL_CHARS = 32_000_000
"""A csv cell longer than this is taken for a quote that is never closed."""
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
"""Signs that separate the cells of a csv file, in words."""
_STATED_DELIMITER = re.compile(r'sep=([^\w"])')
"""The line that spreadsheets write first where the delimiter is not that of the country."""
_AFTER_QUOTE = "expected after"
"""In what the csv module says where a quote is followed by text."""
_WHOLE_CELLS = r'(?:(?:"[^"]*+(?:""[^"]*+)*+"|(?!")[^,]*+),)*+'
"""Of a row with commas."""
Cells = RawRow | tuple[int, list[str]]
"""(line, cells), or the row that says what is wrong with the line."""


def csv_rows(lines: Iterable[bytes], path: Path, header: list[str] | None) -> Iterator[RawRow]:
    """The rows of a csv file; `header` names the columns of one without header line. Raises DataError."""
    lines = iter(lines)
    start = list(_up_to_text(lines))
    delimiter = _delimiter_in(start, header)
    return _rows_under(_csv_cells(chain(start, lines), path, delimiter), path, header, delimiter)


def tsv_rows(lines: Iterable[bytes], path: Path, header: list[str] | None) -> Iterator[RawRow]:
    """The rows of a tsv file, likewise."""
    lines = iter(lines)
    start = list(_up_to_text(lines))
    others = _separating(start, header) if "\t" not in _text_of(start) else []
    if header is None and others:
        sign = DELIMITERS[others[0]]
        raise DataError(f"{shown(path)}:{len(start)}: {sign} separates the cells, no tab; call the file .csv")
    return _rows_under(_tsv_cells(chain(start, lines)), path, header, "\t")


def delimiter_of(path: Path, header: list[str] | None) -> str:
    """The sign that separates the cells of a csv file. Raises DataError."""
    with reading(path), opened(path, kind_of(path).compression) as stream:
        return _delimiter_in(list(_up_to_text(iter(stream))), header)


def _up_to_text(lines: Iterator[bytes]) -> Iterator[bytes]:
    """The first lines, up to the first one that is not blank."""
    for line in lines:
        yield line
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            return


def _delimiter_in(start: Sequence[bytes], header: list[str] | None) -> str:
    if (stated := _STATED_DELIMITER.fullmatch(_text_of(start))) is not None:
        return stated[1]
    fits = _separating(start, header)
    return fits[0] if "," in fits or len(fits) == 1 else ","


def _separating(start: Sequence[bytes], header: list[str] | None) -> list[str]:
    """Those of DELIMITERS that may separate the cells of the first line."""
    return [sign for sign in DELIMITERS if _separates(sign, _text_of(start), header)]


def _text_of(start: Sequence[bytes]) -> str:
    return _without_mark(start[-1].decode(errors="replace")).rstrip("\r\n") if start else ""


def _separates(delimiter: str, line: str, header: list[str] | None) -> bool:
    """Whether the first line has several cells between this sign: so many as the header has, or several
    names, of which one may be empty (pandas' index).
    """
    try:
        rows = list(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    cells = rows[0] if len(rows) == 1 else []
    if header is not None:
        return len(cells) == len(header) > 1
    if delimiter == ",":
        return len(cells) > 1
    named = {cell.strip() for cell in cells} - {""}
    return len(named) > 1 and len(named) >= len(cells) - 1


def _without_mark(text: str) -> str:
    return text.removeprefix("\ufeff")


def _rows_under(
    rows: Iterator[Cells], path: Path, header: list[str] | None, delimiter: str
) -> Iterator[RawRow]:
    """Cells under their column names: those of the first line, or the ones given."""
    names = _header_of(rows, path) if header is None else header
    if names is None:
        return
    if header is not None and (twice := _twice(header)) is not None:
        raise DataError(
            f"{shown(path)}: columns: '{shown_column(twice)}' stands twice; give each its own name"
        )
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
            hint = _cells_hint(path, len(cells), len(names), delimiter)
            yield RawRow(line, None, f"expected {expected}, got {len(cells)}{hint}")
            continue
        if header is not None and not num_before and cells == header:
            raise DataError(f"{shown(path)}:{line}: {Advice.HAS_HEADER.line()}")
        num_before += 1
        yield RawRow(line, dict(zip(names, cells, strict=True)))


def _cells_hint(path: Path, got: int, expected: int, delimiter: str) -> str:
    is_csv = kind_of(path).kind == "csv"
    sign = DELIMITERS.get(delimiter, f"'{delimiter}'")
    if got > expected and is_csv:
        return f"; a cell that holds {sign} must stand in quotes"
    if got == 1:
        return (
            (f"; {sign} separates the cells of the first line" if delimiter != "," else "")
            if is_csv
            else ("; is it a csv file?")
        )
    return ""


def _header_of(rows: Iterator[Cells], path: Path) -> list[str] | None:
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
        raise DataError(f"{shown(path)}:{line}: {Advice.TWICE_IN_HEADER.line(column=shown_column(twice))}")
    return names


def _twice(names: Sequence[str]) -> str | None:
    """The first name that stands there again."""
    return next((name for at, name in enumerate(names) if name in names[:at]), None)


def _tsv_cells(lines: Iterable[bytes]) -> Iterator[Cells]:
    for line in text_lines(lines, 1):
        if isinstance(line, RawRow):
            yield line
        elif line[1]:
            yield line[0], line[1].split("\t")


class _CsvLines:
    """Lines for the csv module, which wants text with line ends; remembers where it is and what was odd."""

    def __init__(self, lines: Iterable[bytes], delimiter: str) -> None:
        self._lines, self._delimiter = lines, delimiter
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
        whole_cells = re.match(_WHOLE_CELLS.replace(",", re.escape(self._delimiter)), text)
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
        if self.number == 1:
            text = _without_mark(text)
            text = "\n" if _STATED_DELIMITER.fullmatch(text.rstrip("\r\n")) else text
        if "\0" in text:
            self.problem = self.problem or with_nul(self.number, text)
        return text


def _csv_cells(lines: Iterable[bytes], path: Path, delimiter: str) -> Iterator[Cells]:
    csv.field_size_limit(MAX_CELL_CHARS)  # of the process; the default, 131072, is no text's limit
    feed = _CsvLines(lines, delimiter)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
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
