"""What only a GPU can tell of the trainer's side: in one process, without Ray, vLLM or a network.

python benchmarks/gpu_check.py [--device cpu --small] [--only NAME...] [--out DIR]

    ceilings -> attention -> parity -> state -> speed -> ppo -> chain   a JSON line per finding, a table last

Made for less than 8 minutes of one GPU, and NOT YET RUN on one; `--device cpu --small` rehearses it. No part
begins later than BUDGET_S after the start, and what was found is on the disk after each check. Exit 1 when a
check failed: an error, no time left, or numbers that do not hold (attention against float64, the gate, a
restored checkpoint, the first ratio). Times are of this machine.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import torch
from gpu_parts.chain import chain
from gpu_parts.kernels import attention, ceilings
from gpu_parts.numbers import parity, ppo, state
from gpu_parts.setting import Setting, refused
from gpu_parts.speed import speed
from gpu_parts.verdict import is_wrong, table
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 450.0
"""Seconds from the start after which no further part of a check begins."""
CHECKS: tuple[Callable[[Setting], None], ...] = (ceilings, attention, parity, state, speed, ppo, chain)


def main() -> int:
    """The exit code."""
    arguments = _parsed()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "torch sees no GPU here (`rlhf doctor` says why); rehearse with --device cpu --small",
            file=sys.stderr,
        )
        return 1
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    transformers_logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")  # as in every process of a run
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rlhf-gpu-check-") as scratch:
        setting = Setting(
            device=device,
            is_small=arguments.small,
            scratch=Path(scratch),
            deadline=time.perf_counter() + BUDGET_S,
        )
        for check in CHECKS:
            if check.__name__ in arguments.only:
                _run(check, setting)
                found = json.dumps(setting.findings, indent=1)
                (arguments.out / "gpu_check.json").write_text(found + "\n")
    print("\n" + table(setting.findings))
    return 1 if any(map(is_wrong, setting.findings)) else 0


def _run(check: Callable[[Setting], None], setting: Setting) -> None:
    started = time.perf_counter()
    try:
        setting.check_time()
        check(setting)
    except Exception as error:  # whatever one check meets, the others are still worth the machine's time
        setting.say(check.__name__, error=refused(error))
    print(f"# {check.__name__}: {time.perf_counter() - started:.1f} s", flush=True)


def _parsed() -> argparse.Namespace:
    names = [check.__name__ for check in CHECKS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: a rehearsal")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--out", type=Path, default=ROOT / "outputs", help="where gpu_check.json goes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
