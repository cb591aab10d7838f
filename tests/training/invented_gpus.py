"""A local Ray with four GPUs that do not exist: which of them each process of a stage would see.

    python invented_gpus.py MODEL_DIR SCRATCH_DIR --> one JSON object: case -> who -> CUDA_VISIBLE_DEVICES

A process of its own, because the Ray of the other tests has no GPUs.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from inline import runtime_in

from rollout.config import EngineConfig
from stages.rollout_source import EngineClient, open_engines
from stages.runtime import Runtime, StageResources
from stages.training.distributed import Worker, _workers, launch, placed

MAX_MODEL_LEN = 64
VARIABLES = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def environment(_: object = None) -> dict[str, str | None]:
    """What this process was told of GPUs and networks."""
    return {name: os.environ.get(name) for name in VARIABLES}


def seen_by(actors: list[Any]) -> list[str | None]:
    """The GPUs of each actor, as it sees them."""
    calls = [actor.__ray_call__.remote(environment) for actor in actors]
    return [answer["CUDA_VISIBLE_DEVICES"] for answer in ray.get(calls)]


def actors_of(client: EngineClient) -> list[Any]:
    """The actors of a client's engines."""
    return [engine._actor for engine in client.engine._engines]


@contextlib.contextmanager
def engines(rollout: EngineConfig, model_dir: Path, runtime: Runtime) -> Iterator[EngineClient]:
    """Real engines, as a stage opens them."""
    with open_engines(
        rollout, model_dir=model_dir, dtype="float32", max_model_len=MAX_MODEL_LEN, runtime=runtime
    ) as client:
        yield client


def opened_by_a_worker(worker: Worker, *, rollout: EngineConfig, model_dir: Path) -> dict[str, Any]:
    """What reward and evaluate do: rank 0 opens the engines."""
    seen: dict[str, Any] = {"device": worker.device.type, "torch": torch.cuda.device_count(), **environment()}
    if worker.rank == 0 and worker.runtime.resources.num_gpus_per_engine:
        with engines(rollout, model_dir, worker.runtime) as client:
            seen["engines"] = seen_by(actors_of(client))
    return seen


def of_a_worker(runtime: Runtime, model_dir: Path) -> dict[str, Any]:
    """Of rank 0, and of the engines that it opens."""
    rollout = EngineConfig(engine="hf")
    with placed(runtime, rollout) as in_place:
        return launch(opened_by_a_worker, in_place, rollout=rollout, model_dir=model_dir)


def side_by_side(runtime: Runtime, rollout: EngineConfig, model_dir: Path) -> dict[str, list[str | None]]:
    """What ppo does: the stage task opens the engines, and workers come beside them."""
    with placed(runtime, rollout) as in_place, engines(rollout, model_dir, in_place) as client:
        workers = _workers(in_place)
        found = {"workers": seen_by(workers), "engines": seen_by(actors_of(client))}
        for worker in workers:
            ray.kill(worker)
        return found


def main(model_dir: Path, scratch: Path) -> dict[str, Any]:
    """All cases, one after another."""

    def runtime(case: str, **resources: Any) -> Runtime:
        made = runtime_in(scratch / case, "ppo", num_workers=1)
        return replace(made, resources=StageResources(num_cpus=0.5, **resources))

    hf = EngineConfig(engine="hf")
    return {
        "cpu worker, gpu engine": of_a_worker(runtime("a", num_gpus_per_engine=1), model_dir),
        "two cpu workers": of_a_worker(runtime("b", num_workers=2), model_dir),
        "shares": side_by_side(runtime("c", num_gpus=0.6, num_gpus_per_engine=0.4), hf, model_dir),
        "two and two": side_by_side(
            runtime("d", num_workers=2, num_gpus=1, num_gpus_per_engine=1),
            EngineConfig(engine="hf", sync="gloo", num_engines=2),
            model_dir,
        ),
        "engine of two": side_by_side(runtime("e", num_gpus=1, num_gpus_per_engine=2), hf, model_dir),
    }


if __name__ == "__main__":
    ray.init(num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
    finally:
        ray.shutdown()
