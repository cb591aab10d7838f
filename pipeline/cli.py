"""The `rlhf` command: parses, calls, prints; nothing else.

    argv --> main --> command --> config.load --> planning.plan_* --> executor.execute --> summary lines
                         `--> ExpectedError: one line on stderr and its exit code; never a traceback

Exit codes: 0 done, 1 our bug, 2 config or a missing stage, 3 data, 4 environment, 5 training stopped itself,
75 interrupted.
Light import: the first thing a user waits for.
"""

import contextlib
import difflib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.exceptions import Abort, TyperException

import rlhf_pipeline  # noqa: F401  # first: ends a command that was started with somebody else's `pipeline`
from pipeline import (
    changes,
    dag,
    doctor,
    executor,
    identity,
    placement,
    planning,
    stage_table,
    supervisor,
    unstated,
)
from pipeline import config as configs
from pipeline.artifacts import Store
from pipeline.data_remarks import left_out
from pipeline.errors import ConfigError
from pipeline.experiment import ExperimentConfig, host_and_port
from pipeline.fitted_defaults import Fit, high_rates
from pipeline.headline import headline
from pipeline.janitor import nothing_left_behind
from pipeline.model_files import check_model_directory
from pipeline.model_path import model_at_hand, model_directory
from pipeline.preview import previews
from pipeline.progress import Progress, duration
from pipeline.report import outcome, write_report
from pipeline.signals import signals_interrupt
from pipeline.stage_task import StageResult
from pipeline.terminal import outputs_that_may_fail
from pipeline.yaml_nodes import short
from rollout.foreign_environment import take_out
from rollout.ground.disk import disk_problems
from rollout.ground.errors import GO_ON, EnvironmentProblem, ExpectedError
from stages.data.reading.hub import model_problem

INTERRUPTED = 75
TYPERS_INTERRUPTED = 130
MAX_LINE_CHARS = 2000
"""Of an error: it may quote a file, a template or a library, and goes to a terminal."""
say = partial(print, flush=True)

app = typer.Typer(
    name="rlhf",
    help="RLHF post-training: dataset in, model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Experiment file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file: sft.lr=1e-4"),
]


class Engine(StrEnum):
    """Who generates."""

    vllm = "vllm"
    hf = "hf"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script: runs a command and exits with its code."""
    is_supervised = supervisor.end_with_the_supervisor()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by torch's threads when they start
    arguments = list(sys.argv[1:] if argv is None else argv)
    with outputs_that_may_fail() as shown:
        _beat_the_environment(arguments)
        with _told() as ended, signals_interrupt():
            command = typer.main.get_command(app)
            ended.code = command.main(args=arguments, prog_name="rlhf", standalone_mode=False)
    lost = supervisor.DISPLAY_LOST if is_supervised else EnvironmentProblem.exit_code
    sys.exit(shown.exit_code(ended.exit_code, if_lost=lost))


def _beat_the_environment(arguments: Sequence[str]) -> None:
    """Unset variables that replace a setting of ours, and say so; not where a command prints plain text."""
    if (foreign := take_out(os.environ)) and arguments[:1] != ["schema"] and "--help" not in arguments:
        decided = ", ".join(dict.fromkeys(foreign.values()))
        line = f"note: environment: {', '.join(foreign)}: unset, because the config decides: {decided}"
        print(line, file=sys.stderr if arguments[:1] == ["generate"] else sys.stdout, flush=True)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Last stage to run.")] = None,
    force: Annotated[str | None, typer.Option(metavar="STAGE", help="Make it and all after it anew.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="Start again after a crash, so many times.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Refuse to start if CONFIG differs from that of the last run.")
    ] = False,
) -> None:
    """Run every stage of CONFIG; finished ones are skipped."""
    loaded = configs.load(config, overrides or [])
    if retries and force is not None:
        raise ConfigError(
            "--retries, --force: every restart would make what has finished anew; run with --force first"
        )
    if retries:
        wait_s = loaded.config.pipeline.retry_wait_s
        raise typer.Exit(supervisor.supervise(loaded.config.outputs, retries=retries, wait_s=wait_s))
    last, forced = _stage_name("--until", until), _stage_name("--force", force)
    if resume:
        _check_was_started(loaded.config)
    configs.check_paths(loaded, {"model", *dag.until(loaded.config, last)})
    planned = planning.plan_run(loaded.config, last=last, force=forced)
    if resume:
        _check_unchanged(planned.config)
    with _around_a_run(planned, loaded) as (progress, results):
        results |= executor.execute(planned, progress)


def _run_one(stage: str) -> Callable[..., None]:
    def command(
        config: ConfigFile,
        overrides: Overrides = None,
        inputs: Annotated[
            list[str] | None,
            typer.Option(
                "--input", metavar="STAGE=DIR", help="Artifact or model directory to use for a stage."
            ),
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Make it anew even if it is there.")] = False,
    ) -> None:
        loaded = configs.load(config, overrides or [])
        configs.check_paths(loaded, {"model", stage})
        planned = planning.plan_stage(
            loaded.config,
            stage,
            inputs=dict(map(_input, inputs or [])),
            force=force,
            command=lambda missing: " ".join(["rlhf", missing, str(config), *(overrides or [])]),
        )
        with _around_a_run(planned, loaded) as (progress, results):
            results |= executor.execute(planned, progress)

    return command


for _stage in stage_table.STAGES:
    app.command(name=_stage, help=f"Run {_stage} alone, on what the stages before it left or on --input.")(
        _run_one(_stage)
    )


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check CONFIG and every row of its datasets; show them, and what a run would do. Starts nothing."""
    loaded = configs.load(config, overrides or [])
    configs.check_paths(loaded)
    stages = dag.configured(loaded.config)
    dag.select(loaded.config, stages)
    dag.check_can_run(loaded.config, stages)
    say(f"{config}: valid; run {loaded.config.name!r}, outputs in {loaded.config.outputs}")
    fitted = planning.fitted_to_what_is_here(loaded.config)
    resolved, model = fitted.config, fitted.config.model
    at_hand = model_at_hand(model.path, model.revision)
    if model.path is not None and at_hand:
        directory = model_directory(model.path, model.revision)  # judged before anything of it is loaded
        planning.check_given_models(resolved, stages, {stage_table.MODEL: directory})
    elif not at_hand and (described := placement.described_by(model)) is not None:
        planning.check_described_model(resolved, described)
    if model.path is not None and not at_hand and (problem := model_problem(model.path, model.revision)):
        say(f"note: model.path {model.path}: no such directory, and not reachable as a hub id: {problem}")
    console = Console(soft_wrap=True)
    for block in previews(resolved, model_at_hand=at_hand):
        console.print(block)
    for remark in resolved.remarks():
        say(f"\nnote: {remark}")
    for line in _high_rates(loaded, fitted, stages):
        say(f"\nnote: {line}")
    say("\nnot stated, so chosen:")
    for line in unstated.table(loaded.config, fitted):
        say(f"  {line}")
    say("\nplan (memory at its peak, without what allocators keep):")
    for line in placement.plan(resolved, stages):
        say(f"  {line}")
    if not at_hand:
        say(f"\nstages (all would run; {resolved.model.path} has to be fetched first):")
        for stage in stages:
            needs = ", ".join(dag.needs(resolved, stage)) or "nothing"
            say(f"  {stage:9} run   needs {needs:40} {_steps(resolved, stage)}")
        return
    planned = planning.plan_run(resolved)
    say("\nstages:")
    for stage, node in planned.nodes.items():
        action = "skip" if stage in planned.present else "run"
        needs = ", ".join(node.inputs) or "nothing"
        say(f"  {stage:9} {action:5} needs {needs:40} {_steps(resolved, stage):22} {node.fingerprint}")


@app.command(name="doctor")
def examine(
    outputs: Annotated[Path, typer.Option(help="Directory a run would write to.")] = Path("outputs"),
    address: Annotated[str | None, typer.Option(help="Ray cluster whose nodes have to see it too.")] = None,
) -> None:
    """Examine this machine: packages, memory, cores, GPU, the outputs directory."""
    try:
        if address is not None:
            host_and_port(address)
    except ValueError as error:
        raise ConfigError(f"--address {address}: {error}") from error
    findings = doctor.examine(outputs, address)
    for finding in findings:
        say(f"{'ok  ' if finding.ok else 'FAIL'} {finding.subject:12} {finding.text}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(4)


@app.command()
def generate(
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Artifact or model directory.")],
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Response tokens at most.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    engine: Annotated[Engine, typer.Option(help="Who generates.")] = Engine.hf,
) -> None:
    """Print one response of a model."""
    configs.require_utf_8("MODEL_DIR", str(model_dir))
    check_model_directory(model_dir, named=str(model_dir))
    from stages.generate import generate as respond

    with nothing_left_behind(log_dir=None):
        text = respond(
            model_dir, prompt, temperature=temperature, max_tokens=max_tokens, seed=seed, engine=engine.value
        )
    say(text)


@app.command()
def schema() -> None:
    """Print the JSON Schema of config files, for editors."""
    say(json.dumps(configs.json_schema(), indent=2))


@dataclass
class _Ended:
    """How a command ended."""

    code: object = None  # what it returned; typer's commands return None where all is well

    @property
    def exit_code(self) -> int:
        return self.code if isinstance(self.code, int) else 0


@contextlib.contextmanager
def _told() -> Iterator[_Ended]:
    """Around a command: whatever it raises becomes one line and an exit code."""
    ended = _Ended()
    try:
        yield ended
        if ended.code == TYPERS_INTERRUPTED:
            raise KeyboardInterrupt
    except ExpectedError as error:
        ended.code = _complain(str(error), error.exit_code)
    except TyperException as error:
        ended.code = _complain(error.format_message() or "give a command; see `rlhf --help`", 2)
    except (KeyboardInterrupt, Abort):
        ended.code = _complain(f"interrupted; {GO_ON}", INTERRUPTED)
    except Exception as error:  # our bug, outside of any stage
        with tempfile.NamedTemporaryFile("w", prefix="rlhf-traceback-", suffix=".txt", delete=False) as log:
            traceback.print_exc(file=log)
        ended.code = _complain(
            f"{type(error).__name__}: {error}; this is a bug of the pipeline; traceback in {log.name}", 1
        )


def _complain(text: str, code: int) -> int:
    lines = filter(None, map(str.strip, text.splitlines()))
    print(short(" ".join(lines), MAX_LINE_CHARS), file=sys.stderr, flush=True)
    return code


def _check_was_started(config: ExperimentConfig) -> None:
    """Raises ConfigError where `--resume` has nothing to go on with."""
    path = Store(config.outputs).config_file(config.name)
    if not path.is_file():
        raise ConfigError(f"--resume: run {config.name!r} was not started yet ({path}); leave out --resume")


def _check_unchanged(config: ExperimentConfig) -> None:
    """Raises ConfigError unless the run was started before with the same settings, fitted ones included."""
    path = Store(config.outputs).config_file(config.name)
    before = changes.last_config(path)
    if before is not None and (found := changes.between(before, config)):
        raise ConfigError(
            f"--resume: not the config of the last run ({path}): {changes.listed(found)}; set them back, or "
            "leave out --resume to go on with the new ones"
        )


def _tell_changes(planned: planning.PlannedRun) -> None:
    """One line when the run had other settings before: what changed, and which stages start again."""
    config, path = planned.config, planned.store.config_file(planned.config.name)
    try:
        before = changes.last_config(path)
    except ConfigError as error:
        say(f"the config of the last run cannot be compared with this one: {error}")
        return
    if before is not None and (found := changes.between(before, config)):
        reached = changes.reached(before, config)
        anew = ", ".join(stage for stage in planned.to_run if stage in reached) or "no stage"
        say(f"changed since the last run {config.name!r}: {changes.listed(found)}; anew: {anew}")


def _high_rates(loaded: configs.LoadedConfig, fitted: Fit, stages: Sequence[str]) -> Iterator[str]:
    for key, remark in high_rates(fitted):
        if key.partition(".")[0] in stages:
            yield f"{loaded.where(key)}: {key}: {remark}"


@contextlib.contextmanager
def _around_a_run(
    planned: planning.PlannedRun, loaded: configs.LoadedConfig
) -> Iterator[tuple[Progress, dict[str, StageResult]]]:
    """Around the execution of a plan: what there is to say before it, its progress, and what came of it.

    Yields the progress and a dictionary for the results. Raises what `validate_data` raises.
    """
    if (line := unstated.fitted_line(planned.fit)) is not None:
        say(line)
    for line in _high_rates(loaded, planned.fit, planned.to_run):
        say(f"note: {line}")
    planning.validate_data(planned)
    for line in left_out(identity.datasets(planned.config, planned.to_run)):
        say(line)
    _tell_changes(planned)
    run_dir, results = planned.store.run_dir(planned.config.name), dict[str, StageResult]()
    try:
        with Progress() as progress:
            yield progress, results
    except BaseException:
        if (run_dir / "summary.json").is_file():
            with contextlib.suppress(EnvironmentProblem):  # what ended the run is what to tell
                _report(run_dir)
        raise
    _tell_results(results, _report(run_dir), outcome(run_dir))


def _tell_results(results: Mapping[str, StageResult], report: Path, said: str | None) -> None:
    """A line per stage of this command, what came of the run, and where to read on."""
    say("")
    for stage, result in results.items():
        took = "skipped" if result.skipped else duration(result.seconds)
        say(f"{stage:9} {took:12} {headline(stage, result.metrics)}".rstrip())
    if said is not None:
        say(f"\n{said}")
    say(f"report: {os.path.relpath(report)}")


def _report(run_dir: Path) -> Path:
    with disk_problems(run_dir / "report.html"):
        return write_report(run_dir)


def _stage_name(option: str, name: str | None) -> str | None:
    if name is None or name in stage_table.STAGES:
        return name
    close = difflib.get_close_matches(name, stage_table.STAGES, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"one of {', '.join(stage_table.STAGES)}"
    raise ConfigError(f"{option} {name}: no such stage; {hint}")


def _input(text: str) -> tuple[str, Path]:
    stage, equals, directory = text.partition("=")
    if not equals or not directory:
        raise ConfigError(f"--input {text}: write STAGE=DIR, e.g. --input sft=outputs/runs/demo/sft")
    _stage_name("--input", stage)
    configs.require_utf_8(f"--input {stage}", directory)
    return stage, Path(directory)


def _steps(config: Any, stage: str) -> str:
    section = getattr(config, stage)
    fields = type(section).model_fields
    if "max_steps" in fields and section.max_steps is not None:
        return f"{section.max_steps} steps"
    return f"{section.num_epochs:g} epochs of its data" if "num_epochs" in fields else ""


if __name__ == "__main__":
    main()
