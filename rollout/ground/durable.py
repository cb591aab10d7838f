"""Durable: files that a crash leaves whole or absent.

    bytes -> `.tmp` name -> fsync -> rename -> fsync of the directory

Owns: that order. Does not own: how a reader tells that bytes are as they were written (whole), what a broken
disk costs (disk). Light import.
"""

import contextlib
import os
from pathlib import Path

UNFINISHED = ".tmp"


def write_whole(path: Path, content: bytes) -> None:
    """Write all of a file or none of it, also beside another process that does; on the disk when this
    returns. OSError.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when the bytes of a file, or the names in a directory, are on the disk. OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
