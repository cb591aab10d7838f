"""Cells: a row seen through the field names of a schema, and the errors that name its columns.

    row + columns: {field: column or path} + aliases --> Cells --> (column, value)

Owns renaming, aliases, paths into nested values, and how a value is described in one line. Does not own what
a field means (conversations, preferences, ...). Light import.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any

MAX_SHOWN = 20
"""Columns, keys and characters of a wrong word that an error lists before it says `…`."""


class RowError(Exception):
    """A malformed row: `field: what is wrong; how to fix`. The reader adds file and line."""


class Binary(str):
    """Bytes of a table that are not UTF-8, in base64: a column to carry along, but no text."""


class Cells:
    """One row as a schema reads it.

    A field is read from the column the config names (`columns:`), else from the first of its aliases that the
    row has and the config has not given to another field. `completion: instances.0.output` is a path: object
    keys and list indices between dots; a column whose own name is that text wins over the path.
    """

    def __init__(
        self,
        row: Mapping[str, Any],
        columns: Mapping[str, str],
        aliases: Mapping[str, tuple[str, ...]],
        min_margin: float = 0.0,
    ):
        self.row, self.columns, self.min_margin = row, columns, min_margin
        self._aliases = aliases

    def column(self, field: str) -> str | None:
        """The column, or path, that holds the field in this row."""
        if field in self.columns:
            return self.columns[field] if self._is_there(self.columns[field]) else None
        found = self.first_of(self._aliases[field])
        return None if found is None else found[0]

    def is_renamed(self, field: str) -> bool:
        """Whether the config names this field's column."""
        return field in self.columns

    def required(self, field: str) -> tuple[str, Any]:
        """(column, value) of a field that must be there."""
        column = self.column(field)
        if column is None:
            name = self.columns[field] if self.is_renamed(field) else field
            raise RowError(f"{named_on_one_line(name)}: {self._absence(name)} - set columns: {{{field}: …}}")
        return column, self._value(column)

    def optional(self, field: str) -> tuple[str, Any] | None:
        """(column, value) of a field that may be absent or null; not where the config names its column."""
        if self.column(field) is None and not self.is_renamed(field):
            return None
        column, value = self.required(field)
        return None if value is None else (column, value)

    def first_of(self, aliases: Iterable[str]) -> tuple[str, Any] | None:
        """(column, value) of the first of these columns that the row has and no field was given."""
        taken = self.columns.values()
        alias = next((alias for alias in aliases if alias in self.row and alias not in taken), None)
        return None if alias is None else (alias, self.row[alias])

    def text(self, field: str) -> str:
        """A field that must be text."""
        column, value = self.required(field)
        return as_text(value, column)

    def rest(self, *fields: str) -> dict[str, Any]:
        """The row without the columns of these fields; a column that a path leads into stays."""
        used = {self.column(field) for field in fields}
        return {column: value for column, value in self.row.items() if column not in used}

    def _is_there(self, column: str) -> bool:
        return column in self.row or ("." in column and not isinstance(self._reached(column), _Break))

    def _value(self, column: str) -> Any:
        return self.row[column] if column in self.row else self._reached(column)

    def _reached(self, path: str) -> Any:
        """What the path leads to in the row, or where it breaks."""
        value: Any = self.row
        parts = path.split(".")
        for depth, part in enumerate(parts):
            problem = _missing_part(value, part, ".".join(parts[:depth]))
            if problem:
                return _Break(problem, depth)
            value = value[int(part)] if isinstance(value, list) else value[part]
        return value

    def _absence(self, name: str) -> str:
        reached = self._reached(name)
        if isinstance(reached, _Break) and reached.depth > 0:
            return reached.problem
        return f"missing; columns are {listed(self.row)}"


class _Break:
    """Where a path leads nowhere."""

    def __init__(self, problem: str, depth: int) -> None:
        self.problem, self.depth = problem, depth


def _missing_part(value: Any, part: str, parent: str) -> str:
    """What keeps `part` from being found in `value`, the value at `parent`; empty: nothing."""
    if isinstance(value, list):
        if not part.removeprefix("-").isdecimal() or not part.isascii():
            return f"{parent} is a list: '{part}' is no index, such as {parent}.0"
        return (
            ""
            if -len(value) <= int(part) < len(value)
            else f"{parent} has {len(value)} items, none at {part}"
        )
    if isinstance(value, Mapping):
        return "" if part in value else f"{parent} has no '{part}'; its keys are {listed(value)}"
    return f"{parent} is {described(value)}, so it has no '{part}'"


def as_text(value: Any, name: str) -> str:
    """`value`, which must be text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise RowError(f"{name}: expected text, got {described(value)}")
    if isinstance(value, Binary):
        raise RowError(f"{name}: {not_utf8(base64.b64decode(value))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{name}: half a surrogate pair (\\u{ord(value[error.start]):04x}) at character "
            f"{error.start + 1}; it is no text"
        ) from None
    return value


def unpacked(value: Any) -> Any:
    """`value`, or the list whose JSON it is: how a list stands in a table of text."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list) else value


def not_utf8(data: bytes) -> str:
    """What is wrong with bytes that are not UTF-8, and where."""
    sound = data.decode(errors="surrogateescape")
    column = next(at for at, sign in enumerate(sound, start=1) if "\udc80" <= sign <= "\udcff")
    return f"not UTF-8 (byte 0x{ord(sound[column - 1]) - 0xDC00:02X} at column {column}); convert with iconv"


def described(value: Any) -> str:
    """A JSON value in words, short: `number 7`, `null`, `list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        shown = str(value) if isinstance(value, float) or abs(value) < 10**20 else "too long to show"
        return f"number {shown}"
    name = type(value).__name__
    return {"str": "text", "dict": "object", "Binary": "bytes"}.get(name, name)


def filled(text: str, name: str, what: str) -> str:
    """`text`, which must hold more than white space."""
    if not text.strip():
        raise RowError(f"{name}: empty {what}; remove the row, or set on_bad_row: skip")
    return text


def listed(names: Iterable[Any]) -> str:
    """Column names or keys for an error: one line, the first MAX_SHOWN of them."""
    shown = [named_on_one_line(str(name)) for name in names]
    more = [f"… {len(shown) - MAX_SHOWN} more"] if len(shown) > MAX_SHOWN else []
    return ", ".join(shown[:MAX_SHOWN] + more) or "none"


def named_on_one_line(name: str) -> str:
    """A name from the data for an error: control characters and lone surrogates escaped."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)


def shortened(word: str) -> str:
    """A wrong word from the data for an error: escaped and cut."""
    return named_on_one_line(word[:MAX_SHOWN]) + ("…" if len(word) > MAX_SHOWN else "")
