"""What a stage is given besides its settings: places and machines, nothing that may change its result.

Owns: `Runtime` and the resource settings. Light import.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from rollout.ground.section import Section


class StageResources(Section):
    """`resources.<stage>:` - workers of one stage."""

    num_workers: int = Field(default=1, ge=1, le=10_000)
    """Training processes."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs Ray reserves per worker; a worker computes with all cores of its machine."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs per worker; 0 trains on the CPU."""
    num_cpus_per_engine: float = Field(default=0.0, ge=0)
    """CPUs Ray reserves per rollout engine of this stage; 0: it takes turns with a worker."""
    num_gpus_per_engine: float = Field(default=0.0, ge=0)
    """GPUs per rollout engine of this stage; a fraction shares one with a worker."""


CORPUS, START, POLICY, REWARD_MODEL, BASE = "corpus", "start", "policy", "reward_model", "base"
"""What recipes call their inputs, whichever stage made them: shards and tokenizer, the model that is trained
further, the policy that PPO tunes, its judge, and for an evaluation the model before any tuning.
"""


def warnings_file(log_dir: Path, stage: str) -> Path:
    """Where a stage's workers say what its user should hear of at once, one line each."""
    return log_dir / f"{stage}.warnings.log"


def hide_gpus() -> None:
    """From now on this process computes on the CPU, whatever GPUs its machine has; call it before CUDA is
    used. Ray hides none from a process that has reserved none, and would hand a hiding runtime environment
    on to the engines that the process opens.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


class FilesCheck(Protocol):
    """Compares what the settings name, and given models, with what the run was planned on."""

    def __call__(self, *, trusting_stamps: bool = False) -> None:
        """Raises DataError for what changed. `trusting_stamps`: of a file whose size and times are those of
        the plan, no byte is read.
        """


def _nothing(*, trusting_stamps: bool = False) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The surroundings of one stage execution.

    A stage calls `check_files` once it has read the files that its settings name, and before it keeps
    anything of them. What it read is then what its artifact is named by. Every worker reads some of them
    again (the chat template), and a model. It asks once more before its first step, trusting stamps. Edits
    after that harm nothing.
    """

    stage: str
    work_dir: Path  # unfinished work of this fingerprint: checkpoints/, metrics.jsonl; survives a kill
    log_dir: Path  # logs of engines and workers
    resources: StageResources
    executor: Literal["ray", "inline"]  # inline: every part of the stage in this process, without Ray
    placement_timeout_s: float  # deadline for Ray to place this stage's workers
    collective_timeout_s: float  # deadline for workers to meet: rank 0 may generate or write meanwhile
    num_threads: int  # cores this stage may compute with: fewer where stages run side by side
    stop_file: Path  # exists once the run was asked to stop: leave at the next step boundary, state saved
    check_files: FilesCheck = _nothing
    joined_cluster: bool = False  # Ray was running already (resources.address)
    group: Any = None  # on Ray, once the stage is placed: the placement group of its workers and engines

    def stop_requested(self) -> bool:
        """Whether the driver was told to stop, by a signal. A file: seen on every node of a cluster."""
        return self.stop_file.exists()


@contextmanager
def warnings_kept(runtime: Runtime) -> Iterator[None]:
    """Inside, what the stages' code warns of (steps skipped, checkpoints passed over) is written where the
    driver follows it.
    """
    handler = logging.FileHandler(warnings_file(runtime.log_dir, runtime.stage), delay=True)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("stages")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
