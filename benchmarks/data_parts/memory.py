"""Memory of `rlhf prepare` as a user runs it, on inputs of two sizes: it must not grow with them.

passages --jsonl_lines--> file --rlhf prepare--> artifact
                                    |
                 every SAMPLE_S: resident memory of it, proportional memory of all it started
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psutil

from data_parts.processes import TreeMemory, tree_of
from data_parts.texts import jsonl_lines, passages, read_text

SAMPLE_S = 0.25
PASSAGE_WORDS, PASSAGES = 50, 8
VOCAB_SIZE = 8192
ROOT = Path(__file__).resolve().parents[2]
Executor = Literal["inline", "ray"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRun:
    """One run of rlhf prepare. Memory in MiB."""

    executor: Executor
    gigabytes: float  # of the jsonl file
    near_dedup: bool
    quality: bool
    seconds: float
    peak_main: float  # resident, of the process that the user starts (the kernel's count)
    peak_tree: float  # proportional, of it and all below it
    peak_tree_private: float
    peak_processes: int
    tree_by_tenth: list[float]  # the largest of each tenth of the time: where it would be seen to grow
    metrics: dict[str, float]  # of the artifact


def measure(
    files: Sequence[Path],
    sizes: Sequence[float],
    executors: Sequence[Executor],
    *,
    near_dedup: bool,
    quality: bool,
) -> list[dict[str, Any]]:
    """A run per size (10^9 bytes) and executor; the input of one size is the same for both."""
    found = passages(read_text(files), PASSAGE_WORDS)
    runs = []
    for gigabytes in sizes:
        with TemporaryDirectory(prefix="bench-memory-") as name:
            data = Path(name) / "data.jsonl"
            with data.open("wb") as stream:
                stream.writelines(jsonl_lines(found, int(gigabytes * 1e9), PASSAGES))
            for executor in executors:
                directory = Path(name) / executor
                directory.mkdir()
                runs.append(asdict(_run(data, directory, executor, near_dedup=near_dedup, quality=quality)))
    return runs


def _run(data: Path, directory: Path, executor: Executor, *, near_dedup: bool, quality: bool) -> PrepareRun:
    config = directory / "config.yaml"
    config.write_text(json.dumps(_config(data, near_dedup=near_dedup, quality=quality)))  # JSON is YAML
    workers = "pipeline.executor=inline" if executor == "inline" else "resources.prepare.num_workers=2"
    command = [sys.executable, "-m", "pipeline.cli", "prepare", str(config), f"outputs={directory}", workers]
    with (directory / "log.txt").open("wb") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=subprocess.STDOUT
        )
        samples, peak_main = _watch(process)
        seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(
            f"rlhf prepare ended with {process.returncode}: {(directory / 'log.txt').read_text()}"
        )
    (statistics,) = directory.glob("**/statistics.json")
    metrics = json.loads(statistics.read_text())
    del metrics["steps"]
    return PrepareRun(
        executor=executor,
        gigabytes=data.stat().st_size / 1e9,
        near_dedup=near_dedup,
        quality=quality,
        seconds=seconds,
        peak_main=peak_main,
        peak_tree=max(memory.proportional for _, memory in samples),
        peak_tree_private=max(memory.proportional_private for _, memory in samples),
        peak_processes=max(memory.processes for _, memory in samples),
        tree_by_tenth=_by_tenth([(at - start, memory.proportional) for at, memory in samples], seconds),
        metrics=metrics,
    )


def _by_tenth(samples: Sequence[tuple[float, float]], seconds: float) -> list[float]:
    """The largest value of each tenth of the time; 0 where none was taken."""
    peaks = [0.0] * 10
    for at, value in samples:
        tenth = min(9, int(10 * at / seconds))
        peaks[tenth] = max(peaks[tenth], value)
    return peaks


def _config(data: Path, *, near_dedup: bool, quality: bool) -> dict[str, Any]:
    return {
        "name": "memory",
        "model": {"context_length": 1024},
        "prepare": {
            "data": [{"path": str(data)}],
            "vocab_size": VOCAB_SIZE,
            "near_dedup": {} if near_dedup else None,
            "quality": ["gopher_quality"] if quality else [],
            "shard_tokens": 100_000_000,
        },
    }


def _watch(process: subprocess.Popen[bytes]) -> tuple[list[tuple[float, TreeMemory]], float]:
    """(time, memory) until the process ends, and the kernel's count of its largest resident size."""
    root = psutil.Process(process.pid)
    samples = []
    while True:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it has just ended
            samples.append((time.perf_counter(), tree_of(root)))
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            process.returncode = os.waitstatus_to_exitcode(status)
            return samples, usage.ru_maxrss / 1024
        time.sleep(SAMPLE_S)
