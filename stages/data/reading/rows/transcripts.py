"""Transcripts: `\\n\\nHuman: … \\n\\nAssistant: …` in one text -> Messages.

Owns the format of Anthropic's HH data, also with line ends of CRLF. Does not own which column holds it.
Light import.
"""

import re
from typing import Any

from stages.data.reading.records import Message, Messages, Role
from stages.data.reading.rows.cells import RowError, filled

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_ANSWER = "\n\nAssistant:"


def is_transcript(value: Any) -> bool:
    """Whether a value is a text of turns, one of them the assistant's."""
    return isinstance(value, str) and _TURN.match(value.lstrip()) is not None and _ANSWER in _with_lf(value)


def is_open_transcript(value: Any) -> bool:
    """Whether the transcript ends where the assistant has to answer: a prompt (Nectar, full-hh-rlhf)."""
    return is_transcript(value) and _with_lf(value).rstrip().endswith(_ANSWER)


def turns_of(text: str, name: str) -> Messages:
    """The turns; one speaker's turns in a row are joined. Raises RowError."""
    parts = _TURN.split(_with_lf(text).strip())
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


def open_turns_of(text: str, name: str) -> Messages:
    """The turns of an open transcript, without the answer's empty turn."""
    return turns_of(_with_lf(text).rstrip().removesuffix(_ANSWER), name)


def first_turn_of(text: str, name: str) -> Messages:
    """What the person says first."""
    return turns_of(_with_lf(text).partition(_ANSWER)[0], name)


def _with_lf(text: str) -> str:
    return text.replace("\r\n", "\n")
