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
from typing import Any

import torch

from stages.config import ModelConfig
from stages.training import models
from stages.training.packing_probe import check_packed

REPEATS = 5


def main() -> None:
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
    """Print the seconds of a load, and of the probe within it."""
    probes: list[float] = []

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        check_packed(*arguments)
        probes.append(time.perf_counter() - start)

    models.check_packed = timed
    loads = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        model = models.load_causal_lm(directory)
        loads.append(time.perf_counter() - start)
    load, probe = statistics.median(loads[1:]), statistics.median(probes[1:])  # the first one warms up
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{name}: {millions:.1f} M parameters, load {(load - probe) * 1e3:.0f} ms, "
        f"probe {probe * 1e3:.0f} ms, {probe / (load - probe):.0%} of the load"
    )


if __name__ == "__main__":
    main()
