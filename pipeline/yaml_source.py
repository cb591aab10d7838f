"""YAML sources: files and overrides -> one tree of settings.

    file --nodes--> Node tree --`base:`--> merged over its base --KEY=VALUE--> overridden

Owns: finding and reading files, `base:`, merging, overrides. Does not own: the text of a file (yaml_nodes),
what a key means (config).
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.yaml_nodes import (
    MAX_DEPTH,
    Composer,
    Node,
    Origin,
    bad_text,
    describe,
    parse_scalar,
    short,
)

MAX_BYTES = 1 << 20  # of one file; the pure-Python parser reads about 0.5 MiB/s
MAX_BASES = 16  # a file's `base:`, its base's, ...


def read_config(path: Path, overrides: Sequence[str] = ()) -> Node:
    """The settings of a file over those of its `base:`, `overrides` applied in order. Raises ConfigError."""
    tree = _read_with_base(path, short(str(path), 300), None, ())
    for override in overrides:
        tree = _override(tree, override)
    return tree


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
    tree = Composer(text, label, Path(os.path.realpath(path.parent))).document()
    if tree is None:
        raise ConfigError(f"{label}: empty; a config is lines of `key: value`, at least `name: ...`")
    if not isinstance(tree.value, dict):
        what = f"must be settings (lines of `key: value`), not {describe(tree)}"
        raise ConfigError(f"{tree.origin.label}: {what}")
    return tree


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
    if problem := bad_text(override):
        raise ConfigError(f"{origin.label}: {problem}")
    return _with(tree, tuple(path), _override_value(text.strip(), origin), origin)


def _override_value(text: str, origin: Origin) -> Node:
    """Lists, mappings and quoted text are YAML; all else is one scalar, so `*.jsonl` needs no quotes."""
    if text[0] not in "[{\"'":
        return Node(value=parse_scalar(text), origin=origin, text=text)
    node = Composer(text, origin.label, origin.directory, has_lines=False).document()
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
