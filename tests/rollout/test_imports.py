"""What may be imported without paying for torch, Ray or vLLM."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "ray", "vllm")


@pytest.mark.process
@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "rollout.api, rollout.config, rollout.errors, rollout.loop, rollout.engines, rollout.vllm_plugin",
            HEAVY,
        ),
        ("rollout.weight_file", ("transformers", "ray", "vllm")),
        ("rollout.weight_sync, rollout.parity, rollout.hf_engine", ("ray", "vllm")),
        ("rollout.pool", ("vllm", "transformers")),
    ],
)
def test_light_modules_stay_light(modules, absent):
    code = f"import {modules}, sys; print(*sorted(set({absent!r}) & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.split() == []
