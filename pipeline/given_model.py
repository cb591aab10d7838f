"""What the files of a given model tell of its size, before anything loads it.

    config.json --Architecture--> parameters, bytes per token --.
    headers of *.safetensors --count (other families)-----------+--> GivenModel

Owns: finding the size. Does not own: the arithmetic (architecture), whether the directory may be used
(model_files, model_rules), what follows from the size (fitted_defaults, placement). Light import.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipeline.architecture import Architecture
from pipeline.errors import ConfigError
from pipeline.model_files import weight_files
from rollout.safetensors_header import BadHeader, read_header


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenModel:
    """A model that a run starts from instead of training one from scratch."""

    named: str  # as the user gave it: `model.path org/name`
    num_parameters: int | None  # None: nothing on this machine tells
    architecture: Architecture | None  # None: unknown, or its config.json calls sizes otherwise than a LLaMA
    num_positions: int | None  # tokens it was made for, where its config.json says so

    @classmethod
    def unknown(cls, named: str) -> Self:
        """Of a model that is not on this machine, and whose config.json is not either."""
        return cls(named=named, num_parameters=None, architecture=None, num_positions=None)

    @classmethod
    def described_in(cls, config_json: Path, *, named: str) -> Self:
        """By a config.json alone. What is wrong in it is not judged here: such a size is unknown."""
        architecture = _architecture(config_json)
        return cls(
            named=named,
            num_parameters=None if architecture is None else architecture.whole,
            architecture=architecture,
            num_positions=_num_positions(config_json),
        )

    @classmethod
    def in_directory(cls, directory: Path, *, named: str) -> Self:
        """By its config.json, or else by the shapes of its weights."""
        found = cls.described_in(directory / "config.json", named=named)
        if found.num_parameters is not None:
            return found
        return cls(
            named=named,
            num_parameters=_count(directory),
            architecture=None,
            num_positions=found.num_positions,
        )

    @property
    def size(self) -> str:
        """Example: "134.5M parameters"."""
        if self.num_parameters is None:
            return "of unknown size"
        unit, divisor = ("B", 1e9) if self.num_parameters >= 1e9 else ("M", 1e6)
        return f"{self.num_parameters / divisor:.4g}{unit} parameters"


def _architecture(config_json: Path) -> Architecture | None:
    try:
        return Architecture.from_file(config_json)
    except ConfigError:
        return None


def _num_positions(config_json: Path) -> int | None:
    try:
        stated = json.loads(config_json.read_text())["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return stated if type(stated) is int and stated > 0 else None


def _count(directory: Path) -> int | None:
    """Elements of all tensors; None for files that cannot be read."""
    try:
        headers = [read_header(path) for path in weight_files(directory)]
    except (OSError, BadHeader):
        return None
    return sum(math.prod(entry.shape) for header in headers for entry in header.values()) or None
