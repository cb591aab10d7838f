"""The surroundings of recipes in tests: in the test's own process, or in workers of a Ray that is running."""

from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.stage_table import STAGES
from pipeline.stage_task import ready
from stages.config.stage import StageSettings
from stages.runtime import Runtime, StageResources
from stages.training.distributed import Worker


def runtime_in(directory: Path, stage: str, *, num_workers: int = 0) -> Runtime:
    """A stage's surroundings under `directory`: work, logs, and an empty `out` beside them.

    No workers: inline, in this process.
    """
    for name in ("work", "logs", "out"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    return Runtime(
        stage=stage,
        work_dir=directory / "work",
        log_dir=directory / "logs",
        resources=StageResources(num_workers=max(1, num_workers)),
        executor="ray" if num_workers else "inline",
        placement_timeout_s=120,
        collective_timeout_s=120,
        num_threads=2,
        stop_file=directory / "stop",
    )


def run_recipe(
    settings: StageSettings, inputs: Mapping[str, Path], out_dir: Path, runtime: Runtime
) -> dict[str, float]:
    """What the recipe of `runtime.stage` measures; it leaves its artifact in `out_dir`."""
    with ready(STAGES[runtime.stage].recipe, settings, inputs, runtime) as run:
        return dict(run(settings=settings, inputs=inputs, out_dir=out_dir))


def worker_in(directory: Path, stage: str) -> Worker:
    """The one worker of such a stage."""
    return Worker(rank=0, world_size=1, device=torch.device("cpu"), runtime=runtime_in(directory, stage))
