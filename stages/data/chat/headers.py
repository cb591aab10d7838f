"""Headers: what a chat template writes before what each side says, found by rendering three turns.

    template --(user, assistant, user, prompt)--> texts between contents --what both have--> Headers

Owns: finding them. Does not own: rendering (chat), looking for them in data (template_marks).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stages.data.chat.frame import OPENING, Piece, Template, other_tag
from stages.data.chat.template_marks import Headers
from stages.errors import ModelError

_LETTER = re.compile(r"[^\W_]")


def headers_of(source: str, variables: Mapping[str, Any]) -> tuple[Headers, ...]:
    """Of a template (Jinja source, and what it sees beside messages); none where it does not render."""
    template = Template(source=source, variables=variables)
    try:
        pieces = template.pieces(("user", "assistant", "user"), is_prompt=True)
    except ModelError:  # whoever renders with it says so
        return ()
    texts = _between(pieces)
    if len(texts) != 4:  # it writes a content twice
        return ()
    first, answer, second, prompt = texts
    user = _shared_end(first, second)
    assistant = _shared_start(answer, prompt)
    opened = OPENING.search(assistant)
    if opened is not None and other_tag(opened[0].strip()) in source:  # <think>, which is no header
        assistant = assistant[: opened.start()]
    lines = (
        _last_line(user),
        _last_line(assistant),
    )  # where a side has no header, a turn's end may stand there
    user, assistant = ("" if line in variables.values() else line for line in lines)
    return (Headers(user=user, assistant=assistant),)


def _between(pieces: Sequence[Piece]) -> list[str]:
    """What stands before, between and after the contents."""
    texts = [""]
    for piece in pieces:
        if piece.message is None:
            texts[-1] += piece.text
        else:
            texts.append("")
    return texts


def _shared_start(one: str, other: str) -> str:
    signs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (sign, its) in signs if sign != its), min(len(one), len(other)))]


def _shared_end(one: str, other: str) -> str:
    return _shared_start(one[::-1], other[::-1])[::-1]


def _last_line(text: str) -> str:
    """What is left of a header when the end of the turn before it is taken off: most end with a line."""
    line = text.strip().rpartition("\n")[2].strip()
    return line if _LETTER.search(line) else ""
