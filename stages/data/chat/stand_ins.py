"""Stand-ins: the signs of content that could spell a special token, told from those of the template.

    "<|im_end|>" in a message --masked--> U+F1234 "|im_end|" U+F1235 --template--> text --unmasked--> it

A special token begins and ends with certain signs (`<`, `>`, `[`, ...). While a template runs, those of
content are other characters, drawn by chance from a private use area, so that what spells a token in the
template's text was written by the template. A template that asks about content (`'</think>' in content`,
`content.split(...)`) is answered as if the real signs stood there (`Content`). Standard library only: the
template process uses it.
"""

import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, SupportsIndex

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # plane 15: 65,534 characters that no standard gives a meaning
ASSISTANTS_OWN = ("content", "reasoning", "reasoning_content", "thinking")
"""Of an assistant's message: where it may write the tokens that stand inside a turn."""


class StandIns:
    """Which characters stand for which signs, in one conversation."""

    def __init__(self, signs: str, text: str) -> None:
        """`text`: all that the conversation holds; none of its characters becomes a stand-in."""
        taken, drawn = set(text), random.SystemRandom()
        free: list[int] = []
        while len(free) < len(signs):
            one = drawn.choice(PRIVATE_USE)
            if one not in free and chr(one) not in taken:
                free.append(one)
        self.plain = {one: ord(sign) for one, sign in zip(free, signs, strict=True)}

    def real(self, text: str) -> str:
        """`text` with the signs that its stand-ins stand for."""
        return str.translate(text, self.plain)


def masked(text: str, plain: Mapping[int, int], inside: re.Pattern[str]) -> str:
    """`text` with stand-ins for the signs, except in what matches `inside`: tokens that it may spell."""
    table = {sign: one for one, sign in plain.items()}
    parts: list[str] = []
    at = 0
    for found in inside.finditer(text):
        parts += [text[at : found.start()].translate(table), found[0]]
        at = found.end()
    return "".join([*parts, text[at:].translate(table)])


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """The leftmost, then longest of `texts`, as tokenizers look for added tokens; of none, nothing."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


NOTHING = any_of(())


def masked_messages(
    messages: Sequence[Mapping[str, Any]], plain: Mapping[int, int], inside: re.Pattern[str]
) -> list[dict[str, Any]]:
    """The messages with `Content` for every text but the role's."""
    return [
        {
            key: value
            if key == "role"
            else with_content(
                value, plain, inside if message["role"] == "assistant" and key in ASSISTANTS_OWN else NOTHING
            )
            for key, value in message.items()
        }
        for message in messages
    ]


def with_content(value: Any, plain: Mapping[int, int], inside: re.Pattern[str]) -> Any:
    """A JSON value with `Content` for every text in it that holds a sign."""

    def of(text: str) -> str:
        hidden = masked(text, plain, inside)
        return text if hidden == text else Content(hidden, text)

    return mapped(value, of)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): mapped(one, change) for key, one in value.items()}
    return [mapped(one, change) for one in value] if isinstance(value, list | tuple) else value


def holds_content(value: Any) -> bool:
    """Whether any text in a JSON value is masked."""
    if isinstance(value, Mapping):
        return any(isinstance(key, Content) or holds_content(one) for key, one in value.items())
    return any(map(holds_content, value)) if isinstance(value, list) else isinstance(value, Content)


def holds_any(value: Any, signs: str) -> bool:
    """Whether any text in a JSON value has one of the signs in it."""
    if isinstance(value, str):
        return any(sign in value for sign in signs)
    if isinstance(value, Mapping):
        return any(holds_any(one, signs) for pair in value.items() for one in pair)
    return any(holds_any(one, signs) for one in value) if isinstance(value, list) else False


class Content(str):
    """A masked text of which a template learns what it would learn of the real one.

    Both are of one length, so what is cut from one is cut from the other. A text that was joined with others
    (`~`, `join`) is a plain one again: whoever renders compares the result with that of the real messages.
    """

    _real: str

    def __new__(cls, text: str, real: str | None = None) -> "Content":
        self = super().__new__(cls, text)
        self._real = str.__str__(text) if real is None else real
        return self

    def __str__(self) -> str:
        return self

    def __eq__(self, other: object) -> bool:
        return self._real == _real(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._real)

    def __contains__(self, part: object) -> bool:
        return _real(part) in self._real

    def __getitem__(self, key: SupportsIndex | slice) -> "Content":
        return Content(super().__getitem__(key), self._real[key])

    def __add__(self, other: str) -> "Content":
        return Content(str.__add__(self, other), self._real + _real(other))

    def __radd__(self, other: str) -> "Content":
        return Content(str.__add__(other, self), other + self._real)

    def startswith(self, prefix: Any, *span: Any) -> bool:
        return self._real.startswith(_real(prefix), *span)

    def endswith(self, suffix: Any, *span: Any) -> bool:
        return self._real.endswith(_real(suffix), *span)

    def find(self, part: str, *span: Any) -> int:
        return self._real.find(_real(part), *span)

    def rfind(self, part: str, *span: Any) -> int:
        return self._real.rfind(_real(part), *span)

    def index(self, part: str, *span: Any) -> int:
        return self._real.index(_real(part), *span)

    def rindex(self, part: str, *span: Any) -> int:
        return self._real.rindex(_real(part), *span)

    def count(self, part: str, *span: Any) -> int:
        return self._real.count(_real(part), *span)

    def lstrip(self, signs: str | None = None) -> "Content":
        return self[len(self) - len(self._real.lstrip(_real(signs))) :]

    def rstrip(self, signs: str | None = None) -> "Content":
        return self[: len(self._real.rstrip(_real(signs)))]

    def strip(self, signs: str | None = None) -> "Content":
        return self.lstrip(signs).rstrip(signs)

    def removeprefix(self, prefix: str) -> "Content":
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> "Content":
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(  # type: ignore[override]  # a list of its own kind
        self, separator: str | None = None, maxsplit: Any = -1
    ) -> list["Content"]:
        return self._cut(self._real.split(_real(separator), maxsplit), separator)

    def rsplit(  # type: ignore[override]  # a list of its own kind
        self, separator: str | None = None, maxsplit: Any = -1
    ) -> list["Content"]:
        return self._cut(self._real.rsplit(_real(separator), maxsplit), separator)

    def splitlines(  # type: ignore[override]  # a list of its own kind
        self, keepends: bool = False
    ) -> list["Content"]:
        return self._cut(self._real.splitlines(keepends), None)

    def partition(self, separator: str) -> tuple["Content", "Content", "Content"]:
        before, found, after = self._cut(list(self._real.partition(_real(separator))), "")
        return before, found, after

    def rpartition(self, separator: str) -> tuple["Content", "Content", "Content"]:
        before, found, after = self._cut(list(self._real.rpartition(_real(separator))), "")
        return before, found, after

    def replace(self, old: str, new: str, count: Any = -1) -> "Content":  # type: ignore[override]  # by position
        if not old:
            return Content(str.replace(self, old, new, count), self._real.replace(old, _real(new), count))
        parts = self.split(old, count)
        return Content(str.join(new, parts), str.join(_real(new), [_real(part) for part in parts]))

    def lower(self) -> "Content":
        return Content(super().lower(), self._real.lower())

    def upper(self) -> "Content":
        return Content(super().upper(), self._real.upper())

    def _cut(self, parts: list[str], separator: str | None) -> list["Content"]:
        """The same parts of this text: next to each other but for `separator`; None: for white space."""
        cut: list[Content] = []
        at = 0
        for part in parts:
            start = self._real.index(part, at) if separator is None else at
            cut.append(self[start : start + len(part)])
            at = start + len(part) + len(separator or "")
        return cut


def _real(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_real, value))
    return value._real if isinstance(value, Content) else value
