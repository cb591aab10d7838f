"""Runs the graph: as Ray tasks whose arguments are the refs of the stages they need, or in this process.

    plan_run --> PlannedRun --execute--> run_stage(job, *upstream) per stage --> summary.json, links
                                         lock -> already there? -> recipe -> seal -> publish

Owns: what a command has to run, the local Ray cluster, the life of stage processes, one line per failure.
Does not own: identity (dag), files (artifacts), what a stage does (recipes), what a person sees (progress).
`import ray` happens inside functions: the cli stays light, and inline runs never load it.
"""

import contextlib
import errno
import importlib
import json
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline import cluster, dag, placement
from pipeline.artifacts import (
    MANIFEST,
    METRICS,
    Exactness,
    Given,
    Manifest,
    Store,
    exactness_of,
    model_directory,
    package_versions,
    read_manifest,
)
from pipeline.config import resolved_yaml
from pipeline.errors import ConfigError, MissingStage, StageFailed
from pipeline.experiment import ExperimentConfig
from pipeline.janitor import PLACE, nothing_left_behind
from pipeline.progress import Progress
from pipeline.signals import deaf, signals_ask_to_stop
from rollout.errors import GO_ON, EngineError, EnvironmentProblem, ExpectedError, ProcessDied, root_cause
from rollout.run_mark import RUN_ID_VARIABLE
from stages.bundles import lacking
from stages.config import EvaluateSettings, PPOSettings, RewardSettings, StageSettings, TrainingConfig
from stages.data.durable import disk_problems, write_whole
from stages.data.scoring import load_judge
from stages.errors import DataError, Interrupted
from stages.runtime import Runtime, StageResources, warnings_file

POLL_S = 0.3
NODE_TIMEOUT_S = 60.0
"""For every node of a cluster to say what it has; a first task there starts a process."""
USED_UP = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
LOST_FILE_SERVER = {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO}
BROKEN_DISK = {errno.EROFS, errno.EIO} | LOST_FILE_SERVER


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """What one command is going to do."""

    config: ExperimentConfig
    store: Store
    nodes: Mapping[str, dag.Node]  # in the order of the stage table
    outside: Mapping[str, Given]  # input keys that no stage of this run makes
    present: Mapping[str, Manifest]  # verified artifacts that are taken as they are
    to_run: tuple[str, ...]
    replaced: frozenset[str]  # stages of to_run whose artifact is made anew


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """Everything a stage task needs, wherever it runs."""

    node: dag.Node
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


def plan_run(config: ExperimentConfig, *, last: str | None = None, force: str | None = None) -> PlannedRun:
    """All configured stages up to `last`; `force` and what needs it are made anew.

    Raises ConfigError, DataError (a missing dataset), CorruptArtifact.
    """
    stages = dag.until(config, last)
    if not stages:
        raise ConfigError("no stage has a section, so there is nothing to run; add `sft:` or another")
    if force is not None and force not in stages:
        raise ConfigError(f"--force {force}: not a stage of this run, which has {', '.join(stages)}")
    forced = frozenset() if force is None else dag.downstream(config, force)
    store = Store(config.outputs)
    selection = dag.select(config, stages)
    outside = _identified(config, store, selection, {})
    nodes = dag.plan(config, selection, _fingerprints(outside))
    present = _present(store, [node for stage, node in nodes.items() if stage not in forced])
    return PlannedRun(
        config=config,
        store=store,
        nodes=nodes,
        outside=outside,
        present=present,
        to_run=tuple(stage for stage in nodes if stage not in present),
        replaced=forced,
    )


def plan_stage(
    config: ExperimentConfig,
    stage: str,
    *,
    inputs: Mapping[str, Path],
    force: bool,
    command: Callable[[str], str],
) -> PlannedRun:
    """One stage on what the stages before it left, or on `inputs`.

    `command(stage)` is how a user makes a missing stage. Raises MissingStage besides what `plan_run` raises.
    """
    unused = inputs.keys() - set(dag.needs(config, stage))
    if unused:
        wanted = ", ".join(dag.needs(config, stage)) or "nothing"
        raise ConfigError(f"--input {min(unused)}: {stage} takes {wanted}")
    store = Store(config.outputs)
    selection = dag.select(config, [stage], inputs.keys())
    outside = _identified(config, store, selection, inputs)
    nodes = dag.plan(config, selection, _fingerprints(outside))
    needed = [nodes[key] for key in dag.needs(config, stage) if key in nodes]
    present = _present(store, needed)
    for node in needed:
        if node.stage not in present:
            raise MissingStage(
                f"{stage}: needs {node.stage}, which has not finished with this config; run "
                f"`{command(node.stage)}`, or give --input {node.stage}=DIR"
            )
    if not force:
        present |= _present(store, [nodes[stage]])
    return PlannedRun(
        config=config,
        store=store,
        nodes={key: node for key, node in nodes.items() if key in present or key == stage},
        outside=outside,
        present=present,
        to_run=() if stage in present else (stage,),
        replaced=frozenset({stage} if force else ()),
    )


def validate_data(planned: PlannedRun) -> None:
    """Before anything starts: read every dataset of the stages that will run, load the scoring function and
    the tokenizer that prepare is given.

    Raises DataError, ModelError.
    """
    from stages.data.validation import validate

    if "prepare" in planned.to_run:
        _check_given_to_prepare(planned)
    for stage, sources in dag.datasets(planned.config, planned.to_run).items():
        validate(list(sources.values()), stage, getattr(planned.config, stage))
    evaluate = planned.config.evaluate
    if "evaluate" in planned.to_run and evaluate is not None and evaluate.score is not None:
        load_judge(evaluate.score)


def _check_given_to_prepare(planned: PlannedRun) -> None:
    """Raises DataError for unknown languages, ModelError for a tokenizer or template that cannot be used."""
    prepare, template = planned.config.prepare, planned.config.model.chat_template
    assert prepare is not None
    if prepare.languages:
        from stages.data.languages import check_languages

        check_languages(prepare.languages)
    model = planned.outside.get(dag.MODEL)
    tokenizer = prepare.tokenizer if model is None else model.path
    if tokenizer is not None or template is not None:
        from stages.data.vocabulary import given_tokenizer

        given_tokenizer(tokenizer, prepare, template)


def execute(planned: PlannedRun, progress: Progress) -> dict[str, StageResult]:
    """Run what is planned and record it in the run directory; the results of all planned stages.

    Raises the first stage's failure, after the stages beside it have ended and been recorded. When asked to
    stop (SIGINT, SIGTERM): Interrupted, or KeyboardInterrupt when that took too long or was asked twice.
    Leaves no process behind in any case.
    """
    store, config = planned.store, planned.config
    with disk_problems(store.log_dir(config.name)):
        store.log_dir(config.name).mkdir(parents=True, exist_ok=True)
    with disk_problems(store.config_file(config.name)):
        write_whole(store.config_file(config.name), resolved_yaml(config).encode())
    results = {stage: _result(manifest, skipped=True) for stage, manifest in planned.present.items()}
    for stage, manifest in planned.present.items():
        progress.end(stage, "skipped", summary=_made_with_other_versions(manifest))
    failures: dict[str, ExpectedError] = {}
    try:
        if planned.to_run:
            _run(planned, progress, results, failures)
    finally:  # a full disk fails the record too: a stage that met it says more
        with contextlib.suppress(EnvironmentProblem) if failures else contextlib.nullcontext():
            _record(planned, results)
    for failure in sorted(failures.values(), key=lambda failure: isinstance(failure, Interrupted)):
        raise failure
    return {stage: results[stage] for stage in planned.nodes}


def run_stage(job: StageJob, *upstream: StageResult) -> StageResult:
    """The body of a stage task: skip, resume or run, then publish. `upstream` only orders the tasks.

    Raises ExpectedError and nothing else, so that the driver can print one line.
    """
    node, store = job.node, Store(job.outputs)
    if job.executor == "ray":
        _settle_process(job)
    with _failure_recorded(job), store.lock(node.stage, node.fingerprint, timeout_s=job.lock_timeout_s):
        if job.stop_file.exists():
            raise Interrupted(f"{node.stage}: not started, for the run was asked to stop; {GO_ON}")
        present = None if job.replace else store.find(node.stage, node.fingerprint)
        if present is not None:
            return _result(present, skipped=True)
        if job.replace:
            store.begin_anew(node.stage, node.fingerprint)
        if not store.left_complete(node.stage, node.fingerprint):
            _run_recipe(job, store)
        return _result(store.publish(node, replace=job.replace), skipped=False)


@contextlib.contextmanager
def ray_session(config: ExperimentConfig, directory: Path, log_dir: Path) -> Iterator[Callable[[], None]]:
    """A Ray connection for one run. Yields a check: EnvironmentProblem when the local cluster is dying.

    A local cluster has a token of its own, and its session in the run's temporary `directory`.
    """
    if config.resources.address is not None:
        with _joined_cluster(config.resources.address, log_dir):
            yield lambda: None
        return
    _authenticate_local_cluster()
    with _ray_connected(log_dir, address="local", include_dashboard=False, _temp_dir=str(directory)):
        yield lambda: _check_local_cluster(log_dir)


def ask_every_node(file: Path, address: str) -> list[cluster.Answer]:
    """Joins the cluster at `address`; what each node of it answers when asked for a report on `file`.

    Raises EnvironmentProblem.
    """
    log_dir = Path(tempfile.mkdtemp(prefix="rlhf-doctor-"))
    try:
        with _joined_cluster(address, log_dir):
            return _answers(file)
    finally:
        shutil.rmtree(log_dir, ignore_errors=True)


def _answers(file: Path) -> list[cluster.Answer]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(cluster.report)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    calls = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(file)
        for node in nodes
    }
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=NODE_TIMEOUT_S)
    answers: list[cluster.Answer] = []
    for node, call in calls.items():
        try:
            answers.append((nodes[node], ray.get(call, timeout=0)))
        except ray.exceptions.RayError as error:
            answers.append((nodes[node], type(error).__name__))
    return answers


def _preflight(planned: PlannedRun) -> None:
    """Before any stage starts: every bundle can be placed, and every node of a joined cluster is fit for it.

    Raises EnvironmentProblem.
    """
    import ray

    config, address = planned.config, planned.config.resources.address
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    for stages in dag.levels(config, planned.to_run):
        problem = lacking(list(placement.bundles_by_stage(config, stages).values()), nodes)
        if problem is not None:
            raise EnvironmentProblem(f"{problem} - lower `resources` or add nodes")
    if address is not None:
        with cluster.nonce_in(planned.store.root) as (file, nonce):
            for node, problem in cluster.problems(_answers(file), file, nonce):
                raise EnvironmentProblem(f"resources.address {address}: node {node} {problem}")


def _identified(
    config: ExperimentConfig, store: Store, selection: dag.Selection, inputs: Mapping[str, Path]
) -> dict[str, Given]:
    outside = {}
    for key in selection.outside:
        if key == dag.MODEL:
            assert config.model.path is not None
            outside[key] = _given(store, key, model_directory(config.model.path, config.model.revision))
        else:
            outside[key] = _given(store, key, inputs[key])
    return outside


def _given(store: Store, key: str, path: Path) -> Given:
    if key == dag.MODEL:
        return Given(path=path, fingerprint=store.content_of(path))
    return store.identify(key, path)


def _fingerprints(outside: Mapping[str, Given]) -> dict[str, str]:
    return {key: given.fingerprint for key, given in outside.items()}


def _present(store: Store, nodes: Sequence[dag.Node]) -> dict[str, Manifest]:
    found = {node.stage: store.find(node.stage, node.fingerprint) for node in nodes}
    return {stage: manifest for stage, manifest in found.items() if manifest is not None}


def _result(manifest: Manifest, *, skipped: bool) -> StageResult:
    return StageResult(
        stage=manifest.stage,
        fingerprint=manifest.fingerprint,
        skipped=skipped,
        seconds=manifest.seconds,
        metrics=manifest.metrics,
    )


def _made_with_other_versions(manifest: Manifest) -> str:
    now = package_versions()
    changed = [
        f"{name} {made_with}"
        for name, made_with in manifest.packages.items()
        if name in now and now[name] != made_with
    ]
    return f"(made with {', '.join(changed)})" if changed else ""


def _job(planned: PlannedRun, stage: str) -> StageJob:
    config = planned.config
    return StageJob(
        node=planned.nodes[stage],
        outputs=planned.store.root,
        log_dir=planned.store.log_dir(config.name),
        outside={key: given.path for key, given in planned.outside.items()},
        resources=placement.resources_of(config, stage),
        executor=config.pipeline.executor,
        placement_timeout_s=config.resources.placement_timeout_s,
        collective_timeout_s=config.resources.collective_timeout_s,
        lock_timeout_s=config.pipeline.lock_timeout_s,
        side_by_side=dag.side_by_side(config, planned.to_run),
        replace=stage in planned.replaced,
        stop_file=planned.store.stop_file(config.name),
        joined_cluster=config.resources.address is not None,
    )


def _start(planned: PlannedRun, stage: str, progress: Progress) -> None:
    """Follow the stage's metrics, from the work directory to the artifact that is renamed from it.

    Where an artifact is made anew, what lies there meanwhile is the old one: other bytes at every offset.
    """
    node, store = planned.nodes[stage], planned.store
    unfinished = store.work_dir(stage, node.fingerprint) / METRICS
    published = store.artifact_dir(stage, node.fingerprint) / METRICS
    followed = [unfinished] if stage in planned.replaced else [unfinished, published]
    progress.start(stage, followed, warnings_file(store.log_dir(planned.config.name), stage))


def _finish(
    planned: PlannedRun, result: StageResult, progress: Progress, results: dict[str, StageResult]
) -> None:
    results[result.stage] = result
    planned.store.link(planned.config.name, result.stage, result.fingerprint)
    progress.end(
        result.stage,
        "skipped" if result.skipped else "done",
        seconds=None if result.skipped else result.seconds,
    )


def _run(
    planned: PlannedRun,
    progress: Progress,
    results: dict[str, StageResult],
    failures: dict[str, ExpectedError],
) -> None:
    store, config = planned.store, planned.config
    stop_file, timeout_s = store.stop_file(config.name), config.pipeline.stop_timeout_s
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(signals_ask_to_stop(stop_file, timeout_s=timeout_s))
        with disk_problems(PLACE):
            directory = stack.enter_context(nothing_left_behind(store.log_dir(config.name)))
        try:
            if config.pipeline.executor == "inline":
                _run_inline(planned, progress, results, failures)
            else:
                _run_on_ray(planned, directory, progress, results, failures)
        except EnvironmentProblem as error:
            failures["ray"] = error
    if stop.made and any(isinstance(failure, EngineError | ProcessDied) for failure in failures.values()):
        raise KeyboardInterrupt  # a signal to the whole process group takes engines and Ray as well


def _run_inline(
    planned: PlannedRun,
    progress: Progress,
    results: dict[str, StageResult],
    failures: dict[str, ExpectedError],
) -> None:
    for stage in planned.to_run:
        if failures:
            progress.end(stage, "not run")
            continue
        _start(planned, stage, progress)
        try:
            _finish(planned, run_stage(_job(planned, stage)), progress, results)
        except ExpectedError as error:
            failures[stage] = error
            progress.end(stage, _outcome(error))


def _run_on_ray(
    planned: PlannedRun,
    directory: Path,
    progress: Progress,
    results: dict[str, StageResult],
    failures: dict[str, ExpectedError],
) -> None:
    log_dir = planned.store.log_dir(planned.config.name)
    with ray_session(planned.config, directory, log_dir) as check_cluster:
        _preflight(planned)
        pending = _submit(planned, results)
        following: set[str] = set()
        not_run: set[str] = set()
        while pending:
            blocked = failures.keys() | not_run
            for stage in [stage for stage in pending if blocked.intersection(planned.nodes[stage].inputs)]:
                del pending[stage]
                not_run.add(stage)
                progress.end(stage, "not run")
            for stage in pending.keys() - following:
                if not pending.keys() & planned.nodes[stage].inputs.keys():
                    following.add(stage)
                    _start(planned, stage, progress)
            for stage in _wait_for_any(pending):
                try:
                    _finish(planned, _fetch(stage, pending.pop(stage), log_dir), progress, results)
                except ExpectedError as error:
                    failures[stage] = error
                    beside = sorted(following & pending.keys())
                    progress.end(
                        stage, _outcome(error), summary=f"(waiting for {beside[0]} to end)" if beside else ""
                    )
            check_cluster()


def _outcome(error: ExpectedError) -> str:
    return "stopped" if isinstance(error, Interrupted) else "failed"


def _submit(planned: PlannedRun, results: Mapping[str, StageResult]) -> dict[str, Any]:
    """One task per stage to run, its arguments the refs of the stages it needs; stage -> ref."""
    import ray

    # max_calls: a process per stage, so that no memory, thread count or environment of one reaches the next
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(run_stage)
    refs = {stage: ray.put(result) for stage, result in results.items()}
    for stage in planned.to_run:
        upstream = [refs[key] for key in planned.nodes[stage].inputs if key in refs]
        refs[stage] = task.options(name=stage).remote(_job(planned, stage), *upstream)
    return {stage: refs[stage] for stage in planned.to_run}


def _wait_for_any(pending: Mapping[str, Any]) -> list[str]:
    import ray

    if not pending:
        return []
    done, _ = ray.wait(list(pending.values()), num_returns=1, timeout=POLL_S)
    return [stage for stage, ref in pending.items() if ref in done]


def _fetch(stage: str, ref: Any, log_dir: Path) -> StageResult:
    import ray

    try:
        result: StageResult = ray.get(ref)
        return result
    except ray.exceptions.RayError as error:
        raise as_expected(stage, error, log_dir) from error


def as_expected(stage: str, error: BaseException, log: Path) -> ExpectedError:
    """The line that `error` becomes: itself when meant for the user, else the machine's fault or our bug."""
    if isinstance(cause := root_cause(error), ExpectedError):
        return cause
    if any(kind.__module__ == "ray.exceptions" for kind in type(cause).__mro__):
        return ProcessDied(
            f"{stage}: a process of it died ({type(cause).__name__}; killed, or out of memory?); logs in "
            f"{log}; {GO_ON}"
        )
    if (fault := _machine_fault(cause)) is not None:
        return EnvironmentProblem(f"{stage}: {fault}, then {GO_ON}")
    first_line = next(iter(str(cause).splitlines()), "")
    return StageFailed(
        f"{stage}: {type(cause).__name__}: {first_line}; this is a bug of the pipeline; traceback in {log}"
    )


def _machine_fault(error: BaseException) -> str | None:
    """What the machine lacks or refuses, and the cure, if that is behind `error`: libraries wrap it, or only
    quote its text. A missing permission counts where it is the error itself: some code asks, and goes on.
    """
    if isinstance(error, PermissionError):
        return f"{error}; allow it, or set outputs=DIR"
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    for link in chain:
        if isinstance(link, MemoryError):
            return f"{str(link) or 'out of memory'}; free some"
        for numbers, cure in ((USED_UP, "free some"), (BROKEN_DISK, "check the disk, or set outputs=DIR")):
            quoted = any(os.strerror(number) in str(link) for number in numbers)
            if quoted or (isinstance(link, OSError) and link.errno in numbers):
                return f"{next(iter(str(link).splitlines()))}; {cure}"
    return None


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
    """A stage's own process: output to a file, passive waiting, its share of the cores, no GPU not its own.

    Before torch is imported here; Ray sets OMP_NUM_THREADS=1 for a task with no CPUs of its own.
    """
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ["OMP_NUM_THREADS"] = str(job.num_threads)
    if not job.resources.num_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with disk_problems(job.log_dir):
        job.log_dir.mkdir(parents=True, exist_ok=True)
        with (job.log_dir / f"{job.node.stage}.log").open("ab") as log:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)


def _run_recipe(job: StageJob, store: Store) -> None:
    node, started = job.node, time.time()
    inputs = {key: _verified_input(job, store, key) for key in node.inputs}
    check_files(job)  # hours may lie behind the plan
    work = store.begin(node.stage, node.fingerprint)
    module, _, function = node.entry.partition(":")
    recipe = getattr(importlib.import_module(module), function)
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
    metrics: Mapping[str, float] = recipe(node.settings, inputs, work / "out", runtime)
    _check_given(job)  # an engine that is started anew opens its model again
    if not (work / METRICS).exists():  # a stage of one step
        line: dict[str, float | None] = {"step": 1, "max_steps": 1, "time": round(time.time(), 3)}
        line |= {f"{node.stage}/{key}": _plain(value) for key, value in metrics.items()}
        write_whole(work / METRICS, (json.dumps(line) + "\n").encode())
    store.seal(
        node,
        resolved=node.settings.model_dump(mode="json"),
        metrics=metrics,
        started=started,
        exactness=_exactness(job, work / "out", inputs.values()),
    )


def _verified_input(job: StageJob, store: Store, key: str) -> Path:
    """The directory of an input, verified on this host. Given ones: see `check_files`."""
    if key in job.outside:
        return job.outside[key]
    directory = store.artifact_dir(key, job.node.inputs[key])
    store.verified(directory, hint=f"run again with --force {key} to make it anew")
    return directory


def check_files(job: StageJob) -> None:
    """Compare what a stage reads from outside of `outputs` with what it was planned on: every byte of its
    datasets, scoring function, template and tokenizer, and given directories. Raises DataError.

    Recipes ask too, as soon as they have read (`Runtime`). Sealing does not: training goes on for days after
    that, and whoever edits a dataset meanwhile should not lose it.
    """
    dag.check_contents(job.node)
    _check_given(job)


def _check_given(job: StageJob) -> None:
    store = Store(job.outputs)
    for key in job.node.inputs.keys() & job.outside.keys():
        if _given(store, key, job.outside[key]).fingerprint != job.node.inputs[key]:
            raise DataError(f"{job.outside[key]}: {key}: {dag.CHANGED}")


def _exactness(job: StageJob, out: Path, inputs: Collection[Path]) -> Exactness:
    settings, stage = job.node.settings, job.node.stage
    section = getattr(settings, stage)
    return exactness_of(
        precision=section.precision if isinstance(section, TrainingConfig) else "fp32",
        num_workers=1 if stage in placement.IN_THE_STAGE_TASK else job.resources.num_workers,
        num_gpus=job.resources.num_gpus,
        max_staleness=_max_staleness(settings),
        weights=[path for directory in (out, *inputs) for path in directory.glob("*.safetensors")],
        inputs=[read_manifest(path, hint="").exactness for path in inputs if (path / MANIFEST).is_file()],
    )


def _max_staleness(settings: StageSettings) -> int:
    if isinstance(settings, RewardSettings | PPOSettings | EvaluateSettings):
        return settings.rollout.max_staleness
    return 0


def _record(planned: PlannedRun, results: Mapping[str, StageResult]) -> None:
    """Links and summary.json of the run directory; stages of an older config disappear from it."""
    store, name = planned.store, planned.config.name
    current = _current_fingerprints(planned)
    entries: dict[str, StageResult] = {}
    for stage in dag.STAGES:
        if stage in results:
            entries[stage] = results[stage]
        elif stage in current and _linked(store, name, stage) == dag.directory_name(stage, current[stage]):
            with contextlib.suppress(EnvironmentProblem):
                manifest = read_manifest(store.artifact_dir(stage, current[stage]), hint="")
                entries[stage] = _result(manifest, skipped=True)
        if stage in entries:
            store.link(name, stage, entries[stage].fingerprint)
        else:
            store.unlink(name, stage)
    summary = {
        stage: {
            "fingerprint": entry.fingerprint,
            "skipped": entry.skipped,
            "seconds": entry.seconds,
            "metrics": {key: _plain(value) for key, value in entry.metrics.items()},
        }
        for stage, entry in entries.items()
    }
    with disk_problems(store.run_dir(name)):
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        write_whole(store.run_dir(name) / "summary.json", text.encode())


def _current_fingerprints(planned: PlannedRun) -> dict[str, str]:
    """Of every configured stage, as far as what this run does not need (later datasets) lets us tell."""
    known = {stage: node.fingerprint for stage, node in planned.nodes.items()}
    config, outside = planned.config, _fingerprints(planned.outside)
    for stage in dag.configured(config):
        with contextlib.suppress(ExpectedError):
            if stage not in known and outside.keys() | known.keys() >= set(dag.needs(config, stage)):
                selection = dag.Selection(stages=(stage,), outside=dag.needs(config, stage))
                known[stage] = dag.plan(config, selection, outside | known)[stage].fingerprint
    return known


def _linked(store: Store, run: str, stage: str) -> str | None:
    link = store.run_dir(run) / stage
    return Path(os.readlink(link)).name if link.is_symlink() else None


def _plain(value: float) -> float | None:
    """A JSON number; JSON has no infinity."""
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _joined_cluster(address: str, log_dir: Path) -> Iterator[None]:
    """Connected to somebody else's cluster, with its token. The environment of its workers is set per job: on
    this machine the run's mark tells the janitor which of them, and of their children, are the run's.
    """
    cluster.require_token(address)
    cluster.require_answer(address)
    _authenticate(RAY_AUTH_MODE="token")
    mark = {name: os.environ[name] for name in (RUN_ID_VARIABLE,) if name in os.environ}
    environment = {"OMP_WAIT_POLICY": "passive", **mark}
    with _ray_connected(log_dir, address=address, runtime_env={"env_vars": environment}):
        yield


@contextlib.contextmanager
def _ray_connected(log_dir: Path, **options: Any) -> Iterator[None]:
    import ray

    _quieten_ray(log_dir)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        try:
            with _stderr_to(log_dir / "ray-messages.log"):  # a refused token is complained of every second
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (
            ray.exceptions.RayError,
            RuntimeError,
            ConnectionError,
            TimeoutError,
            ValueError,
            OSError,
        ) as error:
            first_line = next(iter(str(error).splitlines()), "")
            reason = f"{type(error).__name__}: {first_line}"
            raise EnvironmentProblem(
                f"Ray did not start ({reason}); see {log_dir} and `rlhf doctor`, or set "
                "pipeline.executor=inline"
                if options["address"] == "local"
                else f"resources.address {options['address']}: not joined ({reason}); is the token the "
                "cluster's, and is this machine one of its nodes?"
            ) from error
        except SystemExit as error:  # Ray's own SIGTERM handler, in force during its start
            raise KeyboardInterrupt from error
        signal.signal(signal.SIGTERM, on_sigterm)
        yield
    finally:
        with deaf():
            ray.shutdown()


@contextlib.contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """At the level of file descriptors: Ray's client writes from C++."""
    sys.stderr.flush()
    before, to_log = os.dup(2), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(to_log, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        os.close(to_log)


def _quieten_ray(log_dir: Path) -> None:
    """Ray's messages about dying processes go to a file: a thread prints them even with log_to_driver off."""
    import ray._private.worker as worker

    def to_file(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        with contextlib.suppress(OSError), (log_dir / "ray-messages.log").open("a") as log:
            log.write("\n".join(data["lines"]) + "\n")

    assert callable(worker.print_to_stdstream)
    worker.print_to_stdstream = to_file


def _authenticate_local_cluster() -> None:
    """A token nobody else has, for a cluster whose servers listen on every interface."""
    _authenticate(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _authenticate(**variables: str) -> None:
    """Nothing phoned home, and how Ray proves who it is. The environment carries it to Ray's own processes;
    this one may have read its environment already.

    The autoscaler's metrics are the one server that asks for no token: with this port it does not start.
    """
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        AUTOSCALER_METRIC_PORT="-1",
        RAY_IGNORE_UNHANDLED_ERRORS="1",
        OMP_WAIT_POLICY="passive",
        **variables,
    )
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # a C extension

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _check_local_cluster(log_dir: Path) -> None:
    from ray._private.worker import _global_node

    dead: list[tuple[str, Any]] = [] if _global_node is None else _global_node.dead_processes()
    if dead:
        raise ProcessDied(f"Ray's {dead[0][0]} died; logs in {log_dir}; {GO_ON}")
