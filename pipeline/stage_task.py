"""The body of a stage task, wherever it runs: in a process of its own on Ray, or in the driver's.

    StageJob --> lock -> already there? -> inputs verified -> recipe -> seal -> publish --> StageResult
                   `--any failure--> traceback in the run's logs, one ExpectedError

Owns: the order of these steps, the settings of a stage's process, what an error becomes for the user.
Does not own: when a stage runs (executor), files and locks (artifacts), what a stage does (recipes).
"""

import contextlib
import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline import identity
from pipeline.artifacts import METRICS, Store
from pipeline.errors import StageFailed
from pipeline.manifest import MANIFEST, Exactness, Manifest, exactness_of, read_manifest
from pipeline.planning import given_input
from pipeline.stage_table import STAGES, Recipe
from rollout.foreign_environment import take_out
from rollout.ground.disk import disk_problems, fault_behind
from rollout.ground.durable import write_whole
from rollout.ground.errors import GO_ON, EnvironmentProblem, ExpectedError, ProcessDied, root_cause
from stages.config.stage import StageSettings
from stages.config.training import TrainingConfig
from stages.errors import DataError, Interrupted
from stages.runtime import Runtime, StageResources, hide_gpus, warnings_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """Everything a stage task needs, wherever it runs."""

    node: identity.Node
    outputs: Path
    log_dir: Path
    outside: Mapping[str, Path]
    resources: StageResources
    executor: Literal["ray", "inline"]
    placement_timeout_s: float
    collective_timeout_s: float
    lock_timeout_s: float
    side_by_side: int  # stages that may run at the same time: their threads share the cores
    replace: bool
    stop_file: Path
    joined_cluster: bool

    @property
    def num_threads(self) -> int:
        """This stage's share of the cores of the machine it is asked on."""
        return max(1, len(os.sched_getaffinity(0)) // self.side_by_side)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One finished stage of a run."""

    stage: str
    fingerprint: str
    skipped: bool
    seconds: float  # of the execution that made the artifact
    metrics: Mapping[str, float]


@dataclass(kw_only=True)
class _Making:
    """A stage's artifact while it is made."""

    inputs: Mapping[str, Path]  # by what the recipe calls them
    out_dir: Path
    runtime: Runtime
    metrics: Mapping[str, float] = field(default_factory=dict)


def run_stage(job: StageJob, *upstream: StageResult) -> StageResult:
    """The body of a stage task: skip, resume or run, then publish. `upstream` only orders the tasks.

    Raises ExpectedError and nothing else, so that the driver can print one line.
    """
    node, store = job.node, Store(job.outputs)
    if job.executor == "ray":
        _settle_process(job)
    with _failure_recorded(job), store.lock(node.stage, node.fingerprint, timeout_s=job.lock_timeout_s):
        if job.stop_file.exists():
            raise Interrupted(f"{node.stage}: not started, because the run was asked to stop; {GO_ON}")
        present = None if job.replace else store.find(node.stage, node.fingerprint)
        if present is not None:
            return result_of(present, skipped=True)
        if job.replace:
            store.begin_anew(node.stage, node.fingerprint)
        if not store.left_complete(node.stage, node.fingerprint):
            with (
                _sealed(job, store) as made,
                ready(node.recipe, node.settings, made.inputs, made.runtime) as run,
            ):
                made.metrics = run(settings=node.settings, inputs=made.inputs, out_dir=made.out_dir)
        return result_of(store.publish(node, replace=job.replace), skipped=False)


@contextlib.contextmanager
def ready(
    recipe: Recipe, settings: StageSettings, inputs: Mapping[str, Path], runtime: Runtime
) -> Iterator[Callable[..., Mapping[str, float]]]:
    """Yields the function of a recipe, to be called with settings, inputs and out_dir.

    It runs on the workers, or in this process where the stage has none. For workers the stage task first
    prepares what it reads: an error in the data needs no free cluster to be found. Then it takes their place,
    and opens what it holds while they run.
    """
    function = _named(recipe.entry)
    if not recipe.on_workers:
        yield partial(function, runtime=runtime)
        return
    from stages.training.distributed import launched, placed

    arguments: Mapping[str, Any] = {}
    if recipe.prepares is not None:
        with warnings_kept(runtime):
            arguments = _named(recipe.prepares)(settings, inputs, runtime)
    with contextlib.ExitStack() as stack:
        in_place = stack.enter_context(placed(runtime, settings.engines))
        if recipe.holds is not None:
            with warnings_kept(runtime):
                held = _named(recipe.holds)(settings, inputs, in_place, **arguments)
                arguments = stack.enter_context(held)
        yield partial(stack.enter_context(launched(function, in_place)), **arguments)


def result_of(manifest: Manifest, *, skipped: bool) -> StageResult:
    """What a run reports of the stage whose artifact has this manifest."""
    return StageResult(
        stage=manifest.stage,
        fingerprint=manifest.fingerprint,
        skipped=skipped,
        seconds=manifest.seconds,
        metrics=manifest.metrics,
    )


def check_files(job: StageJob, *, trusting_stamps: bool = False) -> None:
    """Compare what a stage reads from outside of `outputs` with what it was planned on: every byte of its
    datasets, scoring function, template and tokenizer, and given directories. Raises DataError.
    `trusting_stamps`: no byte of a file whose size and times are those of the plan.

    The stage asks before it reads, and again after that (`Runtime`). Sealing does not: training goes on for
    days after that, and whoever edits a dataset meanwhile should not lose it.
    """
    identity.check_contents(job.node, trusting_stamps=trusting_stamps)
    _check_given(job)


def as_expected(stage: str, error: BaseException, log: Path) -> ExpectedError:
    """What to raise for `error`: itself when it is for the user, else the machine's fault or our bug."""
    if isinstance(cause := root_cause(error), ExpectedError):
        return cause
    if any(kind.__module__ == "ray.exceptions" for kind in type(cause).__mro__):
        return ProcessDied(
            f"{stage}: a process of it died ({type(cause).__name__}; killed, or out of memory?); logs in "
            f"{log}; {GO_ON}"
        )
    if (fault := fault_behind(cause)) is not None:
        return EnvironmentProblem(f"{stage}: {fault}, then {GO_ON}")
    first_line = next(iter(str(cause).splitlines()), "")
    return StageFailed(
        f"{stage}: {type(cause).__name__}: {first_line}; this is a bug of the pipeline; traceback in {log}"
    )


def json_number(value: float) -> float | None:
    """A JSON number; JSON has no infinity."""
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _failure_recorded(job: StageJob) -> Iterator[None]:
    log = job.log_dir / f"{job.node.stage}.traceback.txt"
    work = Store(job.outputs).work_dir(job.node.stage, job.node.fingerprint)
    try:
        yield
    except Exception as error:  # the one place where any failure of a stage is recorded and raised again
        if isinstance(error, OSError) and not work.parent.exists():
            raise EnvironmentProblem(
                f"{job.node.stage}: {work} disappeared under it; check the disk, or set outputs=DIR"
            ) from error
        with contextlib.suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(traceback.format_exception(error)))
        raise as_expected(job.node.stage, error, log) from error


def _settle_process(job: StageJob) -> None:
    """A stage's own process: output to a file, passive waiting, its share of the cores. No GPU: it holds no
    tensor; workers and engines are processes of their own.

    Before torch is imported here; Ray sets OMP_NUM_THREADS=1 for a task with no CPUs of its own.
    """
    take_out(os.environ)  # that of another machine, on a cluster
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ["OMP_NUM_THREADS"] = str(job.num_threads)
    hide_gpus()
    with disk_problems(job.log_dir):
        job.log_dir.mkdir(parents=True, exist_ok=True)
        with (job.log_dir / f"{job.node.stage}.log").open("ab") as log:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)


@contextlib.contextmanager
def _sealed(job: StageJob, store: Store) -> Iterator[_Making]:
    """Around the recipe: its inputs are verified and its surroundings made; what it leaves is sealed."""
    node, started = job.node, time.time()
    inputs = {role: _verified_input(job, store, key) for role, key in node.roles.items()}
    check_files(job, trusting_stamps=True)  # hours may lie behind the plan
    work = store.begin(node.stage, node.fingerprint)
    runtime = Runtime(
        stage=node.stage,
        work_dir=work,
        log_dir=job.log_dir,
        resources=job.resources,
        executor=job.executor,
        placement_timeout_s=job.placement_timeout_s,
        collective_timeout_s=job.collective_timeout_s,
        num_threads=job.num_threads,
        stop_file=job.stop_file,
        check_files=partial(check_files, job),
        joined_cluster=job.joined_cluster,
    )
    made = _Making(inputs=inputs, out_dir=work / "out", runtime=runtime)
    yield made
    _check_given(job)  # an engine that was started again has opened its model again
    if not (work / METRICS).exists():  # a stage of one step
        line: dict[str, float | None] = {"step": 1, "max_steps": 1, "time": round(time.time(), 3)}
        line |= {f"{node.stage}/{key}": json_number(value) for key, value in made.metrics.items()}
        write_whole(work / METRICS, (json.dumps(line) + "\n").encode())
    store.seal(
        node,
        resolved=node.settings.model_dump(mode="json"),
        metrics=made.metrics,
        started=started,
        exactness=_exactness(job, made.out_dir, inputs.values()),
    )


def _named(entry: str) -> Any:
    """The function that the stage table names, `module:function`."""
    module, _, function = entry.partition(":")
    return getattr(importlib.import_module(module), function)


def _verified_input(job: StageJob, store: Store, key: str) -> Path:
    """The directory of an input, verified on this host. Given ones: see `check_files`."""
    if key in job.outside:
        return job.outside[key]
    directory = store.artifact_dir(key, job.node.inputs[key])
    store.verified(directory, hint=f"run again with --force {key} to make it anew")
    return directory


def _check_given(job: StageJob) -> None:
    store = Store(job.outputs)
    for key in job.node.inputs.keys() & job.outside.keys():
        if given_input(store, key, job.outside[key]).fingerprint != job.node.inputs[key]:
            raise DataError(f"{job.outside[key]}: {key}: {identity.CHANGED}")


def _exactness(job: StageJob, out: Path, inputs: Collection[Path]) -> Exactness:
    settings, stage = job.node.settings, job.node.stage
    section = getattr(settings, stage)
    return exactness_of(
        precision=section.precision if isinstance(section, TrainingConfig) else "fp32",
        num_workers=job.resources.num_workers if STAGES[stage].has_workers else 1,
        num_gpus=job.resources.num_gpus,
        max_staleness=0 if settings.engines is None else settings.engines.max_staleness,
        weights=[path for directory in (out, *inputs) for path in directory.glob("*.safetensors")],
        inputs=[read_manifest(path, hint="").exactness for path in inputs if (path / MANIFEST).is_file()],
    )
