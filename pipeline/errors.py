"""Errors of the pipeline, each with its exit code (see `rollout.ground.errors`)."""

from rollout.ground.errors import EnvironmentProblem, ExpectedError


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
