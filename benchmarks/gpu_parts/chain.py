"""All six stages on the device, as a user starts them: the demo, cut short."""

import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_parts.setting import Setting

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/demo.yaml"
TIMEOUT_S = 180.0
WITH_GPUS = ("pretrain", "sft", "reward", "ppo", "evaluate")
SETTINGS = (
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
"""What makes the demo's six stages a matter of a minute."""


def overrides(outputs: Path, *, num_gpus: int) -> list[str]:
    """Of CONFIG, in the order in which the command gives them."""
    gpus = [f"resources.{stage}.num_gpus={num_gpus}" for stage in WITH_GPUS]
    return [f"outputs={outputs}", *gpus, *SETTINGS]


def chain(setting: Setting) -> None:
    """The exit code, seconds, and the last lines."""
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "run", str(CONFIG)]
    started = time.perf_counter()
    answer = subprocess.run(
        command + overrides(setting.directory("chain"), num_gpus=int(setting.has_gpu)),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=min(TIMEOUT_S, setting.left_s),
        check=False,
    )
    last = (answer.stdout + answer.stderr).strip().splitlines()[-2:]
    seconds = round(time.perf_counter() - started, 1)
    setting.say("chain", exit_code=answer.returncode, seconds=seconds, last=" | ".join(last)[:300])
