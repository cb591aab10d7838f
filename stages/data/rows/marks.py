"""Marks: which assistant turns a row of sft says are trained.

    {role, content, train: false}            one turn
    messages: […], loss_mask: [0, 0, 0, 1]   one mark per message

Owns the names of marks and what they may hold. Does not own where nothing is imitated (prompts, preferences):
there a mark is a key like any other. Light import.

Every name says the same: 1 or true, the turn is trained; 0 or false, it is context. Only assistant turns are
trained, so a true mark on another turn is refused. A turn without a mark is trained. Two marks of one turn
have to agree.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stages.data.records import Messages, Role
from stages.data.rows.advice import Advice
from stages.data.rows.cells import Cells, RowError, unpacked
from stages.data.rows.wording import described, in_yaml, named_on_one_line

TURN_MARKS = ("weight", "train", "trainable", "loss", "loss_mask")
"""Keys of a message."""
ROW_MARKS = {"loss_mask": ("loss_mask", "loss_masks", "train", "trainable", "weight", "weights", "loss")}
"""The field of a row's list of marks -> the columns looked for."""
_LIKE_A_MARK = re.compile("mask|loss|train|weight|label", re.IGNORECASE)


def is_mark(value: Any) -> bool:
    """Whether a value can be a mark: true or false, or a number that is 1 or 0."""
    return isinstance(value, bool | int | float) and value in (0, 1)


def is_like_a_mark(name: str) -> bool:
    """Whether a name sounds like one of a mark."""
    return _LIKE_A_MARK.search(name) is not None


def mark_of(turn: Mapping[str, Any], name: str, role: Role) -> bool | None:
    """What the keys of a turn say; None: nothing. Raises RowError."""
    return _agreed(
        (f"{name}.{key}", _as_mark(turn[key], f"{name}.{key}", role))
        for key in TURN_MARKS
        if key in turn and turn[key] is not None
    )


def marked(cells: Cells, column: str, turns: Sequence[Any], messages: Messages) -> Messages:
    """The messages of `column`, read from `turns`, with the marks of the row's lists. Raises RowError."""
    if not cells.is_imitated:
        return messages
    _refuse_unknown(cells, column, len(messages))
    lists = [list(_marks_in(cells, name, column, messages)) for name in mark_columns(cells)]
    if not lists:
        return messages
    found = []
    for index, (turn, message) in enumerate(zip(turns, messages, strict=True)):
        own = mark_of(turn, f"{column}[{index}]", message.role)
        marks = [(f"{column}[{index}]", own)] if own is not None else []
        is_trained = _agreed((*marks, *(one[index] for one in lists if one[index][1] is not None)))
        is_left_out = is_trained is False and message.role == "assistant"
        found.append(replace(message, is_trained=False) if is_left_out else message)
    return tuple(found)


def refuse_lists(cells: Cells) -> None:
    """Raise RowError where a row that is no list of messages has marks for each."""
    columns = mark_columns(cells)
    if columns:
        raise RowError(
            f"{columns[0]}: marks are read beside messages or conversations, one per message; write the row "
            f"so, or remove {columns[0]}"
        )


def mark_columns(cells: Cells) -> list[str]:
    """The columns that hold a list of marks. Raises RowError for one that marks the whole row as no text to
    train on.
    """
    found = []
    for column in cells.columns_of("loss_mask") if cells.has_field("loss_mask") else ():
        value = _list_in(cells, column)
        if isinstance(value, list) and not any(isinstance(item, Mapping | list) for item in value):
            found.append(column)
        elif cells.is_renamed("loss_mask") and value is not None:
            raise RowError(f"{column}: expected a list of marks, one per message, got {described(value)}")
        elif _says_no(value):
            raise RowError(
                f"{column}: {described(value)} for a whole row; remove the row, or write one mark per message"
            )
    return found


def _list_in(cells: Cells, column: str) -> Any:
    value = cells.required("loss_mask")[1] if cells.is_renamed("loss_mask") else cells.row[column]
    return unpacked(value)


def _says_no(value: Any) -> bool:
    return (is_mark(value) and not value) or (isinstance(value, str) and value.strip().lower() == "false")


def _marks_in(cells: Cells, column: str, field: str, messages: Messages) -> Iterator[tuple[str, bool | None]]:
    values = _list_in(cells, column)
    if len(values) != len(messages):
        raise RowError(
            f"{column}: {len(values)} marks for {len(messages)} messages in {field}; write one per message"
        )
    for index, (value, message) in enumerate(zip(values, messages, strict=True)):
        name = f"{column}[{index}]"
        yield name, None if value is None else _as_mark(value, name, message.role)


def _as_mark(value: Any, name: str, role: Role) -> bool:
    if not is_mark(value):
        raise RowError(
            f"{name}: expected 0 or 1, true or false, got {described(value)}: a turn is trained or not; "
            "round it, or weigh whole rows by the weight of their source"
        )
    if value and role != "assistant":
        raise RowError(
            f"{name}: {described(value)} on a {role} turn, but only assistant turns are trained; "
            "write 0, or remove it"
        )
    return bool(value)


def _agreed(marks: Iterable[tuple[str, bool | None]]) -> bool | None:
    """What the marks of one turn, which are named, say together."""
    first: tuple[str, bool | None] | None = None
    for name, mark in marks:
        if first is not None and mark is not first[1]:
            raise RowError(f"{name}: contradicts {first[0]}; keep one of them")
        first = first or (name, mark)
    return None if first is None else first[1]


def _refuse_unknown(cells: Cells, field: str, num_messages: int) -> None:
    """Raise RowError for a list of a mark per message under a name that is none of ROW_MARKS."""
    known = {*ROW_MARKS["loss_mask"], *cells.columns.values()}
    for column, value in cells.row.items():
        if column in known or not is_like_a_mark(column):
            continue
        marks = unpacked(value)
        if isinstance(marks, list) and len(marks) == num_messages > 1 and all(map(is_mark, marks)):
            raise RowError(
                Advice.NOT_A_MARK_COLUMN.line(
                    column=named_on_one_line(column), messages=field, mapped=in_yaml(column)
                )
            )


def _holds_marks(value: Any) -> bool:
    """A mark, or a list of them, also for parts of a turn (axolotl's train_detail)."""
    if not isinstance(value, list):
        return is_mark(value)
    inner = [
        part[key] if isinstance(part, Mapping) else part for part in value for key in _keys_of_mark(part)
    ]
    return bool(inner) and all(map(is_mark, inner))


def _keys_of_mark(part: Any) -> list[str]:
    """The keys of a part that are named like a mark; of what has no keys one that is not looked at."""
    return [key for key in part if is_like_a_mark(key)] if isinstance(part, Mapping) else [""]


def refuse_unknown_mark(key: str, value: Any, name: str) -> None:
    """Raise RowError for a key of a message that looks like a mark and is none of TURN_MARKS."""
    if is_like_a_mark(key) and _holds_marks(value):
        shown = named_on_one_line(key)
        raise RowError(Advice.NOT_A_MARK_KEY.line(name=f"{name}.{shown}", value=described(value), key=shown))
