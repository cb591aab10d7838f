"""Section: what every part of the config tree is, and what of it is identity. Light import: pydantic only.

    Field(json_schema_extra=EXECUTION)         a name, a deadline, a number of workers: never identity
    Field(json_schema_extra=by_content())      a file: its content is identity, its name is not
    Field(json_schema_extra=as_before(0.5))    a newer setting: identity unless it holds that value

A marked field is left out of `identity`. Owns: what the marks mean, and finding the files that settings name.
Does not own: digests of those files (pipeline.identity), reading YAML (pipeline.config).
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

EXECUTION: dict[str, Any] = {"identity": False}
"""`json_schema_extra` of a field that must not change the result."""
CONTENT, AS_BEFORE = "content", "as_before"

KeyPath = tuple[str | int, ...]

Seconds = Annotated[float, Field(le=1_000_000)]
"""A deadline or a pause: 11 days at most, which every timer and system call can hold, in milliseconds too."""


def by_content(*names: str) -> dict[str, Any]:
    """`json_schema_extra` of a path whose content is identity.

    `names`: it is a directory, and these files in it count; the first is always there.
    """
    return {**EXECUTION, CONTENT: list(names)}


def as_before(value: Any) -> dict[str, Any]:
    """`json_schema_extra` of a setting that is newer than some artifacts, made as if it held `value`
    (plain JSON). While it does, it is no part of the identity, and they are taken as they are.
    """
    return {AS_BEFORE: value}


class Section(BaseModel):
    """A strict, frozen part of the config tree."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The values that can change the result, as plain JSON types. Marked fields are left out at any
        depth.
        """
        values = {
            name: _identity_of(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not is_execution(field)
        }
        return {name: value for name, value in values.items() if not self._is_as_before(name, value)}

    def files(self) -> Iterator[tuple[KeyPath, Path, list[str]]]:
        """Key, path and what counts in it (empty for a file) of every stated path that is identified by its
        content. A setting may hold several, in a list or a mapping.

        Example: (("code", 0), Path("a.py"), [])
        """
        for name, field in type(self).model_fields.items():
            extra = _extra(field)
            if CONTENT in extra:
                for key, path in _leaves(getattr(self, name), (name,)):
                    yield key, path, extra[CONTENT]

    def _is_as_before(self, name: str, value: Any) -> bool:
        extra = _extra(type(self).model_fields[name])
        return AS_BEFORE in extra and bool(extra[AS_BEFORE] == value)


def sections_in(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Section]]:
    """Every section in `value`, itself included, with its path, depth first.

    Example: (("sft", "data", 0), DataSource(...))
    """
    if isinstance(value, Section):
        yield path, value
    for name, item in _items(value):
        yield from sections_in(item, (*path, name))


def is_execution(field: FieldInfo) -> bool:
    """Whether a setting, as it is written in a config, is no part of the identity whatever it holds."""
    return EXECUTION.items() <= _extra(field).items()


def _items(value: Any) -> Iterable[tuple[str | int, Any]]:
    """What a section or a collection holds, by name or number of the place; nothing of any other value."""
    if isinstance(value, Section):
        return ((name, getattr(value, name)) for name in type(value).model_fields)
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """`value`, or what the collections in it hold, each with its path; None is nothing."""
    if isinstance(value, Mapping | list | tuple):
        for name, item in _items(value):
            yield from _leaves(item, (*path, name))
    elif value is not None:
        yield path, value


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _identity_of(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, list | tuple):
        return [_identity_of(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _identity_of(item) for key, item in value.items()}
    return value
