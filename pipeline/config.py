"""Config file and overrides -> one valid `ExperimentConfig`; a mistake is one line: where, what, how to fix.

    yaml_source.read_config -> Node tree -> pydantic -> paths made absolute -> LoadedConfig
                                               |
                                             error -> config_errors.explained -> `demo.yaml:12: sft.lrr: ...`

Owns: turning a tree into the config, paths, the resolved config as YAML, the JSON Schema.
Does not own: reading YAML (yaml_source), what is valid (experiment, stages.config), the wording of errors
(config_errors), the manual (config_docs).
"""

import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.config_errors import explained
from pipeline.config_fields import section_of
from pipeline.errors import ConfigError
from pipeline.experiment import ExperimentConfig
from pipeline.yaml_nodes import KeyPath, Node, describe, dotted, parse_scalar, short
from pipeline.yaml_source import read_config
from rollout.ground.section import Section, sections_in
from stages.config.data import DataSource
from stages.config.model import ModelConfig
from stages.config.training import FITTED, TrainingConfig
from stages.data.reading import hub
from stages.data.reading.lfs import POINTER, first_pointer
from stages.data.reading.places import files_matching
from stages.errors import DataError

UNION_BRANCHES = ("dict[str,str]", "list[str]")

__all__ = [
    "ConfigError",
    "LoadedConfig",
    "check_paths",
    "json_schema",
    "load",
    "require_utf_8",
    "resolved_yaml",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A valid config, and where each of its settings was stated."""

    config: ExperimentConfig  # data, score, template and local model paths are absolute
    tree: Node  # as stated: relative paths, no defaults

    def where(self, key: str) -> str:
        """Position of a dotted key, or of the section it would be in: `demo.yaml:12`, `override sft.lr=1`.

        Example: raise ConfigError(f"{loaded.where('sft.data')}: sft.data: ...")
        """
        return self.tree.nearest(tuple(key.split("."))).origin.label


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """The config in the YAML file `path`, overrides (`sft.lr=1e-4`) applied. Raises ConfigError, one line."""
    tree = _open_empty_sections(read_config(path, overrides), ExperimentConfig)
    config, tree = _validate(tree)
    for item in list(_stated_paths(config, tree)):
        require_utf_8(f"{item.stated.origin.label}: {_indexed(item.key)}", item.path)
        config = _replaced(config, item.key, item.path)
    require_utf_8("outputs", os.path.abspath(config.outputs))
    return LoadedConfig(config=config, tree=tree)


def require_utf_8(key: str, path: str) -> None:
    """Raises ConfigError for a path that no record of a run could hold: those are UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{key}: {short(path, 200)}: a name in it is not UTF-8; rename it") from error


def resolved_yaml(config: ExperimentConfig) -> str:
    """Every setting with its value, as YAML that `load` reads back to an equal config from anywhere."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors. Nothing is required: a file may build on another one."""
    schema = ExperimentConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
        for name in FITTED:
            if name in section["properties"]:
                section["properties"][name] = _or_null(section["properties"][name])
    about = "Config file that this one builds on, relative to it. Mappings merge, lists are replaced."
    schema["properties"] = {"base": {"type": "string", "description": about}, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _or_null(setting: dict[str, Any]) -> dict[str, Any]:
    """A setting that is fitted to a given model: null leaves it open. Editors show what is beside anyOf."""
    shown = ("title", "description", "default")
    beside = {name: item for name, item in setting.items() if name in shown}
    value = {name: item for name, item in setting.items() if name not in shown}
    return {"anyOf": [value, {"type": "null"}], **beside}


class _Dumper(yaml.SafeDumper):
    """PyYAML quotes what YAML 1.1 would not read as text; `load` reads 1.2, where `1e-5` is a number."""


def _quoted_if_needed(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(parse_scalar(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted_if_needed)


# --- validation


def _open_empty_sections(node: Node, section: type[Section]) -> Node:
    """A section's key with nothing after it (`pretrain:`) is that section, with defaults; `null` is none.

    `null` for a setting that is fitted to a given model takes back what a base states.
    """
    if not isinstance(node.value, dict):
        return node
    entries = dict(node.value)
    for key, child in node.value.items():
        if issubclass(section, TrainingConfig) and key in FITTED and child.value is None and child.text:
            del entries[key]
            continue
        annotation = section.model_fields[key].annotation if key in section.model_fields else None
        inner = None if get_origin(annotation) is list else section_of(annotation)
        if inner is not None:
            is_empty = child.value is None and child.text == ""
            entries[key] = _open_empty_sections(replace(child, value={}) if is_empty else child, inner)
    return replace(node, value=entries)


def _validate(tree: Node) -> tuple[ExperimentConfig, Node]:
    """The config, and its tree, in which an unquoted `5` or `true` has become text where text was wanted."""
    try:
        config = ExperimentConfig.model_validate(tree.plain())
    except ValidationError as invalid:
        errors = [_without_branches(error) for error in invalid.errors(include_url=False)]
        as_text = tree
        for error in errors:
            if error["type"] in ("string_type", "path_type"):
                as_text = _with_text(as_text, error["loc"])
        if as_text != tree:
            return _validate(as_text)
        errors.sort(key=lambda error: {"extra_forbidden": 0, "missing": 2}.get(error["type"], 1))
        raise explained(errors[0], tree) from None
    if (path := _bool_as_number(tree, config)) is not None:
        node = tree.nearest(path)
        raise ConfigError(f"{node.origin.label}: {dotted(path)}: must be a number, not {describe(node)}")
    return config, tree


def _without_branches(error: ErrorDetails) -> ErrorDetails:
    """pydantic's error, its place without the names of a union's branches (`columns` is a map or a list)."""
    return {**error, "loc": tuple(key for key in error["loc"] if key not in UNION_BRANCHES)}


def _with_text(node: Node, path: KeyPath) -> Node:
    """`node` with the scalar at `path`, if it was written without quotes, as text."""
    if not path:
        is_plain = node.text is not None and node.value is not None
        return replace(node, value=node.text, text=None) if is_plain else node
    child = node.child(path[0])
    if child is None:
        return node
    changed = _with_text(child, path[1:])
    if isinstance(node.value, list):
        return replace(node, value=[changed if item is child else item for item in node.value])
    assert isinstance(node.value, dict)
    return replace(node, value={**node.value, str(path[0]): changed})


def _bool_as_number(node: Node, value: Any, path: KeyPath = ()) -> KeyPath | None:
    """Where pydantic took `true` for 1, if anywhere."""
    if isinstance(node.value, bool):
        return None if isinstance(value, bool) else path
    if isinstance(node.value, str) or not isinstance(node.value, dict | list):
        return None
    keys: Sequence[str | int] = list(node.value) if isinstance(node.value, dict) else range(len(node.value))
    for key in keys:
        child = node.child(key)
        assert child is not None
        below = getattr(value, str(key)) if isinstance(value, Section) else value[key]
        if (found := _bool_as_number(child, below, (*path, key))) is not None:
            return found
    return None


# --- paths


PathKind = Literal["data", "file", "directory", "model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _StatedPath:
    key: KeyPath
    stated: Node
    path: str  # absolute, or a hub id
    kind: PathKind
    section: Section  # that it is a setting of


def check_paths(loaded: LoadedConfig, sections: Collection[str] | None = None) -> None:
    """Raises DataError, one line, if a file that the config (or these sections of it) names is not there.

    A dataset may be a file, a directory or a glob; what is in it is for the readers to check. One of weight 0
    is not read.
    """
    for item in _stated_paths(loaded.config, loaded.tree):
        if isinstance(item.section, DataSource) and item.section.weight == 0:
            continue
        if (sections is None or item.key[0] in sections) and (problem := _path_problem(item)):
            raise DataError(f"{item.stated.origin.label}: {_indexed(item.key)}: {problem}")


def _indexed(key: KeyPath) -> str:
    """Example: ("sft", "data", 0, "path") -> "sft.data[0].path"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _path_problem(item: _StatedPath) -> str | None:
    text = str(item.stated.value)
    stated = short(text, 200)
    if not os.path.isabs(os.path.expanduser(text)):
        stated += f" (in {short(str(item.stated.origin.directory), 200)})"
    if not os.path.exists(item.path):
        if isinstance(item.section, DataSource) and hub.is_hub_id(item.path):
            return _unreachable(item, stated, _hub_problem(item.section)) if _is_likely_local(item) else None
        if item.kind == "data" and glob.has_magic(text):
            return None if files_matching(item.path) else f"no file matches: {stated}"
        if item.kind == "model":
            return _model_problem(item, stated)
        is_file = item.kind == "file" or (item.kind == "data" and hub.names_a_file(item.path))
        kind = "directory" if item.kind == "directory" else "file" if is_file else "file or directory"
        advice = hub.meant_id(text, "dataset") if item.kind == "data" else ""
        return f"no such {kind}: {stated}{advice}"
    if item.kind in ("model", "directory") and not os.path.isdir(item.path):
        return f"not a directory: {stated}"
    if item.kind == "file" and not os.path.isfile(item.path):
        return f"not a file: {stated}"
    if not os.access(item.path, os.R_OK):
        return f"no permission to read: {stated}"
    if item.kind in ("directory", "file") and (pointer := first_pointer(Path(item.path))) is not None:
        return f"{pointer.name} is {POINTER}"
    return None


def _is_likely_local(item: _StatedPath) -> bool:
    """Whether what may be an id of the hub lies, but for its last part, in a directory that is here."""
    return "/" in item.path and (item.stated.origin.directory / item.path).parent.is_dir()


def _unreachable(item: _StatedPath, stated: str, problem: str | None) -> str | None:
    if problem is None:
        return None
    kind = "directory" if item.kind == "model" else "file or directory"
    reason = problem.removesuffix(hub.NOTHING_HERE)
    return f"no such {kind}: {stated}, and not reachable as a hub id either: {reason}"


def _model_problem(item: _StatedPath, stated: str) -> str | None:
    """What is wrong with a `model.path` where nothing lies here; the hub is asked where that is likely."""
    assert isinstance(item.section, ModelConfig)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", item.path) or hub.names_a_file(item.path):
        return f"no such directory: {stated}{hub.meant_id(str(item.stated.value), 'model')}"
    if not _is_likely_local(item) or hub.is_cached_model(item.path, item.section.revision):
        return None
    return _unreachable(item, stated, hub.model_problem(item.path, item.section.revision))


def _hub_problem(source: DataSource) -> str | None:
    """Why the hub does not say which commit is meant."""
    try:
        hub.hub_commit(source)
    except DataError as error:
        return str(error)
    return None


def _stated_paths(config: ExperimentConfig, tree: Node) -> Iterator[_StatedPath]:
    """Every path the config states, made absolute by the place that states it."""
    for key, section in sections_in(config):
        found: list[tuple[KeyPath, Path | str | None, PathKind]] = [
            (inner, path, "directory" if counted else "file") for inner, path, counted in section.files()
        ]
        match section:
            case DataSource():
                found += [(("path",), section.path, "data")]
            case ModelConfig():
                found += [
                    (("path",), section.path, "model"),
                    (("architecture",), section.architecture, "file"),
                ]
        for inner, value, kind in found:
            if value is None:
                continue
            stated = tree.nearest((*key, *inner))
            text = str(value)
            directory = stated.origin.directory
            path = str(directory / os.path.expanduser(text))
            if kind == "data" and glob.has_magic(text) and not os.path.exists(path):
                path = str(Path(glob.escape(str(directory))) / os.path.expanduser(text))
            is_hub_id = (kind == "model" and not text.startswith((".", "/", "~"))) or (
                kind == "data" and hub.is_hub_id(text)
            )
            if is_hub_id and not os.path.exists(path):
                path = text
            yield _StatedPath(key=(*key, *inner), stated=stated, path=path, kind=kind, section=section)


def _replaced(value: Any, path: KeyPath, text: str) -> Any:
    """`value`, a frozen section or what one holds, with the text or path at `path` replaced by `text`."""
    if not path:
        return type(value)(text)
    key, rest = path[0], path[1:]
    if isinstance(value, list):
        return [_replaced(item, rest, text) if index == key else item for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {name: _replaced(item, rest, text) if name == key else item for name, item in value.items()}
    name = str(key)
    return value.model_copy(update={name: _replaced(getattr(value, name), rest, text)})
