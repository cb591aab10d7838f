"""Section: what every part of the config tree is, and what of it is identity. Light import: pydantic only.

A setting that cannot change the result (a name, a path, a deadline, a number of workers) is marked
`EXECUTION` and stays out of a stage's fingerprint.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

EXECUTION: dict[str, Any] = {"identity": False}
"""`json_schema_extra` of a field that must not change the result."""


Seconds = Annotated[float, Field(le=1_000_000)]
"""A deadline or a pause: 11 days at most, which every timer and system call can hold, in milliseconds too."""


class Section(BaseModel):
    """A strict, frozen part of the config tree."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The values that can change the result, as plain JSON types; EXECUTION fields are left out at any
        depth.
        """
        return {
            name: _identity_of(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if field.json_schema_extra != EXECUTION
        }


def _identity_of(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, list | tuple):
        return [_identity_of(item) for item in value]
    if isinstance(value, dict):
        return {key: _identity_of(item) for key, item in value.items()}
    return value
