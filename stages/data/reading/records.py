"""Records: what a dataset row becomes, before any tokenizer.

    file --readers--> Document | Conversation | Pair | Prompt --chat--> token ids

Text is exactly what the row held; nothing here is tokenised, stripped or templated. Light import.

Example: the row `{"prompt": "2+2?", "chosen": "4", "rejected": "5"}` is
`Pair(prompt=(user "2+2?",), chosen=(assistant "4",), rejected=(assistant "5",), row={...})`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Example: an assistant's turn that only calls a tool is `Message(role="assistant", content="",
    tool_calls=({"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}},))`; the
    tool's answer is `Message(role="tool", content="3", name="add")`.
    """

    role: Role
    content: str
    reasoning: str | None = None  # the assistant's thoughts, where the row keeps them apart from its content
    tool_calls: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)  # as OpenAI's, arguments parsed
    tool_call_id: str | None = None  # of a tool's answer: which call it answers
    name: str | None = None  # of a tool's answer: the tool
    is_trained: bool = True  # False: a training mark of the row leaves this assistant turn out


Messages = tuple[Message, ...]
Tools = tuple[Mapping[str, Any], ...]
"""What the assistant may call, in OpenAI's form: `{"type": "function", "function": {"name": ...}}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text for pretraining."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns to imitate: the assistant turns are what is trained; it ends with one."""

    messages: Messages
    tools: Tools = field(default=(), hash=False)
    place: str = field(default="", compare=False)  # file:line of the row
    num_turns_left_out: int = field(default=0, compare=False)  # of the row: what stood after the last answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two continuations of one prompt, the first preferred. Both start and end with an assistant message."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    row: Mapping[str, Any]  # the row as it stood in the file
    tools: Tools = field(default=(), hash=False)
    place: str = field(default="", compare=False)  # file:line of the row


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a policy answers: ends with a message that is not the assistant's."""

    messages: Messages
    row: Mapping[
        str, Any
    ]  # the row's further columns, for rule rewards and scoring functions (`answer`, ...)
    tools: Tools = field(default=(), hash=False)
    place: str = field(default="", compare=False)  # file:line of the row


Record = Document | Conversation | Pair | Prompt


def split_key(record: Record) -> str:
    """The text by which a record is held out or not: a document itself, else what the user asks first, so
    that pair, conversation and prompt of one row (or tree) fall on the same side.
    """
    if isinstance(record, Document):
        return record.text
    messages = record.prompt if isinstance(record, Pair) else record.messages
    return next((message.content for message in messages if message.role == "user"), messages[0].content)
