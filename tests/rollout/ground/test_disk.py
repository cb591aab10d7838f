"""What the machine lacks or refuses costs one line, with the cure that fits."""

import errno
import os
from pathlib import Path

import pytest

from rollout.ground.disk import disk_problems, fault_behind
from rollout.ground.errors import EnvironmentProblem

AGAIN = "; then run the same command to go on"


def refused(number: int, *names: str) -> OSError:
    """What a system call raises; `names` as `open` or `rename` give them."""
    first, second = (*names, None, None)[:2]
    return OSError(number, os.strerror(number), first, None, second)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (refused(errno.ENOSPC), f"out: No space left on device; free some{AGAIN}"),
        (refused(errno.EDQUOT, "out/x"), f"out/x: Disk quota exceeded; free some{AGAIN}"),
        (
            refused(errno.EACCES, "out/x"),
            f"out/x: Permission denied; allow it, or set outputs=DIR{AGAIN}",
        ),
        (
            refused(errno.EIO, "a", "b"),
            f"a -> b: Input/output error; check the disk, or set outputs=DIR{AGAIN}",
        ),
        (OSError("odd"), f"out: odd; check the disk, or set outputs=DIR{AGAIN}"),
    ],
)
def test_an_error_of_the_disk_is_one_line_with_its_cure(error: OSError, line: str):
    with pytest.raises(EnvironmentProblem) as caught, disk_problems(Path("out")):
        raise error
    assert str(caught.value) == line and caught.value.exit_code == 4
    assert caught.value.__cause__ is error


def raised_from(error: Exception, cause: Exception) -> Exception:
    """`error` as a library raises it over `cause`."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (MemoryError(), "out of memory; free some"),
        (
            raised_from(RuntimeError("writer died"), refused(errno.ENOSPC, "x")),
            "[Errno 28] No space left on device: 'x'; free some",
        ),
        (
            RuntimeError("io: Stale file handle\n at line 3"),
            "io: Stale file handle; check the disk, or set outputs=DIR",
        ),
        (
            refused(errno.EACCES, "x"),
            "[Errno 13] Permission denied: 'x'; allow it, or set outputs=DIR",
        ),
        (raised_from(RuntimeError("asked"), refused(errno.EACCES, "x")), None),
        (ValueError("a bug of ours"), None),
    ],
)
def test_a_fault_of_the_machine_is_found_behind_any_error(error: Exception, fault: str | None):
    assert fault_behind(error) == fault


def test_errors_that_name_each_other_come_to_an_end():
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert fault_behind(first) is None
