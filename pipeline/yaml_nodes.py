"""YAML nodes: the text of a config -> a tree in which every value knows where it was stated.

    text --PyYAML's events--> Composer --> Node tree --plain()--> values

Owns: reading YAML safely, positions, how values are shown in errors. Does not own: files, `base:` and
overrides (yaml_source), what a key means (config). Scalars follow YAML 1.2 (`1e-5` is a number, `yes` is
text). Whatever a text holds, the worst outcome is one `ConfigError`: there are no tags, so no objects; depth,
size and the expansion of aliases are bounded.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError

MAX_DEPTH = 32  # the deepest setting is at 5
MAX_NODES = 100_000  # with aliases expanded
KeyPath = tuple[str | int, ...]
Scalar = None | bool | int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value was stated.

    Example: Origin(label="configs/demo.yaml:12", directory=Path("/repo/configs"))
    """

    label: str  # what an error line starts with: `file:line`, or `override KEY=VALUE`
    directory: Path  # what a relative path stated here is relative to; absolute


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A value and where it was stated: a mapping's entry is at its key, an item of a list at its start."""

    value: "dict[str, Node] | list[Node] | Scalar"
    origin: Origin
    text: str | None = None  # an unquoted scalar as written: "" where a key has no value

    def child(self, key: str | int) -> "Node | None":
        """The entry or item `key`, if there is one."""
        if isinstance(self.value, dict):
            return self.value.get(str(key))
        if isinstance(self.value, list):
            is_index = isinstance(key, int) or re.fullmatch(r"[0-9]{1,6}", key)
            return self.value[int(key)] if is_index and int(key) < len(self.value) else None
        return None

    def nearest(self, path: KeyPath) -> "Node":
        """The node at `path`, or else the deepest one on the way there."""
        node = self
        for key in path:
            below = node.child(key)
            if below is None:
                break
            node = below
        return node

    def height(self) -> int:
        """Levels below this value: 0 for a scalar."""
        value = self.value
        below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return max((1 + node.height() for node in below), default=0)

    def plain(self) -> Any:
        """The value as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


class Composer:
    """Builds the Node tree from PyYAML's events, a flat stream: the only recursion is our own, and bounded.

    PyYAML's own composer and constructor are not used: they recurse without bound, keep the last of two equal
    keys, and resolve scalars by YAML 1.1.
    """

    def __init__(self, text: str, label: str, directory: Path, has_lines: bool = True) -> None:
        self._text, self._label, self._directory, self._has_lines = text, label, directory, has_lines
        self._anchors: dict[str, tuple[Node, int, int]] = {}  # with its number of nodes and its height
        self._num_nodes = 0

    def document(self) -> Node | None:
        """The one document of the text; None if there is none."""
        try:
            events = yaml.parse(self._text, Loader=yaml.SafeLoader)
            next(events)  # the stream's start
            if isinstance(next(events), yaml.StreamEndEvent):
                return None
            tree = self._node(next(events), events, ())
            next(events)  # the document's end
            after = next(events)
            if not isinstance(after, yaml.StreamEndEvent):
                raise self._error(after, "a second document; one config per file")
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            what = f"not valid YAML: character {error.character:#04x} is not allowed"
            raise self._error_at(line, what) from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = (error.problem or "cannot be parsed") + _yaml_hint(error)
            raise self._error_at(mark.line + 1 if mark else 1, f"not valid YAML: {what}") from None
        return None if tree.value is None and tree.text == "" else tree

    def _node(self, event: Any, events: Iterator[Any], path: KeyPath) -> Node:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                anchor = short(str(event.anchor))
                raise self._error(event, f"alias *{anchor}: nothing above is anchored as &{anchor}")
            node, size, height = self._anchors[event.anchor]
            self._check_depth(event, len(path) + height)
            self._count(event, size)
            return node
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise self._error(event, f"tags such as {tag} are not allowed; write plain values")
        self._check_depth(event, len(path))
        before = self._num_nodes
        self._count(event, 1)
        node = self._value(event, events, path)
        if event.anchor is not None:
            self._anchors[event.anchor] = (node, self._num_nodes - before, node.height())
        return node

    def _value(self, event: Any, events: Iterator[Any], path: KeyPath) -> Node:
        origin = self._origin(event)
        if isinstance(event, yaml.ScalarEvent):
            self._check_text(event)
            if event.style is not None:
                return Node(value=event.value, origin=origin)
            return Node(value=parse_scalar(event.value), origin=origin, text=event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                items.append(self._node(item, events, (*path, len(items))))
            return Node(value=items, origin=origin)
        entries: dict[str, Node] = {}
        inherited: dict[str, Node] = {}
        while not isinstance(key := next(events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent) or key.tag is not None:
                raise self._error(key, "a key must be plain text")
            self._check_text(key)
            if key.value in entries:
                first = entries[key.value].origin.label.rpartition(":")[2]
                where = f" (first in line {first})" if self._has_lines else ""
                raise self._error(key, f"{dotted((*path, key.value))}: stated twice{where}; keep one")
            node = self._node(next(events), events, (*path, key.value))
            if key.value == "<<" and key.style is None:
                inherited |= self._merge_key(key, node)
            else:
                entries[key.value] = replace(node, origin=self._origin(key))
        return Node(value=inherited | entries, origin=origin)

    def _merge_key(self, key: Any, node: Node) -> dict[str, Node]:
        sources = node.value if isinstance(node.value, list) else [node]
        merged: dict[str, Node] = {}
        for source in reversed(sources):  # of several, the first wins
            if not isinstance(source.value, dict):
                raise self._error(key, "<<: must be a mapping, or a list of them")
            merged |= source.value
        return merged

    def _check_text(self, event: Any) -> None:
        if problem := bad_text(event.value):
            raise self._error(event, problem)

    def _check_depth(self, event: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(event, f"nested deeper than {MAX_DEPTH} levels")

    def _count(self, event: Any, num_nodes: int) -> None:
        self._num_nodes += num_nodes
        if self._num_nodes > MAX_NODES:
            raise self._error(event, f"more than {MAX_NODES} values, aliases expanded")

    def _origin(self, event: Any) -> Origin:
        return Origin(label=self._position(event.start_mark.line + 1), directory=self._directory)

    def _error(self, event: Any, what: str) -> ConfigError:
        return self._error_at(event.start_mark.line + 1, what)

    def _error_at(self, line: int, what: str) -> ConfigError:
        return ConfigError(f"{self._position(line)}: {short(what, 400)}")

    def _position(self, line: int) -> str:
        return f"{self._label}:{line}" if self._has_lines else self._label


def _yaml_hint(error: yaml.MarkedYAMLError) -> str:
    """What to do about the mistakes made most often."""
    problem = error.problem or ""
    if "'\\t'" in problem:
        return "; indent with spaces, not tabs"
    if "mapping values are not allowed" in problem:
        return "; check the indentation, and quote a text that holds ': '"
    if "could not find expected ':'" in problem:
        return "; every line is `key: value` or `- item`"
    if error.context and error.context_mark:
        return f" ({error.context} that starts in line {error.context_mark.line + 1})"
    return ""


_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BASES = {"0o": 8, "0x": 16}
_WORDS: Mapping[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def parse_scalar(text: str) -> Scalar:
    """An unquoted scalar by YAML 1.2's core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _integer(text: str) -> int | float:
    """Beyond 64 bits a float, which no setting of whole numbers takes."""
    try:
        value = int(text, _BASES.get(text[:2], 10))
        return value if -(2**63) <= value < 2**63 else float(value)
    except (ValueError, OverflowError):  # more digits than Python converts, or a float can hold
        return float("-inf" if text.startswith("-") else "inf")


def bad_text(text: str) -> str | None:
    """What is wrong with a text that no setting may hold, if anything is."""
    if "\0" in text:
        return "NUL characters are not allowed"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{short(text)}: half of a surrogate pair (or a byte that is not UTF-8) is not a character"
    return None


def short(text: str, limit: int = 80) -> str:
    """`text` on one line, printable, at most `limit` characters: it may come from anywhere."""
    printable = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[: limit + 1]
    )
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


def dotted(path: KeyPath) -> str:
    """Example: ("sft", "data", 0) -> "sft.data.0"."""
    return ".".join(short(str(key)) for key in path)


def describe(node: Node) -> str:
    """A value as an error names it."""
    if isinstance(node.value, dict):
        return "a group of settings"
    if isinstance(node.value, list):
        return "a list"
    if node.value is None:
        return "nothing"
    return repr(short(node.value, 40)) if isinstance(node.value, str) else short(node.text or "a value", 40)
