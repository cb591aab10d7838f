"""What only a GPU can tell of the trainer's side: in one process, without Ray, vLLM or a network.

python benchmarks/gpu_check.py [--device cpu --small] [--only NAME...] [--out DIR]

    ceilings -> attention -> parity -> state -> speed -> ppo -> chain   a JSON line per finding, a table last

Made for less than 8 minutes of one GPU, and NOT YET RUN on one; `--device cpu --small` rehearses it. Exit 1
when a check failed: an error, or numbers that do not hold (the gate, a restored checkpoint, the first ratio).
Times are of this machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import torch
from gpu_parts.kernels import attention, ceilings
from gpu_parts.numbers import parity, ppo, state
from gpu_parts.setting import Setting, refused
from gpu_parts.speed import speed
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
CHAIN_TIMEOUT_S = 180
CHAIN = (
    "pipeline.executor=inline",
    "rollout.engine=hf",  # with which the config refuses ppo.precision bf16
    *(f"{stage}.precision=bf16" for stage in ("pretrain", "sft", "reward")),
    *(
        f"{stage}.max_steps={steps}"
        for stage, steps in (("pretrain", 20), ("sft", 20), ("reward", 20), ("ppo", 2))
    ),
    *("reward.min_accuracy=0", "reward.normaliser_prompts=8"),
    *("ppo.num_prompts=16", "ppo.batch_size=16", "ppo.micro_batch_size=8", "evaluate.max_prompts=8"),
)
"""Settings that make the demo's six stages a matter of a minute."""
MUST_HOLD: Mapping[str, object] = {
    "gate_holds": True,
    "policy_is_reference": True,
    "weights_restored": True,
    "same_next_loss": True,
    "first_kl": 0.0,
    "first_ratio": 0.0,
    "exit_code": 0,
}
"""Figures with one right value, wherever they appear."""


def chain(setting: Setting) -> None:
    """All six stages on the device, as a user starts them."""
    stages = ("pretrain", "sft", "reward", "ppo", "evaluate")
    gpus = [f"resources.{stage}.num_gpus={int(setting.has_gpu)}" for stage in stages]
    outputs = setting.directory("chain")
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "run"]
    started = time.perf_counter()
    answer = subprocess.run(
        [*command, ROOT / "configs/demo.yaml", f"outputs={outputs}", *gpus, *CHAIN],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=CHAIN_TIMEOUT_S,
        check=False,
    )
    last = (answer.stdout + answer.stderr).strip().splitlines()[-2:]
    seconds = round(time.perf_counter() - started, 1)
    setting.say("chain", exit_code=answer.returncode, seconds=seconds, last=" | ".join(last)[:300])


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
    with tempfile.TemporaryDirectory(prefix="rlhf-gpu-check-") as scratch:
        setting = Setting(device=device, is_small=arguments.small, scratch=Path(scratch))
        for check in CHECKS:
            if check.__name__ in arguments.only:
                _run(check, setting)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu_check.json").write_text(json.dumps(setting.findings, indent=1) + "\n")
    print("\n" + table(setting.findings))
    return 1 if any(map(is_wrong, setting.findings)) else 0


def is_wrong(finding: Mapping[str, Any]) -> bool:
    """Whether a check ended in an error, or a figure is not what it has to be."""
    return "error" in finding or any(
        finding[name] != right for name, right in MUST_HOLD.items() if name in finding
    )


def table(findings: Sequence[Mapping[str, Any]]) -> str:
    """One line per finding: its mark, its check, its figures."""
    lines = []
    for finding in findings:
        figures = "  ".join(f"{name}={_short(value)}" for name, value in finding.items() if name != "check")
        lines.append(f"{'WRONG' if is_wrong(finding) else 'ok':5} {finding['check']:9} {figures}")
    return "\n".join(lines)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {_short(part)}" for name, part in value.items()) + ")"
    return str(value)


def _run(check: Callable[[Setting], None], setting: Setting) -> None:
    started = time.perf_counter()
    try:
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
