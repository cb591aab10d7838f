"""The probe of a loaded model (stages/training/packing_probe.py) against the load that it ends, same run.

python benchmarks/load_probe.py [MODEL_DIR ...]     the demo's model, and each directory that is given

Files come from the page cache, so the load is as short as it can be, and the probe's share as large.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils.logging import disable_progress_bar

from stages.config.model import ModelConfig
from stages.training import models
from stages.training.packing_probe import check_packed

REPEATS = 5


def main() -> None:
    disable_progress_bar()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {REPEATS} loads")
    with tempfile.TemporaryDirectory() as work:
        demo = Path(work)
        torch.manual_seed(0)
        model = models.build_causal_lm(ModelConfig(), vocab_size=512, eos_token_id=1, pad_token_id=3)
        model.inner.save_pretrained(demo)
        measure("the demo's model", demo)
    for directory in map(Path, sys.argv[1:]):
        measure(directory.name, directory)


def measure(name: str, directory: Path) -> None:
    """Print what a load takes, and the probe within it: on the clock, and of all cores."""
    probes: list[Spent] = []

    def timed(*arguments: Any) -> None:
        start = now()
        check_packed(*arguments)
        probes.append(now() - start)

    models.check_packed = timed
    loads = []
    for _ in range(1 + REPEATS):
        start = now()
        model = models.load_causal_lm(directory)
        loads.append(now() - start)
    loads, probes = loads[1:], probes[1:]  # the first one warms up
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    without = [load - probe for load, probe in zip(loads, probes, strict=True)]
    print(f"{name}, {millions:.1f} M parameters: {medians('load', without)}; {medians('probe', probes)}")


class Spent(NamedTuple):
    """Seconds on the clock, and of all cores together: the second say more where others use the machine."""

    clock: float
    cores: float

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.clock - other.clock, self.cores - other.cores)


def now() -> Spent:
    return Spent(time.perf_counter(), time.process_time())


def medians(what: str, spent: list[Spent]) -> str:
    clock, cores = (statistics.median(each) for each in zip(*spent, strict=True))
    return f"{what} {clock * 1e3:.0f} ms ({cores * 1e3:.0f} ms of cores)"


if __name__ == "__main__":
    main()
