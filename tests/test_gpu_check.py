"""`make gpu-check` as far as a CPU goes: every check of it runs on the present code, and finds it right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu_check.py"
REHEARSED = ["ceilings", "attention", "parity", "state", "speed", "ppo"]
"""The chain, which other tests run, is left out."""


def gpu_check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu_finds_every_number_right(tmp_path: Path):
    answer = gpu_check("--device", "cpu", "--small", "--out", tmp_path, "--only", *REHEARSED)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    findings = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(dict.fromkeys(finding["check"] for finding in findings)) == REHEARSED
    lines = answer.stdout.splitlines()
    assert sum(line.startswith("ok ") for line in lines) == len(findings)
    parity = [finding for finding in findings if finding["check"] == "parity"]
    assert [finding["precision"] for finding in parity] == ["fp32", "bf16"]
    assert all(finding["policy_is_reference"] and finding["gate_holds"] for finding in parity)


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_what_to_do(tmp_path: Path):
    answer = gpu_check("--out", tmp_path)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.count("\n") == 1 and "rehearse with --device cpu --small" in answer.stderr
