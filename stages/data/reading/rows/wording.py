"""Wording: values and names from the data as an error line may show them, short and printable.

Light import.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

MAX_SHOWN = 20
"""Columns, keys and characters of a wrong word that an error lists before it says `…`."""

_PLAIN = re.compile(r"…|[A-Za-z_][\w.*-]*")
_YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")


def described(value: Any) -> str:
    """A JSON value in words, short: `number 7`, `null`, `list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        shown = str(value) if isinstance(value, float) or abs(value) < 10**20 else "too long to show"
        return f"number {shown}"
    name = type(value).__name__
    return {"str": "text", "dict": "object", "Binary": "bytes"}.get(name, name)


def quoted(value: Any) -> str:
    """The same, with the beginning of a text: `text 'no'`."""
    return f"text '{shortened(value)}'" if isinstance(value, str) else described(value)


def not_utf8(data: bytes) -> str:
    """What is wrong with bytes that are not UTF-8, and where."""
    sound = data.decode(errors="surrogateescape")
    column = next(at for at, sign in enumerate(sound, start=1) if "\udc80" <= sign <= "\udcff")
    return f"not UTF-8 (byte 0x{ord(sound[column - 1]) - 0xDC00:02X} at column {column}); convert with iconv"


def listed(names: Iterable[Any]) -> str:
    """Column names or keys for an error: one line, the first MAX_SHOWN of them."""
    shown = [named_on_one_line(str(name)) for name in names]
    more = [f"… {len(shown) - MAX_SHOWN} more"] if len(shown) > MAX_SHOWN else []
    return ", ".join(shown[:MAX_SHOWN] + more) or "none"


def named_on_one_line(name: str) -> str:
    """A name from the data for an error: control characters and lone surrogates escaped."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)


def in_yaml(column: str) -> str:
    """A column's name as it has to stand in the config, on one line."""
    if _PLAIN.fullmatch(column) is not None and column.lower() not in _YAML_WORDS:
        return column
    return named_on_one_line(json.dumps(column))


def shortened(word: str) -> str:
    """A wrong word from the data for an error: escaped and cut."""
    return named_on_one_line(word[:MAX_SHOWN]) + ("…" if len(word) > MAX_SHOWN else "")
