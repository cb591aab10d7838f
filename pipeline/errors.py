"""Errors of the pipeline, each with its exit code (see `rollout.errors`)."""

from rollout.errors import ExpectedError


class ConfigError(ExpectedError):
    """A mistake in a config or an override: `demo.yaml:12: sft.lrr: no such setting; did you mean 'lr'?`."""

    exit_code = 2
