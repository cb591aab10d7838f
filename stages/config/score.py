"""The user's scoring function, as a config names it. Light import: pydantic only."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from rollout.ground.section import Section, by_content


class ScoreFunction(Section):
    """A user's own scoring function: the one kind of code a config may name."""

    type: Literal["python"] = "python"
    """A function in a local Python file."""
    path: Path = Field(json_schema_extra=by_content())
    """The file; identified by its content."""
    function: str = "score"
    """`function(prompt, response, row)` -> score in [0, 1], or a mapping with `score` and named
    components.
    """
