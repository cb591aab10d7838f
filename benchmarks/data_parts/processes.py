"""Processes that are measured: each in a fresh interpreter, so that none inherits caches, threads or memory.

in_child(function, ...) -> its result        tree_of(process) -> memory of it and of all it started
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
MIB = 2**20
PACKAGES = ("tokenizers", "numpy", "rensa", "ray", "datasketch", "datatrove", "datasets")


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables for what is started inside."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_child(function: Callable[..., T], /, *, threads: int = 1, **given: Any) -> T:
    """`function(**given)` in a new process whose tokenizer and numpy compute with so many threads."""
    variables = {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    spawn = multiprocessing.get_context("spawn")
    with environment(variables), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, **given).result()


def start_of_peak() -> float:
    """MiB resident in this process now; what it held before no longer counts for `peak_mib`."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status(os.getpid(), "VmRSS") / 1024


def peak_mib() -> float:
    """The most memory this process had resident since `start_of_peak`."""
    return _status(os.getpid(), "VmHWM") / 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeMemory:
    """Of a process and all below it, MiB. Proportional: a page that n processes share counts 1/n in each."""

    main_rss: float
    proportional: float
    proportional_private: float  # without mapped files and shared memory
    processes: int


def tree_of(root: psutil.Process) -> TreeMemory:
    """As it is now; processes that end meanwhile are left out. NoSuchProcess when the root has ended."""
    total = private = 0
    members = [root, *root.children(recursive=True)]
    for member in members:
        try:
            fields = _kib_fields(Path(f"/proc/{member.pid}/smaps_rollup"))
        except OSError:  # it has ended
            continue
        total, private = total + fields["Pss"], private + fields["Pss_Anon"]
    return TreeMemory(
        main_rss=root.memory_info().rss / MIB,
        proportional=total / 1024,
        proportional_private=private / 1024,
        processes=len(members),
    )


def _status(pid: int, name: str) -> int:
    return _kib_fields(Path(f"/proc/{pid}/status"))[name]


def _kib_fields(path: Path) -> dict[str, int]:
    """`Name:   123 kB` lines of a file of the kernel; a process that ends meanwhile has none."""
    fields = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.split()[0])
    if not fields:
        raise ProcessLookupError(str(path))
    return fields


def surroundings() -> dict[str, str]:
    """The machine and the versions that matter."""
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    gib = psutil.virtual_memory().total / 2**30
    return {"machine": f"{psutil.cpu_count()} cores of {cpu}, {gib:.0f} GiB; {versions}"}


class OthersLoad:
    """How much of the CPUs was used by processes that are not this one's while a part ran."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._all, self._own = _cpu_seconds(), _own_cpu_seconds()

    def percent(self) -> int:
        """Since the construction; processes that ended without being waited for count as others."""
        others = _cpu_seconds() - self._all - (_own_cpu_seconds() - self._own)
        seconds = (time.perf_counter() - self._start) * psutil.cpu_count()
        return max(0, round(100 * others / seconds))


def _cpu_seconds() -> float:
    """Of all processes since the machine started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _own_cpu_seconds() -> float:
    """Of this process and those below it that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
