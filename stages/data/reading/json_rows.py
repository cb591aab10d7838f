"""JSON: lines or a whole text -> rows of columns, with words of our own for what is wrong where.

    jsonl lines --jsonl_rows--> RawRow        json text --json_rows--> RawRow

Owns JSON syntax and its error lines. Does not own files (files) or what a row means (schemas). Light import.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages.data.reading.files import shown
from stages.data.reading.rows.advice import Advice
from stages.data.reading.rows.guesses import LIKELY
from stages.data.reading.rows.wording import described, listed, not_utf8
from stages.errors import DataError


class RawRow(NamedTuple):
    """A row before its schema: its columns, or what is wrong with it."""

    line: int  # where it starts, from 1; of parquet and hub datasets: the row
    columns: dict[str, Any] | None
    problem: str = ""


_NO_LINES = "; a list or multi-line objects: name it .json"
_decode = json.JSONDecoder().decode


def jsonl_rows(lines: Iterable[bytes], first_line: int) -> Iterator[RawRow]:
    """One object per line; blank lines are passed over, a byte order mark at the start too."""
    for number, data in enumerate(lines, start=first_line):
        try:
            value = _decode(data.decode())
        except (ValueError, RecursionError):
            row = _odd_line(data, number)
            if row is not None:
                yield row
            continue
        yield _line_row(value, number)


def _odd_line(data: bytes, number: int) -> RawRow | None:
    """A line that is not simply a JSON value: blank, after a byte order mark, or wrong."""
    text = decoded(data, number)
    if not isinstance(text, str):
        return text
    if not text.strip():
        return None
    try:
        return _line_row(_decode(text), number)
    except (ValueError, RecursionError) as error:
        opens_more = number == 1 and (text.startswith("[") or text.strip() == "{")
        return RawRow(number, None, json_problem(error, text) + (_NO_LINES if opens_more else ""))


def _line_row(value: Any, number: int) -> RawRow:
    if number == 1 and isinstance(value, dict) and value.keys() == {"type", "instances"}:
        return RawRow(number, None, Advice.LIST_IN_A_LINE.line(key="instances"))
    row = row_of(value, number)
    return row._replace(problem=row.problem + _NO_LINES) if number == 1 and isinstance(value, list) else row


def decoded(data: bytes, number: int) -> str | RawRow:
    """The text of line `number` without byte order mark and line end, or the row that says what is wrong."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return RawRow(number, None, not_utf8(data))
    return (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")


def row_of(value: Any, line: int) -> RawRow:
    """The row that a JSON value is."""
    if isinstance(value, dict):
        problem = _shape_of(value)
        return RawRow(line, None, problem) if problem else RawRow(line, value)
    return RawRow(line, None, f"expected an object {{column: value}}, got {described(value)}")


def _shape_of(value: dict[str, Any]) -> str:
    """What an object is that holds many rows; empty: it is one row."""
    kind = type(next(iter(value.values()), None))
    if kind not in (dict, list) or any(type(cells) is not kind for cells in value.values()):
        return ""
    if value.keys() == {"columns", "index", "data"}:  # pandas' split
        return Advice.TABLE_BY_COLUMNS.line(shape="{columns: [names], index: [numbers], data: [[values]]}")
    if kind is list:
        return Advice.LISTS_BY_COLUMN.line() if _are_columns(value) else ""
    first = next(iter(value.values())).keys()
    if first and all(map(str.isdecimal, first)) and all(cells.keys() == first for cells in value.values()):
        return Advice.TABLE_BY_COLUMNS.line(shape="{column: {row: value}}")
    if first and all(map(str.isdecimal, value)):
        return Advice.TABLE_BY_COLUMNS.line(shape="{row: {column: value}}")
    return ""


def _are_columns(lists: dict[str, list[Any]]) -> bool:
    """Whether lists hold a cell per row. Objects may be the messages or responses of one row, numbers alone
    its token ids.
    """
    cells = [cell for one in lists.values() for cell in one]
    is_even = len({len(one) for one in lists.values()}) == 1 and lists.keys() - {"messages", "conversations"}
    return bool(
        is_even
        and any(isinstance(cell, str | list) for cell in cells)
        and not any(isinstance(cell, dict) for cell in cells)
    )


_SPACE = re.compile(r"[ \t\n\r]*")


def json_rows(lines: Iterable[bytes], path: Path) -> Iterator[RawRow]:
    """The elements of a list, or values one after another. A syntax error ends the file: DataError."""
    text = _whole_text(lines, path)
    at = _list_in(text, _after_space(text, 0))
    is_wrapped = text[at : at + 1] == "[" and text[_after_space(text, 0)] == "{"
    in_list = text[at : at + 1] == "["
    at = first = _after_space(text, at + in_list)
    counted_to, line_number = 0, 1
    decoder = json.JSONDecoder()
    while at < len(text) and not (in_list and text[at] == "]"):
        line_number, counted_to = line_number + text.count("\n", counted_to, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line_number
            raise DataError(f"{shown(path)}:{where}: {json_problem(error, text)}") from None
        at = _after_space(text, at)
        is_all = not in_list and counted_to == first and at == len(text)
        problem = _several_lists(value) if is_all else ""
        yield RawRow(line_number, None, problem) if problem else row_of(value, line_number)
        if in_list and text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif in_list and at < len(text) and text[at] != "]":
            line_number += text.count("\n", counted_to, at)
            column = at - text.rfind("\n", 0, at)
            raise DataError(
                f"{shown(path)}:{line_number}: not valid JSON: missing ',' or ']' (column {column})"
            )
    if in_list and not is_wrapped:  # else what is around the list was read whole
        _check_end(text, at, path)


_WRAPPERS = ("data", "rows", "examples", "train", "instances")
"""Keys of an object under which files hold their rows; LMFlow's is instances."""
_OF_A_ROW = {
    "messages",
    "conversations",
    "conversation",
    *(name for names in LIKELY.values() for name in names),
}
"""Keys beside which a list belongs to one row, such as its examples."""


def _lists_in(value: Any) -> list[str]:
    """The keys of an object that hold rows in lists; none where the object seems to be a row itself."""
    if not isinstance(value, dict) or not _OF_A_ROW.isdisjoint(value):
        return []
    return [
        key
        for key, inner in value.items()
        if isinstance(inner, list)
        and inner
        and all(isinstance(item, dict) and item.keys().isdisjoint(("role", "from")) for item in inner)
    ]


def _wrapping_key(value: Any) -> str | None:
    """The key of an object that holds all rows of a file in a list; None: it is not such an object."""
    keys = _lists_in(value)
    return keys[0] if len(keys) == 1 and keys[0] in _WRAPPERS else None


def _several_lists(value: Any) -> str:
    """What to do about a file that is one object with rows in several lists; empty: it is not."""
    keys = _lists_in(value)
    if len(keys) > 1 and {*keys} & {*_WRAPPERS}:
        return Advice.SEVERAL_LISTS.line(keys=listed(keys))
    return ""


def _list_in(text: str, start: int) -> int:
    """Where the list begins that holds all rows inside the one object that the text is; else `start`."""
    decoder = json.JSONDecoder()
    if text[start : start + 1] != "{":
        return start
    try:
        whole, end = decoder.raw_decode(text, start)
        key = _wrapping_key(whole)
        if key is None or _after_space(text, end) != len(text):
            return start
        at = _after_space(text, start + 1)
        while True:
            name, at = decoder.raw_decode(text, at)
            at = _after_space(text, _after_space(text, at) + 1)  # past the colon
            if name == key and text[at : at + 1] == "[":
                return at
            _, at = decoder.raw_decode(text, at)
            at = _after_space(text, _after_space(text, at) + 1)  # past the comma
    except (ValueError, RecursionError):
        return start


def _whole_text(lines: Iterable[bytes], path: Path) -> str:
    texts = []
    for number, data in enumerate(lines, start=1):
        text = decoded(data, number)
        if not isinstance(text, str):
            raise DataError(f"{shown(path)}:{number}: {text.problem}")
        texts.append(text)
    return "\n".join(texts)


def _check_end(text: str, at: int, path: Path) -> None:
    """The list must be closed, and be all."""
    if at >= len(text):
        line = 1 + text.count("\n")
        raise DataError(f"{shown(path)}:{line}: not valid JSON: the list is never closed")
    if _after_space(text, at + 1) < len(text):
        line = 1 + text.count("\n", 0, at)
        raise DataError(f"{shown(path)}:{line}: not valid JSON: more text after the list")


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
_JSON_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def json_problem(error: Exception, text: str) -> str:
    """What the JSON parser found, in words, with the column."""
    if isinstance(error, RecursionError):
        return "not valid JSON: nested too deeply"
    if not isinstance(error, json.JSONDecodeError):  # an integer of more than 4300 digits
        return f"not valid JSON: {str(error).partition(';')[0].lower()}"
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
