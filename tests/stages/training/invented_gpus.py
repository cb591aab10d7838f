"""A local Ray with four GPUs that do not exist: which of them each process of a stage would see.

    python invented_gpus.py MODEL_DIR SCRATCH_DIR CASE... --> one JSON object: case -> what its processes saw

A process of its own, because the Ray of the other tests has no GPUs.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from inline import runtime_in

from rollout import pool
from rollout.config import EngineConfig
from stages import engines
from stages.runtime import Runtime, StageResources
from stages.training import distributed
from stages.training.distributed import Worker

VARIABLES = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
HF = EngineConfig(engine="hf")
GLOO = EngineConfig(engine="hf", sync="gloo", num_engines=2)


def environment(_: object = None) -> dict[str, str | None]:
    """What this process was told of GPUs and networks."""
    return {name: os.environ.get(name) for name in VARIABLES}


def seen_by(actors: list[Any]) -> list[str | None]:
    """The GPUs of each actor, as it sees them."""
    calls = [actor.__ray_call__.remote(environment) for actor in actors]
    return [answer["CUDA_VISIBLE_DEVICES"] for answer in ray.get(calls)]


def on_the_worker(worker: Worker, *, model_dir: Path) -> dict[str, Any]:
    """What reward and evaluate do: rank 0 opens real engines."""
    import torch

    seen: dict[str, Any] = {
        "device": worker.device.type,
        "torch": torch.cuda.device_count(),
        "fp32_precision": torch.get_float32_matmul_precision(),
        **environment(),
    }
    if worker.rank == 0:
        with engines.open_engines(
            HF, model_dir=model_dir, dtype="float32", max_model_len=64, runtime=worker.runtime
        ) as client:
            seen["engines"] = seen_by([engine._actor for engine in client.engine._engines])
    return seen


def opened_by_a_worker(runtime: Runtime, model_dir: Path) -> dict[str, Any]:
    """Of rank 0, and of the engines that it opens."""
    with (
        distributed.placed(runtime, HF) as in_place,
        distributed.launched(on_the_worker, in_place) as call,
    ):
        return call(model_dir=model_dir)


def side_by_side(runtime: Runtime, rollout: EngineConfig) -> dict[str, list[str | None]]:
    """Workers, and beside them the engines' actors, as ppo's stage task starts both."""
    resources = runtime.resources
    with distributed.placed(runtime, rollout) as in_place:
        opened = pool._actors(
            engines._places(rollout, in_place),
            num_gpus_each=resources.num_gpus_per_engine,
            num_cpus_each=resources.num_cpus_per_engine,
        )
        workers = distributed._workers(in_place)
        found = {"engines": seen_by(opened), "workers": seen_by(workers)}
        for actor in (*opened, *workers):
            ray.kill(actor)
        return found


def main(model_dir: Path, scratch: Path, case: str) -> dict[str, Any]:
    """What the processes of one case saw."""

    def runtime(**resources: Any) -> Runtime:
        made = runtime_in(scratch / case.replace(" ", "-"), "ppo", num_workers=1)
        return replace(made, resources=StageResources(num_cpus=0.5, **resources))

    match case:
        case "cpu workers":
            return opened_by_a_worker(runtime(num_workers=2, num_gpus_per_engine=1), model_dir)
        case "shares":
            return side_by_side(runtime(num_gpus=0.6, num_gpus_per_engine=0.4), HF)
        case "two and two":
            return side_by_side(runtime(num_workers=2, num_gpus=1, num_gpus_per_engine=1), GLOO)
        case "engine of two":
            return side_by_side(runtime(num_gpus=1, num_gpus_per_engine=2), HF)
    raise AssertionError(case)


if __name__ == "__main__":
    ray.init(num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        found = {case: main(Path(sys.argv[1]), Path(sys.argv[2]), case) for case in sys.argv[3:]}
        print(json.dumps(found))
    finally:
        ray.shutdown()
