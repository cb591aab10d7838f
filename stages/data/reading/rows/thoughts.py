"""Thoughts: what an assistant thinks before it answers, in a key of its message or a column of their own.

    {role, content, reasoning_content} --thoughts_of--> text
    prompt, reasoning_content, completion --with_thoughts--> the answer, with its thoughts

Owns the names of thoughts and what else may stand under them. Does not own thoughts that stand in the content
(chat). Light import.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stages.data.reading.records import Message, Messages
from stages.data.reading.rows.cells import Cells, RowError, as_text

THOUGHTS = {"reasoning": ("reasoning_content", "reasoning", "thinking")}
"""The field of an assistant's thoughts -> the keys of a message, or columns beside an answer, looked for."""
_SETTINGS = (
    *("", "on", "off", "yes", "no", "true", "false", "none", "null", "auto", "enabled", "disabled"),
    *("minimal", "low", "medium", "high"),
)
"""How much is to be thought, in a column that could hold thoughts."""


def thoughts_of(message: Mapping[str, Any], name: str) -> str | None:
    """The assistant's thoughts beside its content, under one of their names or the same under several."""
    keys = [key for key in THOUGHTS["reasoning"] if key in message and message[key] is not None]
    return _one_of([(key, as_text(message[key], f"{name}.{key}")) for key in keys], f"{name}.")


def with_thoughts(messages: Messages, column: str, cells: Cells) -> Messages:
    """The answer in `column` with the thoughts of a column of their own. Raises RowError."""
    found = thoughts_beside(cells)
    thoughts = _one_of(found, "")
    if thoughts is None or any(_says(message, thoughts) for message in messages):
        return messages
    (first, *more) = messages
    if more or first.reasoning is not None:
        raise _unread(found[0][0], column)
    return (replace(first, reasoning=thoughts),)


def refuse_thoughts(messages: Messages, column: str, cells: Cells) -> None:
    """Raise RowError for thoughts beside the messages of `column` that none of them has."""
    for name, text in thoughts_beside(cells):
        if not any(_says(message, text) for message in messages):
            raise _unread(name, column)


def thoughts_beside(cells: Cells) -> list[tuple[str, str]]:
    """(column, text) of the columns that hold thoughts. A number, or a word such as `high`, says how much is
    to be thought: a column like any other. Raises RowError.
    """
    if cells.is_renamed("reasoning"):
        found = [cells.required("reasoning")]
    else:
        taken = cells.columns.values()
        names = [name for name in THOUGHTS["reasoning"] if name in cells.row and name not in taken]
        found = [(name, cells.row[name]) for name in names if not _is_setting(cells.row[name])]
    texts = [(name, as_text(value, name)) for name, value in found if value is not None]
    return [(name, text) for name, text in texts if text.strip()]


def _one_of(found: Sequence[tuple[str, str]], within: str) -> str | None:
    """The text that stands under several names; None: under none."""
    said = [(name, text) for name, text in found if text.strip()]
    for name, text in said:
        if text != said[0][1]:
            raise RowError(f"{within}{name}: differs from {said[0][0]}; keep one of them")
    return said[0][1] if said else None


def _is_setting(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_setting, value.values()))
    if isinstance(value, str):
        return value.strip().lower() in _SETTINGS
    return value is None or isinstance(value, bool | int | float) or value == []


def _says(message: Message, thoughts: str) -> bool:
    """Whether a message has these thoughts already, beside its content or between tags in it."""
    text = thoughts.strip()
    if message.reasoning is not None and message.reasoning.strip() == text:
        return True
    return re.search(rf"(?:^|>)\s*{re.escape(text)}\s*<", message.content) is not None


def _unread(name: str, column: str) -> RowError:
    return RowError(
        f"{name}: thoughts beside {column} are not read; write them into the assistant's message there, as "
        f"reasoning_content, or remove {name}"
    )
