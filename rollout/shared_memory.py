"""What lies in /dev/shm, and which processes have it mapped: how a dead owner's files are told apart.

    /proc/<pid>/maps --inodes--> files of /dev/shm

Owns: reading both. Does not own: removing (vllm_engine for an engine, pipeline.janitor for a run).
By inode, for glibc maps a semaphore under one name and then gives it another.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def files() -> dict[Path, int]:
    """Every file in shared memory that may be seen, and its inode."""
    found = {}
    for path in SHARED_MEMORY.iterdir():
        with contextlib.suppress(OSError):  # removed just now
            if not path.is_dir():
                found[path] = path.stat().st_ino
    return found


def mapped_by(pids: Iterable[int]) -> set[int]:
    """Inodes of the files in shared memory that the processes have mapped. Those that are gone have none."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED_MEMORY}/" in line}
    return found


def files_of(pids: Iterable[int]) -> set[Path]:
    """The files that the processes have mapped, by the names they have now."""
    inodes = mapped_by(pids)
    return {path for path, inode in files().items() if inode in inodes}
