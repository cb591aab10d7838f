"""Prompts: what a row asks, and what a policy is to answer.

    prompt | question | instruction (+ input, history, system) --asked--> Messages (+ tools) --> Prompt

Owns how the parts of a question are joined, the same for every stage, so that `split_key` is too. Does not
own answers (conversations, preferences). Light import.
"""

from typing import Any

from stages.data.reading.records import Message, Messages, Prompt
from stages.data.reading.rows.calls import TOOLS, tool_columns, tools_of
from stages.data.reading.rows.cells import Cells, RowError, as_text, filled, unlike, unpacked
from stages.data.reading.rows.transcripts import first_turn_of, is_open_transcript, open_turns_of
from stages.data.reading.rows.turns import as_messages, listed_messages, unpacked_messages, with_system
from stages.data.reading.rows.wording import described

ASKED = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    **TOOLS,
}
"""Fields of a question -> the columns looked for."""


def asked(cells: Cells, field: str) -> Messages:
    """What the row asks: system, history and the prompt in `field`, with its input below it.

    A text is joined with its `input` by a blank line, either may be blank. A text that is a transcript up to
    an open `Assistant:` is taken apart into its turns. Raises RowError.
    """
    column, value = _question_in(cells, field)
    if is_open_transcript(value):
        return with_system(cells, open_turns_of(as_text(value, column), column))
    if isinstance(value, str):
        return with_system(cells, (*_history(cells), _question(cells, column, value)))
    return with_system(cells, as_messages(value, column, "user", cells))


def _question_in(cells: Cells, field: str) -> tuple[str, Any]:
    """(column, value); messages that stand in it as JSON text are messages."""
    column, value = cells.required(field)
    return column, unpacked_messages(unpacked(value) if column == "messages" else value, column)


def used_by(cells: Cells, field: str) -> tuple[str, ...]:
    """The fields that `asked` makes the question of."""
    column, value = _question_in(cells, field)
    if not isinstance(value, str) or is_open_transcript(value):
        return field, "system"
    joined = ("input",) if _input_of(cells, column, value) is not None else ()
    return field, "system", *joined, *(("history",) if _has_history(cells) else ())


def _question(cells: Cells, column: str, value: str) -> Message:
    text = as_text(value, column)
    extra = _input_of(cells, column, value)
    below = "" if extra is None or extra[1] is None else as_text(extra[1], extra[0])
    joined = "\n\n".join(part for part in (text, below) if part.strip())
    return Message(role="user", content=filled(joined, column, "prompt"))


def _input_of(cells: Cells, column: str, value: str) -> tuple[str, object] | None:
    """(column, value) of the `input` that goes with the prompt: one the config names, an instruction's, or
    text beside a prompt that does not hold it already; not where it belongs to an instruction beside it.
    """
    if cells.is_renamed("input"):
        return cells.required("input")
    found = cells.first_of(alias for alias in ASKED["input"] if alias != column)
    if column == "instruction" or found is None:
        return found
    text = found[1].strip() if isinstance(found[1], str) else ""
    is_read = text and "instruction" not in cells.row and text not in value
    return found if is_read else None


def _has_history(cells: Cells) -> bool:
    """A `history` that is no list, nor looks like one, is a further column, unless the config names it."""
    found = cells.optional("history")
    if found is None:
        return False
    rounds = unpacked(found[1])
    is_meant = isinstance(rounds, str) and "".join(rounds[:9].split()).startswith("[[")
    return isinstance(rounds, list) or is_meant or cells.is_renamed("history")


def _history(cells: Cells) -> Messages:
    """`[[question, answer], …]` -> the turns before the question."""
    if not _has_history(cells):
        return ()
    column, rounds = cells.required("history")
    rounds = unpacked(rounds)
    if not isinstance(rounds, list):
        raise unlike(rounds, column, "a list of [question, answer]")
    turns: list[Message] = []
    for index, exchange in enumerate(rounds):
        name = f"{column}[{index}]"
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise RowError(f"{name}: expected [question, answer], got {described(exchange)}")
        question, answer = (as_text(said, f"{name}[{place}]") for place, said in enumerate(exchange))
        turns.append(Message(role="user", content=filled(question, f"{name}[0]", "prompt")))
        turns.append(Message(role="assistant", content=filled(answer, f"{name}[1]", "response")))
    return tuple(turns)


def prompt(cells: Cells) -> tuple[Prompt, ...]:
    """`prompt` as text or messages; messages up to the last one that is not the assistant's."""
    column, _ = cells.required("prompt")
    return (_prompt(asked(cells, "prompt"), column, cells, *used_by(cells, "prompt")),)


def conversation_prompt(cells: Cells) -> tuple[Prompt, ...]:
    """`conversations`, likewise."""
    column, messages = listed_messages(cells, "conversations")
    return (_prompt(messages, column, cells, "conversations", "system"),)


def hh_prompt(cells: Cells) -> tuple[Prompt, ...]:
    """The first turn of the person: a policy answers it afresh. What was answered then does not matter."""
    column, _ = cells.required("chosen")
    messages = first_turn_of(cells.text("chosen"), column)
    return (Prompt(messages=messages, row=cells.rest("chosen", "rejected")),)


def _prompt(messages: Messages, column: str, cells: Cells, *used: str) -> Prompt:
    last = max((index for index, message in enumerate(messages) if message.role != "assistant"), default=None)
    if last is None or all(message.role == "system" for message in messages[: last + 1]):
        raise RowError(f"{column}: empty prompt: no message to answer")
    tools = tool_columns(cells)
    row = {column: value for column, value in cells.rest(*used).items() if column not in tools}
    return Prompt(messages=messages[: last + 1], row=row, tools=tools_of(cells))
