"""`make gpu-check` as far as a CPU goes: every check of it runs on the present code, and finds it right."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.config import load

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu_check.py"
REHEARSED = ["ceilings", "attention", "parity", "state", "speed", "ppo"]
"""Without the chain, which takes a minute: only its settings are read here."""


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of benchmarks/gpu_parts."""

    def imported(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(SCRIPT.parent)
        return importlib.import_module(f"gpu_parts.{name}")

    return imported


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
    attention = [finding for finding in findings if finding["check"] == "attention"]
    assert all(finding[way]["relative_error"] > 0 for finding in attention for way in ("mask", "ours"))
    assert not [finding for finding in findings if "failed" in finding or "left_out" in finding]


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_what_to_do(tmp_path: Path):
    answer = gpu_check("--out", tmp_path)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.count("\n") == 1 and "rehearse with --device cpu --small" in answer.stderr


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_the_settings_of_the_chain_are_those_of_the_demo(part, tmp_path: Path, num_gpus: int):
    chain = part("chain")
    config = load(chain.CONFIG, chain.overrides(tmp_path, num_gpus=num_gpus)).config
    assert config.ppo is not None and config.ppo.max_steps == 2
    assert config.resources.evaluate.num_gpus == num_gpus


def attention(dtype: str, *, error: float | None, way: str = "ours") -> dict[str, Any]:
    right = {"ms": 1.0, "first_ms": 9.0, "relative_error": 1e-7}
    return {"check": "attention", "dtype": dtype, "mask": right, way: right | {"relative_error": error}}


@pytest.mark.parametrize(
    ("finding", "wrong"),
    [
        ({"check": "parity", "gate_holds": True, "policy_is_reference": True}, False),
        ({"check": "parity", "gate_holds": False, "policy_is_reference": True}, True),
        ({"check": "ppo", "error": "TimeoutError: no time left"}, True),
        (attention("bfloat16", error=4e-3), False),
        (attention("float32", error=4e-3), True),
        (attention("bfloat16", error=0.02, way="ours_flash"), True),
        (attention("bfloat16", error=float("nan")), True),
        (attention("bfloat16", error=None), False),
        (attention("bfloat16", error=4e-3) | {"ours": "RuntimeError: no kernel"}, True),
        (attention("bfloat16", error=4e-3) | {"mask": "RuntimeError: no kernel"}, True),
        (attention("bfloat16", error=4e-3) | {"ours_cudnn": "RuntimeError: no kernel"}, False),
        ({"check": "speed", "variant": "as it is", "ms": 3.0}, False),
        ({"check": "speed", "variant": "as it is", "failed": "RuntimeError: out of memory"}, True),
        ({"check": "speed", "variant": "varlen", "failed": "ImportError: no varlen"}, False),
        ({"check": "speed", "variant": "as it is", "left_out": "no time left"}, False),
    ],
    ids=range(15),
)
def test_a_finding_is_wrong_where_a_number_is_or_what_has_to_run_does_not(part, finding, wrong: bool):
    verdict = part("verdict")
    assert verdict.is_wrong(finding) == wrong
    assert verdict.table([finding]).startswith("WRONG" if wrong else "ok ")


def test_after_the_deadline_no_check_begins_and_what_was_found_is_kept(part, tmp_path: Path, capsys):
    part("setting")  # makes gpu_check's own imports work
    script = importlib.import_module("gpu_check")
    setting = script.Setting(device=script.torch.device("cpu"), is_small=True, scratch=tmp_path, deadline=0.0)
    script._run(script.parity, setting)
    assert setting.findings == [{"check": "parity", "error": "TimeoutError: no time left"}]
    assert all(map(script.is_wrong, setting.findings))
