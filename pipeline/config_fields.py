"""What the model tree says about a key - its section, bounds, choices - and how an error about it is worded.

Owns: the one line of every invalid setting. Does not own: the settings (experiment, stages.config), positions
(yaml_source), validation itself (config).
"""

import difflib
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.errors import ConfigError
from pipeline.experiment import ExperimentConfig
from pipeline.yaml_source import KeyPath, Node, describe, dotted, short
from rollout.config import Section

SYNONYMS = {"learning_rate": "lr", "beta": "kl_coef", "max_new_tokens": "max_response_tokens"}
"""What other tools call a setting: for suggestions only."""

WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "dict": "a group of settings",
    "model": "a group of settings",
}
"""First word of pydantic's error type -> what it expected."""


def section_of(annotation: Any) -> type[Section] | None:
    """The section behind a field's type (`X`, `X | None`, `list[X]`), if it is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values a field with a fixed choice takes; empty for any other."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        found = tuple(choice for inner in get_args(annotation) for choice in choices(inner))
        return (*found, None) if found and type(None) in get_args(annotation) else found
    return ()


def bounds(field: FieldInfo) -> list[str]:
    """A field's bounds, in words. Example: Field(gt=0, le=1) -> ["> 0", "<= 1"]."""
    found = []
    for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        found += [f"{sign} {getattr(item, attribute)}" for item in field.metadata if hasattr(item, attribute)]
    for item in field.metadata:
        if hasattr(item, "min_length"):
            found.append("not empty" if item.min_length == 1 else f"at least {item.min_length} long")
        if hasattr(item, "max_length"):
            found.append(f"at most {item.max_length} long")
    return found


def explained(error: ErrorDetails, tree: Node) -> ConfigError:
    """Pydantic's error as one line, at the position of the key it is about."""
    path = error["loc"]
    if error["type"] != "value_error":
        node = tree.nearest(path)
        return ConfigError(f"{node.origin.label}: {dotted(path)}: {_reason(error, node)}")
    message = error["msg"].removeprefix("Value error, ")
    named: list[KeyPath]
    if path:  # a check within a section: the message names its fields
        named = [(*path, word) for word in re.findall(r"\w+", message)]
        message = f"{dotted(path)}: {message}"
    else:  # a check across sections: the message starts with the key it blames
        named = [tuple(word.split(".")) for word in re.findall(r"^\w+(?:\.\w+)*|\w+(?:\.\w+)+", message)]
    blamed = tree.nearest(next((key for key in named if _is_stated(key, tree)), path or named[0]))
    return ConfigError(f"{blamed.origin.label}: {short(message, 400)}")


def _reason(error: ErrorDetails, node: Node) -> str:
    """What is wrong, and what would be right."""
    kind, path, got = error["type"], error["loc"], describe(node)
    if kind == "extra_forbidden":
        return "no such setting" + _suggestion(path)
    field = _field_at(path)
    if kind == "missing":
        about = f" ({' '.join(field.description.split())})" if field is not None and field.description else ""
        return f"missing; add `{path[-1]}:`{about}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if field is not None and kind.startswith(("greater_", "less_", "too_long", "string_too_long")):
        return f"{got} is out of range; must be {' and '.join(bounds(field))}"
    if field is not None and kind == "literal_error":
        allowed = ["null" if choice is None else repr(choice) for choice in choices(field.annotation)]
        return f"must be {' or '.join(allowed)}, not {got}"
    if kind == "int_parsing_size":
        return f"{got} does not fit into 64 bits"
    if kind == "list_type" and isinstance(node.value, dict):
        return "must be a list; start each item with '- '"
    wanted = WANTED.get(kind.split("_")[0])
    return f"must be {wanted}, not {got}" if wanted else short(error["msg"], 200)


def _suggestion(path: KeyPath) -> str:
    key, section = str(path[-1]), _section_at(path[:-1])
    names = [] if section is None else list(section.model_fields)
    near = difflib.get_close_matches(key.lower(), names, n=1)
    if SYNONYMS.get(key) in names:
        near = [SYNONYMS[key]]
    if not near and key in ExperimentConfig.model_fields:
        near = [f"{key}, at the left margin"]
    if not near:
        fields = ExperimentConfig.model_fields.items()
        sections = [(name, other) for name, field in fields if (other := section_of(field.annotation))]
        near = [f"{name}.{key}" for name, other in sections if key in other.model_fields]
    if not near:
        return "; docs/configuration.md lists them all"
    return f"; did you mean {' or '.join(repr(name) for name in near[:3])}?"


def _is_stated(path: KeyPath, tree: Node) -> bool:
    """Whether `path` names a setting that the config states."""
    return _field_at(path) is not None and tree.nearest(path[:-1]).child(path[-1]) is not None


def _section_at(path: KeyPath) -> type[Section] | None:
    section: type[Section] | None = ExperimentConfig
    for key in path:
        if isinstance(key, str) and section is not None:
            field = section.model_fields.get(key)
            section = None if field is None else section_of(field.annotation)
    return section


def _field_at(path: KeyPath) -> FieldInfo | None:
    if not path or isinstance(path[-1], int):
        return None
    section = _section_at(path[:-1])
    return None if section is None else section.model_fields.get(path[-1])
