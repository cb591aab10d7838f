"""Processes that are measured: each in a fresh interpreter, so that none inherits caches, threads or memory.

in_child(function, ...) -> its result        tree_of(process) -> memory of it and of all it started
"""

import multiprocessing
import os
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


def surroundings() -> dict[str, Any]:
    """The machine, the versions that matter, and how much of its CPUs others used just before."""
    busy = psutil.cpu_percent(interval=3)
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    gib = psutil.virtual_memory().total / 2**30
    machine = f"{psutil.cpu_count()} cores of {cpu}, {gib:.0f} GiB; {versions}"
    return {"machine": machine, "busy_before": round(busy)}
