"""Schemas: one row of columns -> one record, or a RowError that names the field and the fix.

    row + column map --detect--> Schema --parse--> Document | Conversation | Pair | Prompt

Owns what a row means to a stage. Does not own files, lines, weights (readers). A further format is one more
Schema in SCHEMAS. Light import.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from stages.config import DataFormat
from stages.data.records import Conversation, Document, Message, Messages, Pair, Prompt, Role

StageName = Literal["prepare", "sft", "reward", "ppo", "evaluate"]
Record = Document | Conversation | Pair | Prompt


class RowError(Exception):
    """A malformed row: `field: what is wrong; how to fix`. The reader adds file and line."""


class Cells:
    """A row seen through the field names of a schema: renamed columns, aliases, and errors that name them."""

    def __init__(
        self, row: Mapping[str, Any], columns: Mapping[str, str], aliases: Mapping[str, tuple[str, ...]]
    ):
        self.row, self._columns, self._aliases = row, columns, aliases

    def column(self, field: str) -> str | None:
        """The column that holds the field in this row."""
        if field in self._columns:
            return self._columns[field] if self._columns[field] in self.row else None
        return next((alias for alias in self._aliases[field] if alias in self.row), None)

    def is_renamed(self, field: str) -> bool:
        """Whether the config names this field's column."""
        return field in self._columns

    def required(self, field: str) -> tuple[str, Any]:
        """(column, value) of a field that must be there."""
        column = self.column(field)
        if column is None:
            name = self._columns.get(field, field)
            raise RowError(
                f"{name}: missing; columns are {', '.join(self.row) or 'none'} - set columns: {{{field}: …}}"
            )
        return column, self.row[column]

    def text(self, field: str) -> str:
        """A field that must be text."""
        column, value = self.required(field)
        return as_text(value, column)

    def rest(self, *fields: str) -> dict[str, Any]:
        """The row without the columns of these fields."""
        used = {self.column(field) for field in fields}
        return {column: value for column, value in self.row.items() if column not in used}


def as_text(value: Any, name: str) -> str:
    """`value`, which must be text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise RowError(f"{name}: expected text, got {described(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{name}: half a surrogate pair (\\u{ord(value[error.start]):04x}) at character "
            f"{error.start + 1}; it is no text"
        ) from None
    return value


def described(value: Any) -> str:
    """A JSON value in words, short: `number 7`, `null`, `list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        shown = str(value) if isinstance(value, float) or abs(value) < 10**20 else "too long to show"
        return f"number {shown}"
    return {"str": "text", "dict": "object"}.get(type(value).__name__, type(value).__name__)


def filled(text: str, name: str, what: str) -> str:
    """`text`, which must hold more than white space."""
    if not text.strip():
        raise RowError(f"{name}: empty {what}; remove the row, or set on_bad_row: skip")
    return text


def as_message(value: Any, name: str) -> Message:
    """`{role, content}` -> Message."""
    if not isinstance(value, Mapping):
        raise RowError(f"{name}: expected a message {{role, content}}, got {described(value)}")
    for key in ("role", "content"):
        if key not in value:
            raise RowError(f"{name}.{key}: missing; keys are {', '.join(map(str, value)) or 'none'}")
    role = as_text(value["role"], f"{name}.role")
    if role not in get_args(Role):
        raise RowError(f"{name}.role: unknown role '{role}'; use {', '.join(get_args(Role))}")
    content = as_text(value["content"], f"{name}.content")
    if role in ("user", "assistant"):
        filled(content, f"{name}.content", "response" if role == "assistant" else "prompt")
    return Message(role=role, content=content)  # type: ignore[arg-type]  # checked against Role above


def as_messages(value: Any, name: str, role: Literal["user", "assistant"]) -> Messages:
    """Text (one message of `role`), one message, or a list of messages."""
    if isinstance(value, str):
        text = filled(as_text(value, name), name, "response" if role == "assistant" else "prompt")
        return (Message(role=role, content=text),)
    if isinstance(value, Mapping):
        return (as_message(value, name),)
    if not isinstance(value, list):
        raise RowError(f"{name}: expected text, got {described(value)}")
    if not value:
        raise RowError(f"{name}: no messages")
    return tuple(as_message(item, f"{name}[{index}]") for index, item in enumerate(value))


def _conversation(messages: Messages, name: str) -> Conversation:
    """Up to the last assistant message: what stands after it could not be trained."""
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None:
        raise RowError(f"{name}: no assistant message, so nothing to train on")
    if messages[0].role == "assistant":
        raise RowError(f"{name}: starts with the assistant: no prompt")
    return Conversation(messages=messages[: last + 1])


def _text(cells: Cells) -> Document:
    return Document(text=cells.text("text"))


def _messages(cells: Cells) -> Conversation:
    column, value = cells.required("messages")
    if not isinstance(value, list):
        raise RowError(f"{column}: expected a list of messages, got {described(value)}")
    return _conversation(as_messages(value, column, "user"), column)


def _prompt_completion(cells: Cells) -> Conversation:
    prompt_column, prompt = cells.required("prompt")
    column, completion = cells.required("completion")
    answer = as_messages(completion, column, "assistant")
    if answer[-1].role != "assistant":
        raise RowError(f"{column}: does not end with the assistant")
    return _conversation(as_messages(prompt, prompt_column, "user") + answer, column)


def _input_of(cells: Cells, column: str) -> tuple[str, Any] | None:
    """(column, value) of the `input` that goes with the prompt: an instruction's, or one the config names."""
    input_column = cells.column("input")
    if input_column is None or not (cells.is_renamed("input") or column == "instruction"):
        return None
    return input_column, cells.row[input_column]


def _asked(cells: Cells, field: str) -> Messages:
    """The prompt of `field`; an instruction is joined with its `input` by a blank line."""
    column, value = cells.required(field)
    messages = as_messages(value, column, "user")
    extra = _input_of(cells, column)
    if extra is None or extra[1] is None or not isinstance(value, str):
        return messages
    text = as_text(extra[1], extra[0])
    return (Message(role="user", content=f"{value}\n\n{text}"),) if text.strip() else messages


def _instruction(cells: Cells) -> Conversation:
    column, value = cells.required("output")
    return _conversation(_asked(cells, "instruction") + as_messages(value, column, "assistant"), column)


def _preference(cells: Cells) -> Pair:
    sides = {}
    for field in ("chosen", "rejected"):
        column, value = cells.required(field)
        sides[field] = value if isinstance(value, str) else as_messages(value, column, "assistant")
        if isinstance(value, str):
            filled(as_text(value, column), column, "response")
    chosen, rejected = sides["chosen"], sides["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("rejected: one of chosen and rejected is text, the other messages")
    if chosen == rejected:
        raise RowError("rejected: the same as chosen; remove the row, or set on_bad_row: skip")
    has_prompt = cells.column("prompt") is not None
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not has_prompt:
            return _pair_of_texts(chosen, rejected, cells.row)
        prompt = _asked(cells, "prompt")
        return _pair(prompt, _said(chosen), _said(rejected), cells.row)
    assert not isinstance(chosen, str) and not isinstance(rejected, str)
    prompt = _asked(cells, "prompt") if has_prompt else ()
    if (
        prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]
    ):  # the prompt is repeated in both
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return _pair_of_messages(prompt, chosen, rejected, cells.row)


def _said(text: str) -> Messages:
    return (Message(role="assistant", content=text),)


def _pair_of_texts(chosen: str, rejected: str, row: Mapping[str, Any]) -> Pair:
    """No prompt column: the shared beginning is the prompt, back to its last line break, or else its last
    space: two answers may begin with the same words.
    """
    shared = _common_prefix(chosen, rejected)
    breaks = [shared.rfind("\n") + 1, max(shared.rfind(space) for space in " \t") + 1]
    cut = next(
        (at for at in breaks if shared[:at].strip() and chosen[at:].strip() and rejected[at:].strip()), 0
    )
    if not cut:
        raise RowError(
            "chosen: shares no beginning with rejected, so there is no prompt - set columns: {prompt: …}"
        )
    prompt = (Message(role="user", content=shared[:cut].rstrip()),)
    return _pair(prompt, _said(chosen[cut:]), _said(rejected[cut:]), row)


def _pair_of_messages(prompt: Messages, chosen: Messages, rejected: Messages, row: Mapping[str, Any]) -> Pair:
    """The longest common prefix of the messages belongs to the prompt."""
    shared = len(_common_prefix(chosen, rejected))
    return _pair(prompt + chosen[:shared], chosen[shared:], rejected[shared:], row)


def _common_prefix(one: Any, other: Any) -> Any:
    length = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return one[:length]


def _pair(prompt: Messages, chosen: Messages, rejected: Messages, row: Mapping[str, Any]) -> Pair:
    if chosen == rejected:
        raise RowError("rejected: the same as chosen; remove the row, or set on_bad_row: skip")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side:
            raise RowError(f"{name}: empty response: it is a beginning of the other one")
        if side[0].role != "assistant" or side[-1].role != "assistant":
            raise RowError(f"{name}: after the shared prompt comes no answer of the assistant, up to the end")
    if not prompt:
        raise RowError("chosen: no prompt: chosen and rejected share no beginning - set columns: {prompt: …}")
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, row=row)


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and _TURN.match(value.lstrip()) is not None and "\n\nAssistant:" in value


def _turns(text: str, name: str) -> Messages:
    """`\\n\\nHuman: … \\n\\nAssistant: …` -> messages; one speaker's turns in a row are joined."""
    parts = _TURN.split(text.strip())
    if len(parts) < 3 or parts[0].strip():
        raise RowError(f"{name}: expected a transcript '\\n\\nHuman: … \\n\\nAssistant: …'")
    turns: list[Message] = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        content = filled(said.strip(), name, "response" if speaker == "Assistant" else "prompt")
        role = _ROLES[speaker]
        if turns and turns[-1].role == role:
            content = f"{turns.pop().content}\n\n{content}"
        turns.append(Message(role=role, content=content))
    return tuple(turns)


def _transcript(cells: Cells, field: str) -> Messages:
    return _turns(cells.text(field), cells.required(field)[0])


def _hh_conversation(cells: Cells) -> Conversation:
    return _conversation(_transcript(cells, "chosen"), "chosen")


def _hh_pair(cells: Cells) -> Pair:
    return _pair_of_messages((), _transcript(cells, "chosen"), _transcript(cells, "rejected"), cells.row)


def _hh_prompt(cells: Cells) -> Prompt:
    """The first turn of the person: a policy answers it afresh. What was answered then does not matter."""
    column, _ = cells.required("chosen")
    turns = _turns(cells.text("chosen").partition("\n\nAssistant:")[0], column)
    return Prompt(messages=turns, row=cells.rest("chosen", "rejected"))


def _prompt(cells: Cells) -> Prompt:
    """Messages are taken up to the last one that is not the assistant's."""
    messages = _asked(cells, "prompt")
    last = max((index for index, message in enumerate(messages) if message.role != "assistant"), default=None)
    column, _ = cells.required("prompt")
    if last is None or all(message.role == "system" for message in messages[: last + 1]):
        raise RowError(f"{column}: empty prompt: no message to answer")
    joined = ("input",) if _input_of(cells, column) is not None else ()
    return Prompt(messages=messages[: last + 1], row=cells.rest("prompt", *joined))


def _one(parse: Callable[[Cells], Record]) -> Callable[[Cells], tuple[Record, ...]]:
    return lambda cells: (parse(cells),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """One row format, as one stage reads it."""

    format: DataFormat
    required: tuple[str, ...]  # fields that must be there
    aliases: Mapping[str, tuple[str, ...]]  # every field -> the columns looked for, in order
    parse: Callable[[Cells], tuple[Record, ...]]
    transcript_in: str | None = None  # detected only if this field holds a transcript

    def cells(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> Cells:
        """The row through this schema's fields."""
        return Cells(
            row, {field: column for field, column in columns.items() if field in self.aliases}, self.aliases
        )

    def missing(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> int:
        """Required fields the row lacks; a transcript schema misses one more on a row without transcript."""
        cells = self.cells(row, columns)
        missing = sum(cells.column(field) is None for field in self.required)
        if self.transcript_in is None:
            return missing
        column = cells.column(self.transcript_in)
        return missing + (column is None or not _is_transcript(row[column]))


_ASKED = {"prompt": ("prompt", "question", "instruction"), "input": ("input",)}
_SIDES = {"chosen": ("chosen",), "rejected": ("rejected",)}
_PROMPT = (
    Schema(
        format="prompt",
        required=("prompt",),
        parse=_one(_prompt),
        aliases={**_ASKED, "prompt": (*_ASKED["prompt"], "messages")},
    ),
    Schema(
        format="hh_transcript",
        required=("chosen",),
        aliases=_SIDES,
        parse=_one(_hh_prompt),
        transcript_in="chosen",
    ),
)

SCHEMAS: dict[StageName, tuple[Schema, ...]] = {
    "prepare": (Schema(format="text", required=("text",), aliases={"text": ("text",)}, parse=_one(_text)),),
    "sft": (
        Schema(
            format="messages",
            required=("messages",),
            aliases={"messages": ("messages",)},
            parse=_one(_messages),
        ),
        Schema(
            format="prompt_completion",
            required=("prompt", "completion"),
            parse=_one(_prompt_completion),
            aliases={"prompt": ("prompt", "question"), "completion": ("completion", "response", "answer")},
        ),
        Schema(
            format="instruction",
            required=("instruction", "output"),
            parse=_one(_instruction),
            aliases={"instruction": ("instruction",), "input": ("input",), "output": ("output",)},
        ),
        Schema(
            format="hh_transcript",
            required=("chosen",),
            aliases=_SIDES,
            parse=_one(_hh_conversation),
            transcript_in="chosen",
        ),
    ),
    "reward": (
        Schema(
            format="hh_transcript",
            required=("chosen", "rejected"),
            aliases=_SIDES,
            parse=_one(_hh_pair),
            transcript_in="chosen",
        ),
        Schema(
            format="preference",
            required=("chosen", "rejected"),
            aliases={**_ASKED, **_SIDES},
            parse=_one(_preference),
        ),
    ),
    "ppo": _PROMPT,
    "evaluate": _PROMPT,
}
"""What each stage can read, in the order in which it is tried."""


def detect(stage: StageName, row: Mapping[str, Any], columns: Mapping[str, str]) -> Schema:
    """The stage's first schema whose required fields the row has; else the nearest, to say what it lacks."""
    return min(SCHEMAS[stage], key=lambda schema: schema.missing(row, columns) / len(schema.required))


def named(stage: StageName, name: DataFormat) -> Schema | None:
    """The stage's schema of that name."""
    return next((schema for schema in SCHEMAS[stage] if schema.format == name), None)


def fields_of(schemas: Iterable[Schema] | Sequence[Schema]) -> list[str]:
    """Every field name that `columns:` may rename."""
    return list(dict.fromkeys(field for schema in schemas for field in schema.aliases))
