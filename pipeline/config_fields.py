"""What the tree of config models says about a key: its section, field, bounds and choices.

Owns: looking a key up. Does not own: the settings (experiment, stages.config), how errors are worded
(config_errors), the manual (config_docs).
"""

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.experiment import ExperimentConfig
from pipeline.yaml_nodes import KeyPath
from rollout.ground.section import Section


def section_of(annotation: Any) -> type[Section] | None:
    """The section behind a field's type (`X`, `X | None`, `list[X]`), if it is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def section_at(path: KeyPath) -> type[Section] | None:
    """The section that holds what is below `path`; a list's items count as the list. None: there is none."""
    section: type[Section] | None = ExperimentConfig
    for key in path:
        if isinstance(key, str) and section is not None:
            field = section.model_fields.get(key)
            section = None if field is None else section_of(field.annotation)
    return section


def field_at(path: KeyPath) -> FieldInfo | None:
    """The setting at `path`, if there is one."""
    if not path or isinstance(path[-1], int):
        return None
    section = section_at(path[:-1])
    return None if section is None else section.model_fields.get(path[-1])


def has_setting(path: KeyPath) -> bool:
    """Whether `path` names a setting. Example: has_setting(("sft", "data", 0, "path"))."""
    return field_at(path) is not None


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
