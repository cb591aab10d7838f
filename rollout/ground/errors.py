"""Errors a user can cause or must be told about: one line each, with the exit code it ends in.

Owns: the root of the hierarchy, because every package may import `rollout.ground`. The cli prints
`str(error)` and exits with `exit_code`. Anything that is not an `ExpectedError` is our bug (exit 1, traceback
in the log).
"""

from typing import NoReturn

GO_ON = "run the same command to go on"
"""The cure of what hits a run from outside: its state is saved, and valid."""


class ExpectedError(Exception):
    """What, where, how to fix, in one line. Takes exactly one argument, so that it survives a process
    boundary.
    """

    exit_code = 1


class EnvironmentProblem(ExpectedError):
    """The machine, not the config or the data: Ray, the hub, a held lock, memory, a missing build."""

    exit_code = 4


class ProcessDied(EnvironmentProblem):
    """A process of the run is gone: killed, or out of memory."""


def root_cause(error: BaseException) -> BaseException:
    """What was raised first, behind any number of process borders (Ray wraps an error once per border)."""
    while any(kind.__name__ == "RayTaskError" for kind in type(error).__mro__):
        inner: BaseException | None = error.cause  # type: ignore[attr-defined]  # RayTaskError; Ray is not imported here
        if inner is None or inner is error:
            break
        error = inner
    return error


def in_a_line(error: BaseException) -> str:
    """What was raised first, and the first line it says: Ray repeats a whole traceback in its message."""
    cause = root_cause(error)
    first, *_ = str(cause).splitlines() or [""]
    return f"{type(cause).__name__}: {first}"


def raise_expected(error: BaseException) -> NoReturn:
    """Raise an error of another process again: as itself if it is meant for the user, else as Ray gave it."""
    cause = root_cause(error)
    if isinstance(cause, ExpectedError):
        raise cause from None
    raise error
