"""Runs the graph: as Ray tasks whose arguments are the refs of the stages they need, or in this process.

    PlannedRun --execute--> preflights --> run_stage(job, *upstream) per stage --> summary.json, links

Owns: which stage runs when, following each to its end, the record in the run directory.
Does not own: what has to run (planning), the body of a stage (stage_task), Ray's cluster (ray_session),
identity (dag), files (artifacts), what a person sees (progress).
`import ray` happens inside functions: the cli stays light, and inline runs never load it.
"""

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import cluster, dag, identity, placement, stage_table
from pipeline.artifacts import METRICS, Store
from pipeline.config import resolved_yaml
from pipeline.janitor import PLACE, nothing_left_behind
from pipeline.manifest import Manifest, read_manifest
from pipeline.planning import PlannedRun, current_fingerprints
from pipeline.preflight import check_machine
from pipeline.progress import Progress
from pipeline.provenance import package_versions
from pipeline.ray_session import answers_of_nodes, ray_session
from pipeline.signals import signals_ask_to_stop
from pipeline.stage_task import StageJob, StageResult, as_expected, json_number, result_of, run_stage
from rollout.errors import EngineError
from rollout.ground.disk import disk_problems
from rollout.ground.durable import write_whole
from rollout.ground.errors import EnvironmentProblem, ExpectedError, ProcessDied
from stages.bundles import lacking
from stages.errors import Interrupted
from stages.runtime import warnings_file

POLL_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A plan while it is executed: what has ended so far, well or not."""

    planned: PlannedRun
    progress: Progress
    results: dict[str, StageResult]  # taken as they are, or made by now
    failures: dict[str, ExpectedError]  # by stage; "ray" of the cluster

    def start(self, stage: str) -> None:
        """Follow the stage's metrics: in the work directory, then in the artifact that it becomes.

        Where an artifact is replaced, the old one lies there meanwhile. It is not followed.
        """
        node, store = self.planned.nodes[stage], self.planned.store
        unfinished = store.work_dir(stage, node.fingerprint) / METRICS
        published = store.artifact_dir(stage, node.fingerprint) / METRICS
        followed = [unfinished] if stage in self.planned.replaced else [unfinished, published]
        self.progress.start(stage, followed, warnings_file(store.log_dir(self.planned.config.name), stage))

    def finish(self, result: StageResult) -> None:
        """The stage is done: it is linked and told."""
        self.results[result.stage] = result
        self.planned.store.link(self.planned.config.name, result.stage, result.fingerprint)
        seconds = None if result.skipped else result.seconds
        self.progress.end(result.stage, "skipped" if result.skipped else "done", seconds=seconds)

    @contextlib.contextmanager
    def failure_noted(self, stage: str, beside: Collection[str] = ()) -> Iterator[None]:
        """Inside, a failure of `stage` is told and kept for the end. `beside`: stages that still run."""
        try:
            yield
        except ExpectedError as error:
            self.failures[stage] = error
            outcome = "stopped" if isinstance(error, Interrupted) else "failed"
            waiting = f"(waiting for {min(beside)} to end)" if beside else ""
            self.progress.end(stage, outcome, summary=waiting)


def execute(planned: PlannedRun, progress: Progress) -> dict[str, StageResult]:
    """Run what is planned and record it in the run directory; the results of all planned stages.

    Raises the first stage's failure, after the stages beside it have ended and been recorded. When asked to
    stop by a signal: Interrupted, or KeyboardInterrupt when that took too long or was asked twice.
    Leaves no process behind in any case.
    """
    with _recorded(planned, progress) as run, _surroundings(run) as directory:
        if planned.config.pipeline.executor == "ray" and planned.to_run:
            _run_on_ray(run, directory)
        for stage in planned.to_run if planned.config.pipeline.executor == "inline" else ():
            if run.failures:
                progress.end(stage, "not run")
                continue
            run.start(stage)
            with run.failure_noted(stage):
                run.finish(run_stage(_job(planned, stage)))
    return {stage: run.results[stage] for stage in planned.nodes}


@contextlib.contextmanager
def _recorded(planned: PlannedRun, progress: Progress) -> Iterator[_Run]:
    """Around a run: its config before it, its record after it, whatever became of it. Raises what failed."""
    store, config = planned.store, planned.config
    with disk_problems(store.log_dir(config.name)):
        store.log_dir(config.name).mkdir(parents=True, exist_ok=True)
    with disk_problems(store.config_file(config.name)):
        write_whole(store.config_file(config.name), resolved_yaml(config).encode())
    results = {stage: result_of(manifest, skipped=True) for stage, manifest in planned.present.items()}
    for stage, manifest in planned.present.items():
        progress.end(stage, "skipped", summary=_made_with_other_versions(manifest))
    run = _Run(planned=planned, progress=progress, results=results, failures={})
    for remark in check_machine(planned):
        progress.note(f"note: {remark}")
    try:
        yield run
    finally:  # a full disk fails the record too, but the stage that met it says more
        with contextlib.suppress(EnvironmentProblem) if run.failures else contextlib.nullcontext():
            _record(planned, results)
    for failure in sorted(run.failures.values(), key=lambda failure: isinstance(failure, Interrupted)):
        raise failure


@contextlib.contextmanager
def _surroundings(run: _Run) -> Iterator[Path]:
    """Around the stages: signals ask them to stop, and no process outlives them.

    Yields a directory for the processes of the run. Where nothing has to run, nothing is started.
    """
    store, config = run.planned.store, run.planned.config
    if not run.planned.to_run:
        yield store.root
        return
    stop_file, timeout_s = store.stop_file(config.name), config.pipeline.stop_timeout_s
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(signals_ask_to_stop(stop_file, timeout_s=timeout_s))
        with disk_problems(PLACE):
            directory = stack.enter_context(nothing_left_behind(store.log_dir(config.name)))
        try:
            yield directory
        except EnvironmentProblem as error:
            run.failures["ray"] = error
    if stop.made and any(isinstance(error, EngineError | ProcessDied) for error in run.failures.values()):
        raise KeyboardInterrupt  # a signal to the whole process group takes engines and Ray as well


def _run_on_ray(run: _Run, directory: Path) -> None:
    planned, progress = run.planned, run.progress
    log_dir = planned.store.log_dir(planned.config.name)
    with ray_session(planned.config, directory, log_dir) as check_cluster:
        _preflight(planned, progress)
        pending = _submit(planned, run.results)
        following: set[str] = set()
        not_run: set[str] = set()
        while pending:
            blocked = run.failures.keys() | not_run
            for stage in [stage for stage in pending if blocked.intersection(planned.nodes[stage].inputs)]:
                del pending[stage]
                not_run.add(stage)
                progress.end(stage, "not run")
            for stage in pending.keys() - following:
                if not pending.keys() & planned.nodes[stage].inputs.keys():
                    following.add(stage)
                    run.start(stage)
            for stage in _wait_for_any(pending):
                ref = pending.pop(stage)
                with run.failure_noted(stage, beside=following & pending.keys()):
                    run.finish(_fetch(stage, ref, log_dir))
            check_cluster()


def _preflight(planned: PlannedRun, progress: Progress) -> None:
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
            answers = answers_of_nodes(file)
            for node, problem in cluster.problems(answers, file, nonce):
                raise EnvironmentProblem(f"resources.address {address}: node {node} {problem}")
        for node, answer in answers:
            if isinstance(answer, cluster.NodeReport) and answer.foreign_settings:
                named = ", ".join(answer.foreign_settings)
                progress.note(f"note: node {node}: {named}: unset there, because the config decides")


def _submit(planned: PlannedRun, results: Mapping[str, StageResult]) -> dict[str, Any]:
    """One task per stage to run, its arguments the refs of the stages it needs; stage -> ref."""
    import ray

    # max_calls: a process per stage, so that no stage inherits memory, threads or environment of another
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


def _made_with_other_versions(manifest: Manifest) -> str:
    now = package_versions()
    changed = [
        f"{name} {made_with}"
        for name, made_with in manifest.packages.items()
        if name in now and now[name] != made_with
    ]
    return f"(made with {', '.join(changed)})" if changed else ""


def _record(planned: PlannedRun, results: Mapping[str, StageResult]) -> None:
    """Links and summary.json of the run directory; stages of an older config disappear from it."""
    store, name = planned.store, planned.config.name
    current = current_fingerprints(planned)
    entries: dict[str, StageResult] = {}
    for stage in stage_table.STAGES:
        if stage in results:
            entries[stage] = results[stage]
        elif stage in current and _linked(store, name, stage) == identity.directory_name(
            stage, current[stage]
        ):
            with contextlib.suppress(EnvironmentProblem):
                manifest = read_manifest(store.artifact_dir(stage, current[stage]), hint="")
                entries[stage] = result_of(manifest, skipped=True)
        if stage in entries:
            store.link(name, stage, entries[stage].fingerprint)
        else:
            store.unlink(name, stage)
    summary = {
        stage: {
            "fingerprint": entry.fingerprint,
            "skipped": entry.skipped,
            "seconds": entry.seconds,
            "metrics": {key: json_number(value) for key, value in entry.metrics.items()},
        }
        for stage, entry in entries.items()
    }
    with disk_problems(store.run_dir(name)):
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        write_whole(store.run_dir(name) / "summary.json", text.encode())


def _linked(store: Store, run: str, stage: str) -> str | None:
    link = store.run_dir(run) / stage
    return Path(os.readlink(link)).name if link.is_symlink() else None
