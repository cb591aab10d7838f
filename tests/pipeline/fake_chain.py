"""A whole configured chain of fake stages in a temporary directory."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_stages import weights

from pipeline import config as configs
from pipeline.experiment import ExperimentConfig

IMPORTABLE = os.pathsep.join(str(Path(__file__).parents[index]) for index in (0, 2))
CONFIG = """\
name: demo
prepare: {data: [{path: corpus.jsonl}], heldout_frac: 0.1}
pretrain: {max_steps: 3}
sft: {max_steps: 3, data: [{path: sft.jsonl}]}
reward: {max_steps: 3, data: [{path: pairs.jsonl}]}
ppo: {max_steps: 3, data: [{path: prompts.jsonl}], num_prompts: 8, batch_size: 8}
evaluate: {prompts: [{path: prompts.jsonl}], score: {path: score.py}}
pipeline: {executor: inline, lock_timeout_s: 1}
"""
ROWS: Mapping[str, dict[str, Any]] = {
    "corpus.jsonl": {"text": "one and one is two"},
    "sft.jsonl": {"prompt": "one and one", "completion": "two"},
    "pairs.jsonl": {"prompt": "one and one", "chosen": "two", "rejected": "three"},
    "prompts.jsonl": {"prompt": "one and one"},
}
FAKE_CLI = """
import sys
from dataclasses import replace
from pipeline import stage_table
for name, stage in stage_table.STAGES.items():
    stage_table.STAGES[name] = replace(stage, recipe=stage_table.Recipe(entry="fake_stages:run"))
from pipeline.cli import main
main(sys.argv[1:])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Six fake stages, their data and config."""

    directory: Path
    control: Path

    def config(self, *overrides: str) -> ExperimentConfig:
        return configs.load(self.directory / "demo.yaml", overrides).config

    def order(self, stage: str, **orders: Any) -> None:
        """What `stage` does to itself in the middle of its next executions; nothing to take it back."""
        path = self.control / f"{stage}.json"
        if orders:
            path.write_text(json.dumps(orders))
        else:
            path.unlink(missing_ok=True)

    def calls(self) -> list[str]:
        """Stages executed since the last call, in order."""
        path = self.control / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.split()[0] for line in lines]

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.outputs / "runs/demo/summary.json").read_text())
        return summary

    @property
    def outputs(self) -> Path:
        return self.directory / "outputs"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The real cli in a process of its own, on fake recipes. SIGHUP ends it, though these tests may have
        been started with `nohup`.
        """
        return subprocess.Popen(
            [sys.executable, "-c", FAKE_CLI, *arguments],
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=hangs_up,
        )

    def cli(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of one command."""
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=120)
        return process.returncode, stdout, stderr


def write_model(directory: Path, content: str = "weights") -> Path:
    """A directory that looks like a model."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(weights(content))
    return directory


def wait_for(path: Path, timeout_s: float = 60.0) -> None:
    """Until a fake stage says where it is."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def hangs_up() -> None:
    """Take back what `nohup` has done to this process."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
