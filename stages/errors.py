"""Errors of the stages, each with its exit code (see `rollout.ground.errors`)."""

from rollout.ground.errors import ExpectedError


class DataError(ExpectedError):
    """A dataset the config names is missing or malformed: `file:line: field: what is wrong; how to fix`."""

    exit_code = 3


class ModelError(ExpectedError):
    """A model directory cannot be used as the config asks (missing head, no tokenizer, wrong vocabulary)."""

    exit_code = 2


class TrainingStopped(ExpectedError):
    """Training stopped itself: bad steps that do not end, rollouts beyond a limit, or a gate not met."""

    exit_code = 5


class Interrupted(ExpectedError):
    """The run was asked to stop, and this stage did so at a step boundary with its state saved."""

    exit_code = 75
