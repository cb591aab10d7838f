"""Turns: text, one message or a list of messages, in the key and role names of any tool -> Messages.

    {role, content} | {from, value} | content parts --as_messages--> (Message, ...)

Owns key names, role names, content parts, and what no chat template can take. Does not own which column a
message stands in (conversations, preferences, prompts). Light import.

A message may hold role/content (OpenAI, TRL) or from/value (ShareGPT), wherever it stands. Content is text,
or a list of `{type: text, text: …}` parts, which are joined as they are. Tool calls and parts that are no
text are refused: only text is trained, and leaving them out would change what the turn says. Two turns of one
role in a row stay as they are: templates take them. A system message stands first or not at all.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from stages.data.records import Message, Messages, Role
from stages.data.rows.cells import Cells, RowError, as_text, described, filled, listed, shortened, unpacked

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
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""Names of a role in the wild -> the role."""

_UNREAD = {
    "tools": "descriptions of tools are not put into the prompt",
    "images": "images are not read",
    "videos": "videos are not read",
    "audios": "audio is not read",
}
"""Columns beside a conversation without which it would not mean the same, where they hold a list."""


def as_role(value: Any, name: str) -> Role:
    """The role behind any of its names."""
    role = as_text(value, name)
    if role not in ROLE_OF:
        raise RowError(f"{name}: unknown role '{shortened(role)}'; use {', '.join(get_args(Role))}")
    return ROLE_OF[role]


def as_message(value: Any, name: str) -> Message:
    """`{role, content}` or `{from, value}` -> Message."""
    if not isinstance(value, Mapping):
        raise RowError(f"{name}: expected a message {{role, content}}, got {described(value)}")
    role_key, content_key = _keys(value)
    for key in (role_key, content_key):
        if key not in value:
            raise RowError(f"{name}.{key}: missing; keys are {listed(value)}")
    role = as_role(value[role_key], f"{name}.{role_key}")
    for key in ("tool_calls", "function_call"):
        if key in value and value[key] not in (None, [], {}):
            raise RowError(
                f"{name}.{key}: tool calls are not read; write the call into {content_key} as text"
            )
    content = as_content(value[content_key], f"{name}.{content_key}")
    if role in ("user", "assistant"):
        filled(content, f"{name}.{content_key}", "response" if role == "assistant" else "prompt")
    return Message(role=role, content=content)


def _keys(message: Mapping[str, Any]) -> tuple[str, str]:
    """(role key, content key): each as it is there; tables fill the unused ones with null."""
    is_sharegpt = [
        new in message and (old not in message or message[old] is None)
        for old, new in (("role", "from"), ("content", "value"))
    ]
    if "role" not in message and "content" not in message and any(is_sharegpt):
        return "from", "value"
    return "from" if is_sharegpt[0] else "role", "value" if is_sharegpt[1] else "content"


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


def as_messages(value: Any, name: str, role: Literal["user", "assistant"]) -> Messages:
    """Text (one message of `role`), one message, or a list of messages; of a prompt (`user`), the assistant's
    is not the first. Raises RowError.
    """
    if isinstance(value, str):
        text = filled(as_text(value, name), name, "response" if role == "assistant" else "prompt")
        return (Message(role=role, content=text),)
    if isinstance(value, Mapping):
        messages: Messages = (as_message(value, name),)
    elif isinstance(value, list):
        messages = tuple(as_message(item, f"{name}[{index}]") for index, item in enumerate(value))
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


def listed_messages(cells: Cells, field: str) -> tuple[str, Messages]:
    """(column, messages) of a field that must hold a list of messages, after the row's `system` column."""
    column, value = cells.required(field)
    value = unpacked(value)
    if not isinstance(value, list):
        raise RowError(f"{column}: expected a list of messages, got {described(value)}")
    return column, with_system(cells, as_messages(value, column, "user"))


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
    """Raise RowError for a row whose conversation leans on a list of tools, images, ...: it is not read."""
    for column, problem in _UNREAD.items():
        if column in cells.row and _holds_a_list(cells.row[column]):
            raise RowError(f"{column}: {problem}; remove the row, or set on_bad_row: skip")


def _holds_a_list(value: Any) -> bool:
    """A list that is not empty, or the JSON text of one; else the column is another thing of that name."""
    if isinstance(value, str):
        return value.lstrip().startswith("[") and "".join(value.split()) != "[]"
    return isinstance(value, list) and bool(value)
