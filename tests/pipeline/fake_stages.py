"""A recipe that stands in for all six: writes a tiny "model", and does to itself what a control file says.

$FAKE_STAGES/<stage>.json: {"error": "TrainingStopped" | "DataError" | "ValueError" | "OSError", "kill": true,
                            "sleep_s": 1 (cut short by a request to stop), "stubborn": true (it is not),
                            "remove": "a directory", "edit": "a JSON file", "metrics": {"more": 1}}
$FAKE_STAGES/calls.txt:    one line per execution: stage, process id
"""

import json
import os
import shutil
import signal
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.config.stage import StageSettings
from stages.errors import DataError, Interrupted, TrainingStopped
from stages.runtime import Runtime

RECIPE_VERSION = 1


def run(
    settings: StageSettings, inputs: Mapping[str, Path], out_dir: Path, runtime: Runtime
) -> Mapping[str, float]:
    control = Path(os.environ["FAKE_STAGES"])
    with (control / "calls.txt").open("a") as calls:
        calls.write(f"{runtime.stage} {os.getpid()}\n")
    orders = _orders(control / f"{runtime.stage}.json")
    metrics = runtime.work_dir / "metrics.jsonl"
    first = min(len(metrics.read_text().splitlines()) + 1, 3) if metrics.exists() else 1
    for step in range(first, 4):
        line = {"step": step, "max_steps": 3, "time": time.time(), "train/loss": 1 / step, "train/lr": 0.1}
        with metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if step == max(2, first):
            _obey(orders, control / f"{runtime.stage}.json", runtime)
    (out_dir / "config.json").write_text("{}")
    (out_dir / "model.safetensors").write_bytes(weights(f"{runtime.stage} from {sorted(inputs)}"))
    print(f"{runtime.stage}: threads {os.environ.get('OMP_NUM_THREADS')}")
    print(f"{runtime.stage}: GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')!r}")
    return {"loss": 0.25, "first_step": first} | orders.get("metrics", {})


def weights(text: str) -> bytes:
    """A whole safetensors file without tensors, told from others by `text`."""
    header = json.dumps({"__metadata__": {"text": text}}).encode()
    return struct.pack("<Q", len(header)) + header


def _orders(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _obey(orders: dict[str, Any], path: Path, runtime: Runtime) -> None:
    if orders.pop("kill", None):
        path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if "remove" in orders:
        shutil.rmtree(str(orders["remove"]))
        raise FileNotFoundError(2, "No such file or directory", "metrics.jsonl")
    if "edit" in orders:
        Path(str(orders["edit"])).write_text('{"edited": true}')
    if "sleep_s" in orders:
        (path.parent / f"{path.stem}.sleeping").touch()
        _sleep(float(str(orders["sleep_s"])), runtime, stubborn="stubborn" in orders)
    match orders.get("error"):
        case "TrainingStopped":
            raise TrainingStopped("sft: loss is nan at step 2; lower sft.lr")
        case "DataError":
            raise DataError("sft.jsonl:1: not a conversation; fix it")
        case "ValueError":
            raise ValueError("a bug of ours\nwith a second line")
        case "OSError":
            raise OSError(28, "No space left on device")


def _sleep(seconds: float, runtime: Runtime, *, stubborn: bool) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if runtime.stop_requested() and not stubborn:
            raise Interrupted(f"{runtime.stage}: stopped after step 2; run the same command to go on")
        time.sleep(0.05)
