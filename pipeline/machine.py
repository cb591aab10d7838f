"""What this machine gives to a run, as its container limits it: memory, cores, open files, shared memory.

    /proc, cgroup files (v1, v2), limits of the process --> bytes, cores, files

Owns: reading it. Does not own: what is enough (doctor for any run, preflight for one). Light import.
"""

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from rollout.shared_memory import SHARED_MEMORY

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineMemory:
    """Bytes that processes of this container may take."""

    total: int  # with swap
    free: int  # without


def memory() -> MachineMemory:
    """The machine's memory, or what its container may take of it."""
    machine, swap = psutil.virtual_memory(), psutil.swap_memory()
    total, free = machine.total + swap.total, machine.available
    for group, v1 in _groups("memory"):
        limit = _number(group / ("memory.limit_in_bytes" if v1 else "memory.max"))
        used = _number(group / ("memory.usage_in_bytes" if v1 else "memory.current"))
        if limit is not None and used is not None and limit < machine.total:
            total, free = min(total, limit), min(free, max(0, limit - used + _reclaimable(group)))
    return MachineMemory(total=total, free=free)


def usable_cores() -> int:
    """Cores that threads of this process are spread over."""
    return len(os.sched_getaffinity(0))


def core_quota() -> float | None:
    """Cores' worth of time that the container gets, where that is less than it spreads its threads over."""
    quotas = [_quota(group, v1) for group, v1 in _groups("cpu")]
    least = min((quota for quota in quotas if quota is not None), default=None)
    return least if least is not None and least < usable_cores() else None


def open_files() -> int:
    """How many files a process may have open at once, where it raises its own limit as far as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def raise_open_files(wanted: int) -> None:
    """Let this process and those it starts have `wanted` files open, or as many as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, open_files()), hard))


def shared_memory_free() -> int:
    """Bytes. Raises OSError where there is no /dev/shm."""
    return shutil.disk_usage(SHARED_MEMORY).free


def _quota(group: Path, v1: bool) -> float | None:
    """In cores. Example: "150000 100000" -> 1.5; "max 100000", and -1 in v1 -> None."""
    if v1:
        allowed, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        return allowed / period if allowed is not None and period else None
    match _text(group / "cpu.max").split():
        case [share, of] if share.isdecimal() and of.isdecimal():
            return int(share) / int(of)
    return None


def _reclaimable(group: Path) -> int:
    """Bytes of files that are kept in memory only until somebody needs the room."""
    lines = [line.split() for line in _text(group / "memory.stat").splitlines()]
    return sum(int(words[1]) for words in lines if words[0] == "inactive_file")


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Each control group that this process is in, from the innermost on, and whether it is one of v1."""
    for line in _text(OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        group = root / path.lstrip("/")
        yield from (
            (place, bool(controllers)) for place in [group, *group.parents] if place.is_relative_to(root)
        )


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
