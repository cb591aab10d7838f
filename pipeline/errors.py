"""Errors of the pipeline, each with its exit code (see `rollout.errors`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rollout.errors import EnvironmentProblem, ExpectedError


class ConfigError(ExpectedError):
    """A mistake in a config or an override: `demo.yaml:12: sft.lrr: no such setting; did you mean 'lr'?`."""

    exit_code = 2


class MissingStage(ExpectedError):
    """A stage that another one builds on has not run yet, or what `--input` names cannot stand in for it."""

    exit_code = 2


class CorruptArtifact(EnvironmentProblem):
    """A file of an artifact is not what its manifest says."""


class StageFailed(ExpectedError):
    """A stage raised what it should not: our bug. The traceback is in the run's logs."""

    exit_code = 1


@contextlib.contextmanager
def disk_problems(path: Path) -> Iterator[None]:
    """Inside, an error of the disk (no permission, no space, no directory) becomes one line about `path`."""
    try:
        yield
    except OSError as error:
        where = path if error.filename is None else error.filename
        if error.filename2 is not None:  # a rename: either may be to blame
            where = f"{where} -> {error.filename2}"
        raise EnvironmentProblem(
            f"{where}: {error.strerror or error}; check the disk, or set outputs=DIR"
        ) from error
