"""Conversations: rows of sft -> Conversation, and the document of prepare.

    messages | conversations (+ chosen) | prompt, completion | instruction, output --> Conversation

Owns where the trained answer comes from. Does not own questions (prompts) or turns (turns). Light import.
"""

from collections.abc import Callable
from typing import Any

from stages.data.records import Conversation, Document, Messages, Record
from stages.data.rows.cells import Cells, RowError, described, unpacked
from stages.data.rows.prompts import asked
from stages.data.rows.transcripts import turns_of
from stages.data.rows.turns import as_messages, listed_messages


def document(cells: Cells) -> tuple[Document, ...]:
    """`text` as it stands."""
    return (Document(text=cells.text("text")),)


def messages(cells: Cells) -> tuple[Conversation, ...]:
    """`messages: [{role, content}, …]`."""
    column, found = listed_messages(cells, "messages")
    _check_trained(cells, "messages", found)
    return (_conversation(found, column),)


def sharegpt(cells: Cells) -> tuple[Conversation, ...]:
    """`conversations: [{from, value}, …]`; of a preference row, the chosen answer ends it."""
    column, found = listed_messages(cells, "conversations")
    _check_trained(cells, "conversations", found)
    chosen = cells.optional("chosen")
    if chosen is None:
        return (_conversation(found, column),)
    check_unanswered(found, column)
    return (_conversation(found + answer(*chosen), chosen[0]),)


def prompt_completion(cells: Cells) -> tuple[Conversation, ...]:
    """`prompt` and `completion`, each text or messages."""
    return _answered(cells, "prompt", "completion")


def instruction(cells: Cells) -> tuple[Conversation, ...]:
    """Alpaca: `instruction`, `input`, `output`, and LLaMA-Factory's `system` and `history`."""
    return _answered(cells, "instruction", "output")


def hh_conversation(cells: Cells) -> tuple[Conversation, ...]:
    """The chosen transcript."""
    column, _ = cells.required("chosen")
    return (_conversation(turns_of(cells.text("chosen"), column), column),)


def labelled(inner: Callable[[Cells], tuple[Record, ...]]) -> Callable[[Cells], tuple[Record, ...]]:
    """A row that `inner` reads, kept where `label` is true: an answer labelled false is not imitated."""

    def parse(cells: Cells) -> tuple[Record, ...]:
        column, value = cells.required("label")
        return inner(cells) if as_label(value, column) else ()

    return parse


def as_label(value: Any, name: str) -> bool:
    """true or false; also 1 and 0, and either as text, for tables without booleans."""
    known = {"true": True, "1": True, "false": False, "0": False}
    word = value.strip().lower() if isinstance(value, str) else str(value).lower()
    if not isinstance(value, bool | int | str) or word not in known:
        raise RowError(f"{name}: expected true or false, got {described(value)}")
    return known[word]


def answer(column: str, value: Any) -> Messages:
    """Text or messages that end with the assistant."""
    found = as_messages(value, column, "assistant")
    if found[-1].role != "assistant":
        raise RowError(f"{column}: does not end with the assistant")
    if found[0].role == "system":
        raise RowError(f"{column}[0]: a system message after the first message; templates take it first only")
    return found


def check_unanswered(found: Messages, column: str) -> None:
    """Raise RowError where an answer would follow an answer."""
    if found[-1].role == "assistant":
        raise RowError(f"{column}: ends with the assistant, so nothing is asked that an answer could follow")


def _check_trained(cells: Cells, field: str, found: Messages) -> None:
    """Raise RowError for an assistant's turn that is marked as not to be trained: all of them are."""
    column, value = cells.required(field)
    turns = unpacked(value)
    for index, (turn, message) in enumerate(zip(turns, found[-len(turns) :], strict=True)):
        for key in ("weight", "train"):
            if message.role == "assistant" and key in turn and turn[key] in (0, False):
                raise RowError(
                    f"{column}[{index}].{key}: every assistant turn is trained, also this one; remove {key}, "
                    "or the row"
                )


def _answered(cells: Cells, question: str, field: str) -> tuple[Conversation, ...]:
    before = asked(cells, question)
    column, value = cells.required(field)
    return (_conversation(before + answer(column, value), column),)


def _conversation(found: Messages, name: str) -> Conversation:
    """Up to the last assistant message: what stands after it could not be trained."""
    last = max((index for index, message in enumerate(found) if message.role == "assistant"), default=None)
    if last is None:
        raise RowError(f"{name}: no assistant message, so nothing to train on")
    if found[0].role == "assistant":
        raise RowError(f"{name}: starts with the assistant: no prompt")
    return Conversation(messages=found[: last + 1], num_turns_left_out=len(found) - last - 1)
