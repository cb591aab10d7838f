"""Turns: text, one message or a list of messages, in the key and role names of any tool -> Messages.

    {role, content} | {from, value} | content parts --as_messages--> (Message, ...)

Owns key names, role names, content parts, which keys nobody reads, and what no chat template can take. Does
not own which column a message stands in (conversations, preferences, prompts), calls (calls), thoughts
(thoughts) or training marks (marks). Light import.

A message may hold role/content (OpenAI, TRL) or from/value (ShareGPT), wherever it stands. Content is text,
or a list of `{type: text, text: …}` parts, which are joined as they are. Beside a call it may be absent.
Parts that are no text are refused: only text is trained, and leaving them out would change what the turn
says. Keys that are not read are counted. Two turns of one role in a row stay as they are: templates take
them. A system message stands first or not at all.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from stages.data.reading.records import Message, Messages, Role
from stages.data.reading.rows.advice import Advice
from stages.data.reading.rows.calls import CALL_KEYS, as_calls, calls_of
from stages.data.reading.rows.cells import Cells, RowError, as_text, filled, unlike, unpacked
from stages.data.reading.rows.marks import TURN_MARKS, mark_of, marked, refuse_unknown_mark
from stages.data.reading.rows.thoughts import THOUGHTS, thoughts_of
from stages.data.reading.rows.wording import described, listed, shortened

ROLE_OF: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "chat": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Names of a role in the wild -> the role."""
_CALLERS = ("function_call", "tool_call")
"""Roles whose content is a call, as ShareGPT's descendants write it."""
_CONTENT_ELSEWHERE = {
    "text": "content",
    "parts": "content, a text or a list of {type: text, text: …}",
    "thought": "reasoning_content",
}
"""Keys that hold what a turn says where its content is empty -> what is read."""

_UNREAD = {
    "images": "images are not read",
    "videos": "videos are not read",
    "audios": "audio is not read",
}
"""Columns beside a conversation, or keys of a message, without which it would not mean the same, where they
hold a list.
"""
_TOOLS = ("tools", "functions")


def as_role(value: Any, name: str) -> Role:
    """The role behind any of its names."""
    role = as_text(value, name)
    if role not in ROLE_OF:
        raise RowError(f"{name}: unknown role '{shortened(role)}'; use {', '.join(get_args(Role))}")
    return ROLE_OF[role]


def as_message(value: Any, name: str, cells: Cells) -> Message:
    """`{role, content}` or `{from, value}` -> Message. Raises RowError."""
    if not isinstance(value, Mapping):
        raise RowError(f"{name}: expected a message {{role, content}}, got {described(value)}")
    role_key, content_key = _keys(value)
    if role_key not in value:
        raise RowError(f"{name}.{role_key}: missing; keys are {listed(value)}")
    role = as_role(value[role_key], f"{name}.{role_key}")
    has_content = content_key in value
    said = value[content_key] if has_content else None
    if len(value) == 2 and has_content and value[role_key] not in _CALLERS:
        content = as_content(said, f"{name}.{content_key}")
        return Message(role=role, content=_filled(content, role, f"{name}.{content_key}"))

    calls = calls_of(value, name, cells)
    if calls and role != "assistant":
        raise RowError(f"{name}: a call on a {role} turn; only the assistant calls tools")
    if value[role_key] in _CALLERS and not calls:
        calls, said = as_calls(said, f"{name}.{content_key}", cells), None
    _check_content_elsewhere(value, said, name)
    if said is None and calls:
        content = ""
    elif not has_content:
        raise RowError(f"{name}.{content_key}: missing; keys are {listed(value)}")
    else:
        content = as_content(said, f"{name}.{content_key}")
    _count_unread(value, {role_key, content_key, *_read_of(role, cells)}, name, cells)
    is_marked_out = cells.is_imitated and mark_of(value, name, role) is False and role == "assistant"
    return Message(
        role=role,
        content=content if calls else _filled(content, role, f"{name}.{content_key}"),
        reasoning=thoughts_of(value, name) if role == "assistant" else None,
        tool_calls=calls,
        tool_call_id=_text_of(value, "tool_call_id", name) if role == "tool" else None,
        name=_text_of(value, "name", name) if role == "tool" else None,
        is_trained=not is_marked_out,
    )


def _keys(message: Mapping[str, Any]) -> tuple[str, str]:
    """(role key, content key): each as it is there; tables fill the unused ones with null."""
    if "role" in message and "content" in message and None not in (message["role"], message["content"]):
        return "role", "content"
    is_sharegpt = [
        new in message and (old not in message or message[old] is None)
        for old, new in (("role", "from"), ("content", "value"))
    ]
    if "role" not in message and "content" not in message and any(is_sharegpt):
        return "from", "value"
    return "from" if is_sharegpt[0] else "role", "value" if is_sharegpt[1] else "content"


def _filled(content: str, role: Role, name: str) -> str:
    if role in ("user", "assistant"):
        filled(content, name, "response" if role == "assistant" else "prompt")
    return content


def _text_of(message: Mapping[str, Any], key: str, name: str) -> str | None:
    if key not in message or message[key] is None:
        return None
    return as_text(message[key], f"{name}.{key}")


def _check_content_elsewhere(message: Mapping[str, Any], said: Any, name: str) -> None:
    """Raise RowError where the content is empty and another key seems to hold it."""
    if said not in (None, [], {}) and not (isinstance(said, str) and not said.strip()):
        return
    for key, meant in _CONTENT_ELSEWHERE.items():
        if key in message and not _is_nothing(message[key]):
            raise RowError(f"{name}.{key}: not read, and the content is empty; write it as {meant}")


def _read_of(role: Role, cells: Cells) -> tuple[str, ...]:
    """The keys that are read of a turn of that role, beside role and content."""
    marks = TURN_MARKS if cells.is_imitated else ()
    match role:
        case "assistant":
            return (*CALL_KEYS, *THOUGHTS["reasoning"], *marks)
        case "tool":
            return ("tool_call_id", "name", *marks)
    return marks


def _count_unread(message: Mapping[str, Any], read: set[str], name: str, cells: Cells) -> None:
    """Count the keys of a message that nobody reads; raise RowError for those that cannot be left out."""
    for key, value in message.items():
        if key in read or _is_nothing(value):
            continue
        if key in _UNREAD and isinstance(value, list):
            raise RowError(f"{name}.{key}: {_UNREAD[key]}; remove the row, or set on_bad_row: skip")
        if key in _TOOLS and isinstance(unpacked(value), list | Mapping):
            raise RowError(f"{name}.{key}: tools are read beside the messages; move them to a column {key}")
        if cells.is_imitated:
            refuse_unknown_mark(str(key), value, name)
        cells.unread_keys[shortened(str(key))] += 1


def _is_nothing(value: Any) -> bool:
    """What a table or a tool writes where there is nothing to say."""
    return value is None or (not isinstance(value, bool | int | float) and not value)


def as_content(value: Any, name: str) -> str:
    """Text, or a list of text parts joined."""
    if not isinstance(value, list):
        return as_text(value, name)
    return "".join(_part(part, f"{name}[{index}]") for index, part in enumerate(value))


def _part(part: Any, name: str) -> str:
    if not isinstance(part, Mapping) or "type" not in part:
        raise RowError(f"{name}: expected a part {{type: text, text: …}}, got {described(part)}")
    if part["type"] != "text":
        kind = shortened(part["type"]) if isinstance(part["type"], str) else described(part["type"])
        raise RowError(f"{name}.type: only text parts are read, not {kind}")
    if "text" not in part:
        raise RowError(f"{name}.text: missing; keys are {listed(part)}")
    return as_text(part["text"], f"{name}.text")


def as_messages(value: Any, name: str, role: Literal["user", "assistant"], cells: Cells) -> Messages:
    """Text (one message of `role`, or the JSON of messages), one message, or a list of messages; of a prompt
    (`user`), the assistant's is not the first. Raises RowError.
    """
    value = unpacked_messages(value, name)
    if isinstance(value, str):
        text = filled(as_text(value, name), name, "response" if role == "assistant" else "prompt")
        return (Message(role=role, content=text),)
    if isinstance(value, Mapping):
        messages: Messages = (as_message(value, name, cells),)
    elif isinstance(value, list):
        messages = tuple(as_message(item, f"{name}[{index}]", cells) for index, item in enumerate(value))
    else:
        raise RowError(f"{name}: expected text, got {described(value)}")
    if not messages:
        raise RowError(f"{name}: no messages")
    if role == "user" and messages[0].role == "assistant":
        raise RowError(f"{name}[0]: starts with the assistant: no prompt")
    late = next((index for index, message in enumerate(messages) if index and message.role == "system"), None)
    if late is not None:
        raise RowError(
            f"{name}[{late}]: a system message after the first message; templates take it first only"
        )
    return messages


_KEY = "(?:role|from|content|value)"
_BEGINS_LIKE_MESSAGES = re.compile(rf'\s*\[?\s*\{{\s*"{_KEY}"\s*:')
_BEGINS_LIKE_PYTHON = re.compile(rf"\s*(?:array\()?\[?\s*\{{\s*'{_KEY}'\s*:")
_NAMES_A_ROLE = re.compile(
    r"\s*(array\()?\[?\s*\{[^\[\]{}]{0,200}?"
    rf"(['\"])(?:role|from)\2\s*:\s*(['\"])(?:{'|'.join(ROLE_OF)})\3",
    re.IGNORECASE,
)
"""The first object has a role that is known, whatever stands before it; how it is quoted."""


def unpacked_messages(value: Any, name: str) -> Any:
    """`value`, or the messages whose JSON it is: how they stand in a table of text. Raises RowError for what
    was meant as such and is none.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "array(")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        _refuse_broken_messages(value, name, error)
        return value
    return found if _are_messages(found) else value


def _refuse_broken_messages(text: str, name: str, error: Exception) -> None:
    """Raise RowError for text that begins like messages, which `error` keeps from being read as JSON."""
    role = _NAMES_A_ROLE.match(text)
    if _BEGINS_LIKE_PYTHON.match(text) or (role is not None and (role[1] or "'" in role[2] + role[3])):
        raise RowError(Advice.PYTHON_REPR.line(name=name))
    if (role is not None or _BEGINS_LIKE_MESSAGES.match(text)) and not _quotes_an_object(text):
        where = f" (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else ""
        raise RowError(f"{name}: begins like the JSON of messages, but is not valid JSON{where}")


def _quotes_an_object(text: str) -> bool:
    """Whether a text begins with a JSON object and goes on in words: it speaks of one."""
    text = text.strip()
    try:
        found, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not text[end:].lstrip().startswith(("{", "[", ","))


def _are_messages(found: Any) -> bool:
    """One message with a role that is known, or a list of them, or of objects with nothing but role and
    content: other JSON is a text like any other.
    """
    turns = found if isinstance(found, list) else [found]
    if not turns or not all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):
        return False
    if found is turns and all(map(_is_bare, turns)):
        return True  # a role that is not known is named then
    if found is not turns and not any(
        {*keys} <= found.keys() for keys in (("role", "content"), ("from", "value"))
    ):
        return False
    roles = [turn[key] for turn in turns for key in ("role", "from") if _is_text(turn, key)]
    return any(role.lower() in ROLE_OF for role in roles)


def _is_bare(turn: Mapping[str, Any]) -> bool:
    """Whether an object has a role and a content, and nothing else."""
    return any(
        turn.keys() == {role, content} and _is_text(turn, role) and isinstance(turn[content], str | list)
        for role, content in (("role", "content"), ("from", "value"))
    )


def _is_text(turn: Mapping[str, Any], key: str) -> bool:
    return key in turn and isinstance(turn[key], str)


def listed_messages(cells: Cells, field: str) -> tuple[str, Messages]:
    """(column, messages) of a field that must hold a list of messages, after the row's `system` column."""
    column, value = cells.required(field)
    value = unpacked(value)
    if not isinstance(value, list):
        unpacked_messages(value, column)  # names what was meant as one
        raise unlike(value, column, "a list of messages")
    messages = marked(cells, column, value, as_messages(value, column, "user", cells))
    return column, with_system(cells, messages)


def with_system(cells: Cells, messages: Messages) -> Messages:
    """The messages after the text of the `system` column; a system message of their own wins over it."""
    refuse_unread(cells)
    found = cells.optional("system")
    if found is None:
        return messages
    text = as_text(found[1], found[0])
    if not text.strip() or (messages and messages[0].role == "system"):
        return messages
    return (Message(role="system", content=text), *messages)


def refuse_unread(cells: Cells) -> None:
    """Raise RowError for a row whose conversation leans on a list of images, ...: it is not read."""
    for column, problem in _UNREAD.items():
        if column in cells.row and _holds_a_list(cells.row[column]):
            raise RowError(f"{column}: {problem}; remove the row, or set on_bad_row: skip")


def _holds_a_list(value: Any) -> bool:
    """A list that is not empty, or the JSON text of one; else the column is another thing of that name."""
    if isinstance(value, str):
        return value.lstrip().startswith("[") and "".join(value.split()) != "[]"
    return isinstance(value, list) and bool(value)
