"""What an engine's processes are told in their environment, and that the caller's own stays as it was."""

import os
from pathlib import Path

import torch
from rigs import CONFIG

from rollout import hf_engine
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


def test_every_process_of_a_real_fp32_engine_was_told(rigs):
    processes = rigs("vllm", tied=True).engine._processes
    assert processes
    for process in processes:
        told = process.environ()
        assert {name: told.get(name) for name in NO_TF32} == NO_TF32, process.name()


def test_the_reference_engine_multiplies_in_fp32_whatever_was_set_before(tied_model_dir):
    torch.set_float32_matmul_precision("medium")
    try:
        hf_engine._load(tied_model_dir, "float32")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
