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

from stages.data.reading.records import Messages, Role
from stages.data.reading.rows.advice import Advice
from stages.data.reading.rows.cells import Cells, RowError, unpacked
from stages.data.reading.rows.labels import label_of
from stages.data.reading.rows.wording import described, in_yaml, named_on_one_line, quoted

TURN_MARKS = ("weight", "train", "trainable", "loss", "loss_mask")
"""Keys of a message."""
ROW_MARKS = {"loss_mask": ("loss_mask", "loss_masks", "train", "trainable", "weight", "weights", "loss")}
"""The field of a row's list of marks -> the columns looked for."""
_ONLY_LISTS = ("loss_mask", "loss_masks")
"""Columns that hold nothing but marks."""
_BETWEEN_MARKS = re.compile(r"[\s,;|\[\]()]+")
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
    _refuse_unknown(cells, column, messages)
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
    train on, and for one that is meant as such a list and is none.
    """
    found = []
    for column in cells.columns_of("loss_mask") if cells.has_field("loss_mask") else ():
        value = _list_in(cells, column)
        if isinstance(value, list) and not any(isinstance(item, Mapping | list) for item in value):
            found.append(column)
        elif label_of(value) is False and not cells.is_renamed("loss_mask"):
            raise RowError(
                f"{column}: {quoted(value)} for a whole row; remove the row, or write one mark per message"
            )
        elif _is_meant_as_list(value, is_sure=cells.is_renamed("loss_mask") or column in _ONLY_LISTS):
            raise RowError(
                f"{column}: expected a list of marks, one per message, or its JSON text, got {_shape(value)}"
            )
    return found


def _list_in(cells: Cells, column: str) -> Any:
    value = cells.required("loss_mask")[1] if cells.is_renamed("loss_mask") else cells.row[column]
    return unpacked(value)


def _is_meant_as_list(value: Any, *, is_sure: bool) -> bool:
    """Whether a value that is no list of marks has to be one: any text of several marks, and where `is_sure`
    whatever does not mark the whole row as trained or is empty.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return False
    return bool(_spelled(value)) or (is_sure and label_of(value) is not True)


def _spelled(value: Any) -> list[bool]:
    """The marks that a text spells, but not in JSON: `0,0,0,1`, `[False, True]`; empty: it spells none."""
    words = [word for word in _BETWEEN_MARKS.split(value) if word] if isinstance(value, str) else []
    labels = [label for label in map(label_of, words) if label is not None]
    return labels if len(labels) == len(words) > 1 else []


def _shape(value: Any) -> str:
    return "a list of lists or objects" if isinstance(value, list) else described(value)


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


def _refuse_unknown(cells: Cells, field: str, messages: Messages) -> None:
    """Raise RowError for marks per message, or per answer, under a name that is none of ROW_MARKS."""
    known = {*ROW_MARKS["loss_mask"], *cells.columns.values()}
    num_answers = sum(message.role == "assistant" for message in messages)
    for column, value in cells.row.items():
        if column in known or not is_like_a_mark(column):
            continue
        values = unpacked(value)
        marks = values if isinstance(values, list) else _spelled(values)
        said = [label_of(mark) for mark in marks if mark is not None]
        if not said or None in said or (len(marks) == 1 and (said[0] or "label" in column.lower())):
            continue  # one that trains the only answer does no harm, and a label may be a class
        names = {"column": named_on_one_line(column), "messages": field}
        is_sound = marks is values and all(mark is None or is_mark(mark) for mark in marks)
        if len(marks) == len(messages) and is_sound:
            raise RowError(Advice.NOT_A_MARK_COLUMN.line(**names, mapped=in_yaml(column)))
        if len(marks) in (len(messages), num_answers):
            what = "message" if len(marks) == len(messages) else "answer"
            raise RowError(Advice.MARKS_OF_ANOTHER_FORM.line(**names, what=what))


def _holds_marks(value: Any) -> bool:
    """A mark, also as text, or a list of them, also for parts of a turn (axolotl's train_detail)."""
    if not isinstance(value, list):
        return label_of(value) is not None
    inner = [
        part[key] if isinstance(part, Mapping) else part for part in value for key in _keys_of_mark(part)
    ]
    return bool(inner) and None not in map(label_of, inner)


def _keys_of_mark(part: Any) -> list[str]:
    """The keys of a part that are named like a mark; of what has no keys one that is not looked at."""
    return [key for key in part if is_like_a_mark(key)] if isinstance(part, Mapping) else [""]


def refuse_unknown_mark(key: str, value: Any, name: str) -> None:
    """Raise RowError for a key of a message that looks like a mark and is none of TURN_MARKS."""
    if is_like_a_mark(key) and _holds_marks(value):
        shown = named_on_one_line(key)
        raise RowError(Advice.NOT_A_MARK_KEY.line(name=f"{name}.{shown}", value=quoted(value), key=shown))
