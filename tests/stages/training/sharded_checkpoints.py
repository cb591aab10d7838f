"""Real processes for the checkpoint tests: a tiny training, on one worker or sharded over several; and one on
a disk that refuses.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plain_models import take_step
from torch import multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rollout.ground.errors import EnvironmentProblem
from stages.config.pretrain import PretrainConfig
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_record import RECORD_FILE
from stages.training.optimize import Optimizer

CONFIG = PretrainConfig(lr=1e-2, batch_size=4, micro_batch_size=4, lr_schedule="constant", warmup_frac=0.0)
NUM_PROCESSES = 3


def make_optimizer(*, width: int = 5, sharded: bool = False) -> Optimizer:
    """AdamW over two layers whose shapes divide by no number of ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))
    if sharded:
        fully_shard(model)
    return Optimizer(model, CONFIG, lr=CONFIG.lr, max_steps=100)


def take_steps(optimizer: Optimizer, steps: int, *, first: int = 0) -> None:
    """Train; the batch of a step is a function of its number."""
    for step in range(first, first + steps):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        take_step(
            optimizer,
            step,
            [inputs],
            lambda numbers: (optimizer.model(numbers) - numbers.sum()).square().mean(),
        )


def numbers_of(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Every parameter in AdamW's order, with its moments and step count, whole."""
    names = {parameter: name for name, parameter in optimizer.model.named_parameters()}
    numbers = {}
    for group in optimizer.adamw.param_groups:
        for parameter in group["params"]:
            numbers[names[parameter]] = _whole(parameter.detach())
            for key, value in sorted(optimizer.adamw.state[parameter].items()):
                numbers[f"{names[parameter]}.{key}"] = _whole(value)
    return numbers


def run_ranks(directory: Path) -> dict[str, dict]:
    """Run every scenario below in groups of these processes; what each found, by the scenario's name."""
    multiprocessing.spawn(_process, args=(directory,), nprocs=NUM_PROCESSES)
    return torch.load(directory / "found.pt", weights_only=True)


def _process(index: int, directory: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for number, (name, num_ranks, scenario) in enumerate(_scenarios(directory)):
        if index < num_ranks:
            store = f"file://{directory}/store-{number}"
            dist.init_process_group("gloo", init_method=store, world_size=num_ranks, rank=index)
            found[name] = scenario()
            dist.barrier()
            dist.destroy_process_group()
        _wait_for_all(directory, number, index)
    if index == 0:
        torch.save(found, directory / "found.pt")


def _wait_for_all(directory: Path, number: int, index: int) -> None:
    """All processes, also those outside of the last group."""
    store = f"file://{directory}/barrier-{number}"
    dist.init_process_group("gloo", init_method=store, world_size=NUM_PROCESSES, rank=index)
    dist.barrier()
    dist.destroy_process_group()


def _scenarios(directory: Path) -> list[tuple[str, int, Callable[[], dict[str, Any]]]]:
    one, two = directory / "one", directory / "two"
    scenarios: list[tuple[str, int, Callable[[], dict[str, Any]]]] = [
        ("saved on 1", 1, lambda: _save(one)),
        ("saved on 2", 2, lambda: _save(two)),
    ]
    for saved_on, work_dir in ((1, one), (2, two)):
        for num_ranks in (1, 2, 3):
            scenarios.append(
                (
                    f"saved on {saved_on}, restored on {num_ranks}",
                    num_ranks,
                    lambda work_dir=work_dir: _restore(work_dir),
                )
            )
    return [
        *scenarios,
        ("generators", 2, lambda: _generators(directory / "generators")),
        ("no room", 2, lambda: _no_room(two)),
        ("refused", 2, lambda: _refused(two)),
        ("damaged", 2, lambda: _damaged(two)),
        ("rolled back", 2, lambda: _rolled_back(directory / "rolled back")),
    ]


def _save(work_dir: Path) -> dict[str, Any]:
    optimizer = make_optimizer(sharded=dist.get_world_size() > 1)
    take_steps(optimizer, 4)
    Checkpoints(work_dir).save(4, {"model": optimizer.state()}, {"loss": 0.25})
    record = json.loads((work_dir / "checkpoints/step-000004" / RECORD_FILE).read_text())
    return {"numbers": numbers_of(optimizer), "record": record}


def _restore(work_dir: Path) -> dict[str, Any]:
    optimizer = make_optimizer(sharded=dist.get_world_size() > 1)
    step, extra = Checkpoints(work_dir).restore({"model": optimizer.state()})
    return {"step": step, "extra": extra, "numbers": numbers_of(optimizer)}


def _generators(work_dir: Path) -> dict[str, Any]:
    torch.manual_seed(dist.get_rank())
    Checkpoints(work_dir).save(1, {"model": make_optimizer(sharded=True).state()}, {})
    expected = torch.rand(1).item()
    torch.manual_seed(100 + dist.get_rank())
    Checkpoints(work_dir).restore({"model": make_optimizer(sharded=True).state()})
    return {"expected": expected, "drawn": _gathered(torch.rand(1).item())}


def _no_room(work_dir: Path) -> dict[str, Any]:
    real, usage = shutil.disk_usage, shutil.disk_usage(work_dir)
    shutil.disk_usage = lambda path: usage._replace(free=1000)
    line = _refusal(work_dir, 8)
    shutil.disk_usage = real
    return {"lines": _gathered(line)}


def _refused(work_dir: Path) -> dict[str, Any]:
    """The second rank's disk is full."""
    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        os.fsync = full
    line = _refusal(work_dir, 8)
    os.fsync = real
    return {"lines": _gathered(line), "left": sorted(os.listdir(work_dir / "checkpoints"))}


def _damaged(work_dir: Path) -> dict[str, Any]:
    optimizer = make_optimizer(sharded=True)
    Checkpoints(work_dir).save(8, {"model": optimizer.state()}, {})
    if dist.get_rank() == 0:
        os.truncate(work_dir / "checkpoints/step-000008/__1_0.distcp", 100)
    dist.barrier()
    step, _ = Checkpoints(work_dir).restore({"model": optimizer.state()})
    return {"steps": _gathered(step)}


def _rolled_back(work_dir: Path) -> dict[str, Any]:
    parts = {"model": make_optimizer(sharded=True).state()}
    checkpoints = Checkpoints(work_dir)
    checkpoints.save(3, parts, {})
    checkpoints.save(4, parts, {}, regular=False)
    step, _ = checkpoints.roll_back(parts)
    return {"steps": _gathered(step), "left": sorted(os.listdir(work_dir / "checkpoints"))}


def _refusal(work_dir: Path, step: int, *, width: int = 5) -> str:
    sharded = dist.is_initialized()
    try:
        Checkpoints(work_dir).save(step, {"model": make_optimizer(width=width, sharded=sharded).state()}, {})
    except EnvironmentProblem as error:
        assert error.exit_code == 4
        return str(error)
    raise AssertionError("saved")


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.clone()


def _limited_file_size(work_dir: Path) -> dict[str, str]:
    width = 20_000  # 1.2 MB with AdamW's moments
    saved = make_optimizer(width=width)
    take_steps(saved, 1)
    Checkpoints(work_dir).save(1, {"model": saved.state()}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    line = _refusal(work_dir, 2, width=width)
    _check_intact(work_dir, saved, width)
    return {"in the middle": line}


def _small_disk(work_dir: Path) -> dict[str, str]:
    width = 20_000
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(work_dir)]
    subprocess.run(mount, check=True)
    saved = make_optimizer(width=width)
    take_steps(saved, 1)
    Checkpoints(work_dir).save(1, {"model": saved.state()}, {})
    lines = {"before": _refusal(work_dir, 2, width=width)}
    usage = shutil.disk_usage(work_dir)
    shutil.disk_usage = lambda path: usage._replace(free=2**40)  # as if another process took the room later
    lines["in the middle"] = _refusal(work_dir, 2, width=width)
    _check_intact(work_dir, saved, width)
    subprocess.run(["mount", "-o", "remount,ro", str(work_dir)], check=True)
    lines["read only"] = _refusal(work_dir, 2, width=width)
    _check_intact(work_dir, saved, width)
    return lines


def _check_intact(work_dir: Path, saved: Optimizer, width: int) -> None:
    """The first checkpoint loads, and nothing lies beside it."""
    loaded = make_optimizer(width=width)
    assert Checkpoints(work_dir).restore({"model": loaded.state()}) == (1, {})
    expected, found = numbers_of(saved), numbers_of(loaded)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert os.listdir(work_dir / "checkpoints") == ["step-000001"]


if __name__ == "__main__":
    refuse = {"file_size": _limited_file_size, "small_disk": _small_disk}[sys.argv[1]]
    print(json.dumps(refuse(Path(sys.argv[2]))))
