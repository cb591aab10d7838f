"""What an engine's processes are told in their environment, and that the caller's own stays as it was."""

import asyncio
import os
from pathlib import Path

import pytest
import torch
from rigs import CONFIG

from rollout import hf_engine, vllm_engine
from rollout.errors import EngineError
from rollout.vllm_engine import _process_environment

NO_TF32 = {"TRITON_F32_DEFAULT": "ieee", "VLLM_FLOAT32_MATMUL_PRECISION": "highest"}
"""With TF32, which has 10 bits, log-probs differ by 1e-3 nats: the gate allows 1e-4."""


def test_an_fp32_engine_multiplies_in_fp32_whatever_the_callers_environment_says(monkeypatch):
    for name, value in (("TRITON_F32_DEFAULT", "tf32"), ("VLLM_FLOAT32_MATMUL_PRECISION", "high")):
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with _process_environment(CONFIG, dtype="float32", log_path=Path("log")):
        assert {name: os.environ[name] for name in NO_TF32} == NO_TF32
    assert dict(os.environ) == before


def test_a_bf16_engine_is_told_nothing_of_fp32(monkeypatch):
    for name in NO_TF32:
        monkeypatch.delenv(name, raising=False)
    with _process_environment(CONFIG, dtype="bfloat16", log_path=Path("log")):
        assert not NO_TF32.keys() & os.environ.keys()


def test_vllm_starts_an_fp32_engine_in_that_environment(tied_model_dir, tmp_path, monkeypatch):
    """What it spawns inherits it. (Its processes write their titles over what /proc would show.)"""
    told: list[dict[str, str]] = []

    def start(*_: object) -> None:
        told.append(dict(os.environ))
        raise RuntimeError("far enough")

    monkeypatch.setattr(vllm_engine.AsyncLLM, "from_engine_args", start)
    opening = vllm_engine.VLLMEngine.open(
        CONFIG,
        model_dir=tied_model_dir,
        dtype="float32",
        max_model_len=64,
        log_path=tmp_path / "log",
        name="engine-0",
    )
    with pytest.raises(EngineError, match="engine-0 did not start: far enough"):
        asyncio.run(opening)
    assert [{name: seen[name] for name in NO_TF32} for seen in told] == [NO_TF32]


def test_the_reference_engine_multiplies_in_fp32_whatever_was_set_before(tied_model_dir):
    torch.set_float32_matmul_precision("medium")
    try:
        hf_engine._load(tied_model_dir, "float32")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
