"""YAML files and overrides, as a tree in which every value knows where it was stated.

    file --events--> Node tree --`base:`--> merged over its base --KEY=VALUE--> overridden --plain()--> values

Owns: reading YAML safely, `base:`, merging, overrides, positions. Does not own: what a key means (config).
Scalars follow YAML 1.2 (`1e-5` is a number, `yes` is text). Whatever a file holds, the worst outcome is one
`ConfigError`: there are no tags, so no objects; depth, size and the expansion of aliases are bounded.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError

MAX_BYTES = 1 << 20  # of one file; the pure-Python parser reads about 0.5 MiB/s
MAX_DEPTH = 32  # the deepest setting is at 5
MAX_NODES = 100_000  # with aliases expanded
MAX_BASES = 16  # a file's `base:`, its base's, ...

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


def read_config(path: Path, overrides: Sequence[str] = ()) -> Node:
    """The settings of a file over those of its `base:`, `overrides` applied in order. Raises ConfigError."""
    tree = _read_with_base(path, short(str(path), 300), None, ())
    for override in overrides:
        tree = _override(tree, override)
    return tree


# --- files


def _read_with_base(path: Path, label: str, stated: Origin | None, children: tuple[str, ...]) -> Node:
    """`label` names the file in errors; `stated` is the `base:` that led here, `children` those before it."""
    tree = _parse_file(path, label, stated)
    assert isinstance(tree.value, dict)
    base = tree.value.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base.value, str) or not base.value:
        raise ConfigError(f"{base.origin.label}: base: must be the path of another config file")
    base_path = base.origin.directory / os.path.expanduser(base.value)
    seen = (*children, os.path.realpath(path))  # unlike Path.resolve, no error on a circle of links
    if os.path.realpath(base_path) in seen:
        raise ConfigError(f"{base.origin.label}: base: {short(base.value)} builds on this file: a circle")
    if len(seen) > MAX_BASES:
        raise ConfigError(f"{base.origin.label}: base: more than {MAX_BASES} files build on one another")
    if os.path.exists(base_path) and not os.path.isfile(base_path) and not os.path.isdir(base_path):
        raise ConfigError(f"{base.origin.label}: base: {short(base.value)} is a device or a pipe, not a file")
    base_label = os.path.normpath(Path(label).parent / os.path.expanduser(base.value))
    return merge(_read_with_base(base_path, base_label, base.origin, seen), tree)


def _parse_file(path: Path, label: str, stated: Origin | None) -> Node:
    blame = label if stated is None else f"{stated.label}: base"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{blame}: no such file" + ("" if stated is None else f": {label}")) from None
    except IsADirectoryError:
        which = "" if stated is None else f" ({label})"
        raise ConfigError(f"{blame}: a directory{which}, not a YAML file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{blame}: cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{label}: larger than {MAX_BYTES >> 20} MiB; is this a config?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02X}"
        raise ConfigError(f"{label}:{line}: not UTF-8 ({byte}); convert with iconv") from None
    tree = _Composer(text, label, Path(os.path.realpath(path.parent))).document()
    if tree is None:
        raise ConfigError(f"{label}: empty; a config is lines of `key: value`, at least `name: ...`")
    if not isinstance(tree.value, dict):
        what = f"must be settings (lines of `key: value`), not {describe(tree)}"
        raise ConfigError(f"{tree.origin.label}: {what}")
    return tree


# --- YAML


class _Composer:
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
        if problem := _bad_text(event.value):
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


def _bad_text(text: str) -> str | None:
    """What is wrong with a text that no setting may hold, if anything is."""
    if "\0" in text:
        return "NUL characters are not allowed"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{short(text)}: half of a surrogate pair (or a byte that is not UTF-8) is not a character"
    return None


# --- merging and overrides


def merge(below: Node, over: Node) -> Node:
    """`over` on top of `below`: mappings key by key, all else replaced. An empty `key:` keeps a mapping."""
    if isinstance(below.value, dict) and isinstance(over.value, dict):
        entries = dict(below.value)
        for key, node in over.value.items():
            entries[key] = merge(entries[key], node) if key in entries else node
        return replace(over, value=entries)
    if isinstance(below.value, dict) and over.value is None and over.text == "":
        return below
    return over


def _override(tree: Node, override: str) -> Node:
    """`tree` with one KEY=VALUE applied: mappings merge; a list's item is replaced, or added at its end."""
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not all(path) or key != key.strip() or len(path) > MAX_DEPTH:
        raise ConfigError(f"override {short(override)!r}: expected KEY=VALUE, as in sft.lr=1e-4")
    if not text.strip():
        raise ConfigError(f"override {short(override)!r}: no value; for none at all write {short(key)}=null")
    origin = Origin(label=f"override {short(override)}", directory=Path.cwd())
    if problem := _bad_text(override):
        raise ConfigError(f"{origin.label}: {problem}")
    return _with(tree, tuple(path), _override_value(text.strip(), origin), origin)


def _override_value(text: str, origin: Origin) -> Node:
    """Lists, mappings and quoted text are YAML; all else is one scalar, so `*.jsonl` needs no quotes."""
    if text[0] not in "[{\"'":
        return Node(value=parse_scalar(text), origin=origin, text=text)
    node = _Composer(text, origin.label, origin.directory, has_lines=False).document()
    assert node is not None
    return replace(node, text=text if text[0] in "[{" else None)  # {prompt} may be meant as text


def _with(node: Node | None, path: tuple[str, ...], value: Node, origin: Origin) -> Node:
    """`node` with `value` at `path`; what is not there yet is created."""
    if not path:
        return value if node is None else merge(node, value)
    key, rest = path[0], path[1:]
    if (node is None or node.value is None) and key == "0":
        return Node(value=[_with(None, rest, value, origin)], origin=origin)
    if node is not None and isinstance(node.value, list):
        size = len(node.value)
        if key not in map(str, range(size + 1)):
            what = f"no item '{short(key)}' in this list of {size}; they count from 0, and {size} adds one"
            raise ConfigError(f"{origin.label}: {what}")
        items = [*node.value]
        items[int(key) : int(key) + 1] = [_with(node.child(key), rest, value, origin)]
        return replace(node, value=items)
    if node is not None and isinstance(node.value, dict):
        return replace(node, value={**node.value, key: _with(node.value.get(key), rest, value, origin)})
    return Node(value={key: _with(None, rest, value, origin)}, origin=origin)


# --- text of errors


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
