"""The command line in a process of its own, on a tiny configuration of the demo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[1]
RLHF = Path(sys.executable).with_name("rlhf")
STAGES = ["prepare", "pretrain", "sft", "reward", "ppo", "evaluate"]
CONFIG = f"""
base: {REPOSITORY}/configs/demo.yaml
name: tiny
model: {{layers: 2, hidden_size: 64, intermediate_size: 96, num_heads: 2, num_kv_heads: 1}}
prepare: {{vocab_size: 320}}
pretrain: {{max_steps: 8, batch_size: 4, micro_batch_size: 4, log_every_steps: 1, checkpoint_every_steps: 1}}
sft: {{max_steps: 4, batch_size: 4, micro_batch_size: 4, log_every_steps: 1}}
reward: {{max_steps: 4, batch_size: 4, micro_batch_size: 4, min_accuracy: 0, normaliser_prompts: 8}}
ppo: {{max_steps: 2, num_prompts: 8, batch_size: 4, micro_batch_size: 4, max_response_tokens: 8}}
evaluate: {{max_prompts: 8, max_response_tokens: 8}}
rollout: {{kv_cache_mib: 64, max_num_seqs: 16}}
"""


def rlhf(directory: Path, *arguments: str, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RLHF, *arguments], cwd=directory, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def summary_of(directory: Path) -> dict:
    """summary.json of the run in `directory`."""
    return json.loads((directory / "outputs/runs/tiny/summary.json").read_text())


def family_once_training(driver: subprocess.Popen, directory: Path, stage: str) -> list[psutil.Process]:
    """The driver's raylet, workers and engines, as soon as `stage` has logged two steps. (Ray's own agents
    take longer to notice; they hold nothing of a run.)
    """
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert driver.poll() is None, (directory / "log").read_text()
        for path in directory.glob(f"outputs/work/{stage}-*/metrics.jsonl"):
            if path.read_text().count("\n") >= 2:
                family = psutil.Process(driver.pid).children(recursive=True)
                return [
                    process
                    for process in family
                    if process.name().startswith(("raylet", "gcs_server", "ray::", "VLLM"))
                    and not process.name().startswith(("ray::RuntimeEnv", "ray::Dashboard"))
                ]
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    raise AssertionError((directory / "log").read_text())
