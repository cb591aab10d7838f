"""Errors of the rollout service, each with its exit code (see `rollout.ground.errors`)."""

from rollout.ground.errors import EnvironmentProblem, ExpectedError


class EngineError(EnvironmentProblem):
    """A rollout engine did not start, did not answer before its deadline, or died."""


class WeightSyncError(EngineError):
    """Weights did not reach an engine whole. The engine must be rebuilt: it may hold a mixture of
    versions.
    """


class ParityError(ExpectedError):
    """Engine and trainer disagree about log-probs: training on would be silently wrong."""

    exit_code = 5
