"""Disk: the one net for what a machine lacks or refuses: space, permission, a broken disk, a lost server.

    OSError --disk_problems--> one line: where, what, the cure
    any error of a stage --fault_behind--> the same cure, where a library wrapped the error or quotes its text

Owns: which errors are the machine's, and the cure of each. Does not own: damage, where bytes can be read and
are not those that were written (whole). Light import.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from rollout.ground.errors import GO_ON, EnvironmentProblem

USED_UP = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
LOST_FILE_SERVER = {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO}
BROKEN_DISK = {errno.EROFS, errno.EIO} | LOST_FILE_SERVER
FREE_SOME = "free some"
ALLOW = "allow it, or set outputs=DIR"
CHECK_THE_DISK = "check the disk, or set outputs=DIR"


@contextlib.contextmanager
def disk_problems(path: Path) -> Iterator[None]:
    """Inside, an OSError becomes an EnvironmentProblem: one line about the file that it names, or `path`."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(f"{_where(error, path)}: {_what(error)}; then {GO_ON}") from error


def fault_behind(error: BaseException) -> str | None:
    """What the machine lacks or refuses, and the cure, if that is behind `error`; None if nothing is.

    Libraries wrap such an error, or only quote its text, so its whole chain is looked at. A missing
    permission counts only where it is the error itself, because some code asks first and goes on without.
    """
    if isinstance(error, PermissionError):
        return f"{error}; {ALLOW}"
    for link in _chain(error):
        if isinstance(link, MemoryError):
            return f"{str(link) or 'out of memory'}; {FREE_SOME}"
        for numbers, cure in ((USED_UP, FREE_SOME), (BROKEN_DISK, CHECK_THE_DISK)):
            quoted = any(os.strerror(number) in str(link) for number in numbers)
            if quoted or (isinstance(link, OSError) and link.errno in numbers):
                return f"{next(iter(str(link).splitlines()))}; {cure}"
    return None


def _where(error: OSError, path: Path) -> str:
    where = str(path if error.filename is None else error.filename)
    # a rename names two files, and either may be to blame
    return where if error.filename2 is None else f"{where} -> {error.filename2}"


def _what(error: OSError) -> str:
    if isinstance(error, PermissionError):
        cure = ALLOW
    else:
        cure = FREE_SOME if error.errno in USED_UP else CHECK_THE_DISK
    return f"{error.strerror or error}; {cure}"


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, each once."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain
