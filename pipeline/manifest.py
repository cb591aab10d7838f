"""The manifest: what an artifact is, what it was made from, and every byte of it.

Owns: the record, reading it, which exactness a run had. Does not own: where artifacts lie and how they are
published (artifacts), how bytes are compared (rollout.ground.whole).
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from pipeline.errors import CorruptArtifact
from pipeline.identity import SCHEMA_VERSION
from rollout.ground.whole import Measured, NotWhole, check_own_digest, json_object, with_own_digest

MANIFEST = "manifest.json"
TEST_SIZE_BYTES = 64 * 2**20
"""Weights of a model small enough to promise exactness: at 135M parameters log-probs already move."""

Exactness = Literal["exact", "same order"]


class Manifest(BaseModel):
    """The record of an artifact: what it is, what it was made from, and every byte of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    digest: str  # blake3 of this file with an empty digest: an edited record is noticed
    schema_version: int
    stage: str
    fingerprint: str
    recipe_version: int
    settings: dict[str, Any]  # resolved, execution settings included
    seeds: dict[str, int]
    inputs: dict[str, str]  # input key -> fingerprint
    contents: dict[str, str]  # dotted key of a file the settings name -> digest of its content
    # "exact": the same bytes again from the same config; else the same prompts, seeds and order
    exactness: Exactness
    packages: dict[str, str]
    machine: dict[str, str]
    git_commit: str | None  # of the pipeline's own checkout; "-dirty" where it had changes
    started_at: str  # UTC, ISO 8601
    seconds: float  # of the execution that finished it
    metrics: dict[str, float]
    files: dict[str, Measured]  # path below the artifact -> its bytes; the manifest is not among them

    @field_validator("files")
    @classmethod
    def _files_lie_below(cls, files: dict[str, Measured]) -> dict[str, Measured]:
        for name in files:
            plain = os.path.normpath(name) == name and not name.startswith(("/", ".."))
            if not plain or name == "." or "\0" in name:
                raise ValueError(f"{name!r} is not a path below the artifact")
        return files


def manifest_text(manifest: Manifest) -> str:
    """The file of a manifest whose `digest` is empty: with the digest of itself."""
    assert not manifest.digest
    return with_own_digest(manifest.model_dump_json(indent=2) + "\n")


def read_manifest(directory: Path, *, hint: str) -> Manifest:
    """The manifest of an artifact as it was written, its files not verified. Raises CorruptArtifact."""
    path = directory / MANIFEST
    try:
        text = path.read_bytes().decode()
        version = json_object(text).get("schema_version")
        if type(version) is int and version != SCHEMA_VERSION:
            raise CorruptArtifact(
                f"{path}: schema version {version}, this code reads {SCHEMA_VERSION}; {hint}"
            )
        manifest = Manifest.model_validate_json(text)
        check_own_digest(text, manifest.digest)
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{path}: missing; {hint}") from error
    except ValueError as error:
        raise CorruptArtifact(f"{path}: not a manifest of this version; {hint}") from error
    except NotWhole as error:
        raise CorruptArtifact(f"{path}: {error}; {hint}") from error
    return manifest


def exactness_of(
    *,
    precision: str,
    num_workers: int,
    num_gpus: float,
    max_staleness: int,
    weights: Iterable[Path],
    inputs: Iterable[Exactness],
) -> Exactness:
    """What a repetition gives: the same bytes (fp32, one CPU worker, sync, test size), else the order."""
    small = sum(path.stat().st_size for path in weights) <= TEST_SIZE_BYTES
    exact = precision == "fp32" and num_workers == 1 and not num_gpus and not max_staleness and small
    return "exact" if exact and all(value == "exact" for value in inputs) else "same order"
