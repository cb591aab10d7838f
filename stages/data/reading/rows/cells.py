"""Cells: a row seen through the field names of a schema, and the errors that name its columns.

    row + columns: {field: column or path} + aliases --> Cells --> (column, value)

Owns renaming, aliases, paths into nested values, and lists that stand in a cell as text. Does not own what a
field means (conversations, preferences, ...) or what an error advises (advice). Light import.
"""

import base64
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.data.reading.rows.advice import Advice
from stages.data.reading.rows.wording import described, listed, named_on_one_line, not_utf8


class RowError(Exception):
    """A malformed row: `field: what is wrong; how to fix`. The reader adds file and line."""


class Binary(str):
    """Bytes of a table that are not UTF-8, in base64: a column to carry along, but no text."""


class Cells:
    """One row as a schema reads it.

    A field is read from the column the config names (`columns:`), else from the first of its aliases that the
    row has and the config has not given to another field. `completion: instances.0.output` is a path: object
    keys and list indices between dots, `*` for all items of a list (`scores: answers.*.pm_score`), inside a
    cell of JSON text too; a column whose own name is that text wins over the path.
    """

    def __init__(
        self,
        row: Mapping[str, Any],
        columns: Mapping[str, str],
        aliases: Mapping[str, tuple[str, ...]],
        min_margin: float = 0.0,
        *,
        is_imitated: bool = False,
        is_padded: bool = False,
        group_column: str | None = None,
    ):
        self.row, self.columns, self.min_margin = row, columns, min_margin
        self.is_imitated = is_imitated  # assistant turns are trained as they stand: training marks count
        self.is_padded = is_padded  # of an Arrow table: an object holds null for every key of other rows
        self.group_column = group_column  # a column that the stage reads by itself
        self.unread_keys = defaultdict[str, int](int)  # key of a message that nobody reads -> how often
        self.shared_prompt: str | None = None  # that no column holds: what two texts begin with
        self._aliases = aliases

    def through(
        self, columns: Mapping[str, str], aliases: Mapping[str, tuple[str, ...]], *, is_imitated: bool
    ) -> "Cells":
        """The same row through another schema; what is said of it comes to both."""
        cells = Cells(
            self.row,
            columns,
            aliases,
            self.min_margin,
            is_imitated=is_imitated,
            is_padded=self.is_padded,
            group_column=self.group_column,
        )
        cells.unread_keys = self.unread_keys
        return cells

    def has_field(self, field: str) -> bool:
        """Whether the schema knows the field."""
        return field in self._aliases

    def column(self, field: str) -> str | None:
        """The column, or path, that holds the field in this row."""
        if field in self.columns:
            return self.columns[field] if self._is_there(self.columns[field]) else None
        found = self.first_of(self._aliases[field])
        return None if found is None else found[0]

    def columns_read(self) -> dict[str, str]:
        """Field -> the column that holds it, of the fields that the row has."""
        columns = {field: self.column(field) for field in self._aliases}
        return {field: column for field, column in columns.items() if column is not None}

    def columns_of(self, field: str) -> list[str]:
        """Every column that holds the field: the one the config names, else all of its aliases."""
        if field in self.columns:
            return [self.required(field)[0]]
        taken = self.columns.values()
        return [alias for alias in self._aliases[field] if alias in self.row and alias not in taken]

    def is_renamed(self, field: str) -> bool:
        """Whether the config names this field's column."""
        return field in self.columns

    def required(self, field: str) -> tuple[str, Any]:
        """(column, value) of a field that must be there."""
        column = self.column(field)
        if column is None:
            name = self.columns[field] if self.is_renamed(field) else field
            raise RowError(
                Advice.BROKEN_PATH.line(
                    path=named_on_one_line(name), problem=self._absence(name), field=field
                )
            )
        return column, self._value(column)

    def optional(self, field: str) -> tuple[str, Any] | None:
        """(column, value) of a field that may be absent or null; not where the config names its column."""
        if self.column(field) is None and not self.is_renamed(field):
            return None
        column, value = self.required(field)
        return None if value is None else (column, value)

    def first_of(self, aliases: Iterable[str]) -> tuple[str, Any] | None:
        """(column, value) of the first of these columns that the row has and no field was given."""
        for alias in aliases:  # of every row, and so no generator
            if alias in self.row and alias not in self.columns.values():
                return alias, self.row[alias]
        return None

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
        return _followed(self.row, path.split("."), 0)

    def _absence(self, name: str) -> str:
        reached = self._reached(name)
        if isinstance(reached, _Break) and reached.depth > 0:
            return reached.problem
        return f"missing; columns are {listed(self.row)}"


class _Break:
    """Where a path leads nowhere."""

    def __init__(self, problem: str, depth: int) -> None:
        self.problem, self.depth = problem, depth


def _followed(value: Any, parts: Sequence[str], start: int) -> Any:
    """What `parts[start:]` lead to from `value`, or where they break."""
    for depth in range(start, len(parts)):
        part, value = parts[depth], unpacked(value)  # in a table of text it is JSON
        if part == "*" and isinstance(value, list):
            found = [_followed(item, parts, depth + 1) for item in value]
            return next((one for one in found if isinstance(one, _Break)), found)
        problem = _missing_part(value, part, ".".join(parts[:depth]))
        if problem:
            return _Break(problem, depth)
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


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
    """`value`, or the list or object whose JSON it is: how these stand in a table of text."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


_PYTHON = re.compile(r"\s*(?:array\()?[\[{][\s\[{]*'")


def unlike(value: Any, name: str, expected: str) -> RowError:
    """The error about a value that should be `expected`, a list or an object, or its JSON text."""
    if isinstance(value, str) and _PYTHON.match(value):
        return RowError(Advice.PYTHON_REPR.line(name=name))
    return RowError(f"{name}: expected {expected}, got {described(value)}")


def filled(text: str, name: str, what: str) -> str:
    """`text`, which must hold more than white space."""
    if not text.strip():
        raise RowError(f"{name}: empty {what}; remove the row, or set on_bad_row: skip")
    return text
