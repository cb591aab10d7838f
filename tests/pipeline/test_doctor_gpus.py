"""What `rlhf doctor` says of GPUs: of invented machines, and of this one with an invented nvidia-smi."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.doctor import Gpus, gpu_finding

H100 = "NVIDIA H100 80GB HBM3, 81559 MiB"
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 12020)."


def gpus(**findings: object) -> Gpus:
    """A machine with one GPU that a torch for CUDA 13.0 cannot use, unless told otherwise."""
    usual = Gpus(
        listed=(H100,), complaint="", answers=True, build="13.0", usable=(), refusal="", visible=None
    )
    return replace(usual, **findings)


def test_gpus_that_torch_computes_on_are_fine_and_named():
    found = gpu_finding(gpus(usable=("NVIDIA H100 80GB HBM3",)))
    assert found.ok and found.text == "NVIDIA H100 80GB HBM3: torch computes on them (CUDA 13.0)"


@pytest.mark.parametrize(
    ("findings", "why", "cure"),
    [
        (
            {"refusal": OLD_DRIVER},
            f"{H100}; torch uses none ({OLD_DRIVER})",
            "driver",
        ),
        ({"build": None}, f"{H100}; torch is a build for the CPU and uses none", "pip install .[gpu]"),
        (
            {"refusal": "No CUDA GPUs are available", "visible": ""},
            "torch sees none (No CUDA GPUs are available): CUDA_VISIBLE_DEVICES=''",
            "unset it",
        ),
        (
            {"refusal": "No CUDA GPUs are available", "visible": "1,0"},
            "torch sees none (No CUDA GPUs are available): CUDA_VISIBLE_DEVICES='1,0'",
            "unset it",
        ),
        (
            {"refusal": OLD_DRIVER, "visible": "0"},
            f"torch uses none ({OLD_DRIVER}, CUDA_VISIBLE_DEVICES='0')",
            "update NVIDIA's driver",
        ),
        (
            {"answers": False, "build": None, "refusal": "ImportError: libc10.so: no such file"},
            "torch does not answer (ImportError: libc10.so: no such file)",
            "install it again",
        ),
        (
            {"listed": (), "complaint": "Failed to initialize NVML: Driver/library version mismatch"},
            "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch",
            "reboot",
        ),
        (
            {"listed": (), "refusal": "Found no NVIDIA driver on your system."},
            "none found, but torch is built for CUDA 13.0 (Found no NVIDIA driver on your system.)",
            "docker run --gpus all",
        ),
        (
            {"refusal": "CUDA error: no kernel image is available for execution on the device"},
            "torch uses none (CUDA error: no kernel image is available",
            "install a torch for the CUDA that nvidia-smi names",
        ),
    ],
    ids=[
        *("old driver", "cpu build", "hidden", "beyond", "one chosen, old driver", "no answer", "mismatch"),
        *("no driver", "no kernels"),
    ],
)
def test_gpus_that_torch_does_not_use_are_a_finding_with_its_cure(findings, why: str, cure: str):
    found = gpu_finding(gpus(**findings))
    assert not found.ok and why in found.text and cure in found.text
    assert "\n" not in found.text


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An nvidia-smi that says what it is told to, found first."""

    def says(text: str, *, code: int = 0) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return says


def test_on_this_machine_a_listed_gpu_is_not_taken_for_a_usable_one(nvidia_smi):
    """Torch is asked, in a child process: here it is a build for the CPU."""
    nvidia_smi(H100)
    found = doctor._gpu()
    assert not found.ok and found.text.startswith(f"{H100}; torch is a build for the CPU and uses none")


def test_a_driver_that_does_not_answer_is_not_a_machine_without_gpus(nvidia_smi):
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch", code=18)
    found = doctor._gpu()
    assert not found.ok and "version mismatch; reload" in found.text


def test_a_machine_without_gpus_is_fine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_listed_gpus", lambda: ((), ""))
    assert doctor._gpu() == doctor.Finding(ok=True, subject="gpu", text="none; everything runs on the CPU")


def test_a_build_for_the_cpu_on_a_machine_without_gpus_is_fine_whatever_its_version_says(monkeypatch):
    """Only pip's wheels of torch name it `+cpu`."""
    monkeypatch.setattr(doctor, "_listed_gpus", lambda: ((), ""))
    monkeypatch.setattr(doctor, "_version", lambda _: "2.13.0")
    assert doctor._gpu() == doctor.NO_GPU


def test_torch_says_in_a_child_process_what_it_is_built_for_and_why_it_computes_on_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert doctor._asked_of_torch((H100,), "") == Gpus(
        listed=(H100,),
        complaint="",
        answers=True,
        build=None,
        usable=(),
        refusal="Torch not compiled with CUDA enabled",
        visible="0",
    )


def test_a_torch_that_cannot_be_imported_is_said_in_its_own_words(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libc10.so: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked = doctor._asked_of_torch((), "")
    assert (asked.answers, asked.refusal) == (False, "ImportError: libc10.so: no such file")
    assert not gpu_finding(asked).ok
