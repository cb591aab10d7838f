"""Conversations: rows of sft -> Conversation, and the document of prepare.

    messages | conversations (+ chosen) | prompt, completion | instruction, output --> Conversation

Owns where the trained answer comes from. Does not own questions (prompts), turns (turns), or which of them a
row marks as trained (marks). Light import.
"""

from collections.abc import Callable
from typing import Any

from stages.data.reading.records import Conversation, Document, Messages, Record
from stages.data.reading.rows.advice import Advice
from stages.data.reading.rows.calls import tools_of
from stages.data.reading.rows.cells import Cells, RowError
from stages.data.reading.rows.labels import label_of
from stages.data.reading.rows.marks import refuse_lists
from stages.data.reading.rows.prompts import asked
from stages.data.reading.rows.thoughts import refuse_thoughts, with_thoughts
from stages.data.reading.rows.transcripts import turns_of
from stages.data.reading.rows.turns import as_messages, listed_messages
from stages.data.reading.rows.wording import quoted


def document(cells: Cells) -> tuple[Document, ...]:
    """`text` as it stands."""
    return (Document(text=cells.text("text")),)


def messages(cells: Cells) -> tuple[Conversation, ...]:
    """`messages: [{role, content}, …]`."""
    column, found = listed_messages(cells, "messages")
    refuse_thoughts(found, column, cells)
    return _conversation(found, column, cells)


def sharegpt(cells: Cells) -> tuple[Conversation, ...]:
    """`conversations: [{from, value}, …]`; of a preference row, the chosen answer ends it."""
    column, found = listed_messages(cells, "conversations")
    refuse_thoughts(found, column, cells)
    chosen = cells.optional("chosen")
    if chosen is None:
        return _conversation(found, column, cells)
    check_unanswered(found, column)
    return _conversation(found + answer(*chosen, cells), chosen[0], cells)


def prompt_completion(cells: Cells) -> tuple[Conversation, ...]:
    """`prompt` and `completion`, each text or messages."""
    return _answered(cells, "prompt", "completion")


def instruction(cells: Cells) -> tuple[Conversation, ...]:
    """Alpaca: `instruction`, `input`, `output`, and LLaMA-Factory's `system` and `history`."""
    return _answered(cells, "instruction", "output")


def hh_conversation(cells: Cells) -> tuple[Conversation, ...]:
    """The chosen transcript."""
    column, _ = cells.required("chosen")
    return _conversation(turns_of(cells.text("chosen"), column), column, cells)


def labelled(
    inner: Callable[[Cells], tuple[Record, ...]], unlabelled: Callable[[Cells], str]
) -> Callable[[Cells], tuple[Record, ...]]:
    """A row that `inner` reads, kept where `label` is true: an answer labelled false is not imitated.
    `unlabelled`: the format of the row without its label.
    """

    def parse(cells: Cells) -> tuple[Record, ...]:
        column, value = cells.required("label")
        label = label_of(value)
        if label is None:
            instead = unlabelled(cells)
            raise RowError(Advice.NO_LABEL.line(column=column, value=quoted(value), format=instead))
        return inner(cells) if label else ()

    return parse


def answer(column: str, value: Any, cells: Cells) -> Messages:
    """Text or messages that end with the assistant."""
    found = as_messages(value, column, "assistant", cells)
    if found[-1].role != "assistant":
        raise RowError(f"{column}: does not end with the assistant")
    if found[0].role == "system":
        raise RowError(f"{column}[0]: a system message after the first message; templates take it first only")
    return found


def check_unanswered(found: Messages, column: str) -> None:
    """Raise RowError where an answer would follow an answer."""
    if found[-1].role == "assistant":
        raise RowError(f"{column}: ends with the assistant, so nothing is asked that an answer could follow")


def _answered(cells: Cells, question: str, field: str) -> tuple[Conversation, ...]:
    refuse_lists(cells)
    before = asked(cells, question)
    column, value = cells.required(field)
    answered = with_thoughts(answer(column, value, cells), column, cells)
    return _conversation(before + answered, column, cells)


def _conversation(found: Messages, name: str, cells: Cells) -> tuple[Conversation, ...]:
    """Up to the last assistant message: what stands after it could not be trained. None where every turn of
    the assistant is marked as not to be trained.
    """
    last = max((index for index, message in enumerate(found) if message.role == "assistant"), default=None)
    if last is None:
        raise RowError(f"{name}: no assistant message, so nothing to train on")
    if found[0].role == "assistant":
        raise RowError(f"{name}: starts with the assistant: no prompt")
    if not any(message.is_trained for message in found if message.role == "assistant"):
        return ()
    left_out = len(found) - last - 1
    return (Conversation(messages=found[: last + 1], tools=tools_of(cells), num_turns_left_out=left_out),)
