"""`make chaos`: kills parts of many tiny runs at random moments, and looks at what that cost.

    each run:  launch --follow(aim)--> SIGKILL --> what is left? --> launch again ... --> whole, same weights?
                          `--> progress.jsonl: one line per kill and per run --> docs/results/chaos.md

Every run starts from nothing, is killed about eleven times on its way through the six stages, and has to end,
by the same command, in the same bytes as a run nobody disturbed. A campaign that was stopped goes on where
it was, unless seed or code have changed. Exit code 1 when anything was lost, left or different.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aims import Aim, Engine, engine_of, plan_of
from blake3 import blake3
from launch import Launch
from results import page

from pipeline.provenance import git_commit

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "docs/results/chaos.md"
WEIGHTS = ("sft", "reward", "ppo")
NUM_ROWS = 400
DATASETS = ("corpus.jsonl", "sft.jsonl", "preferences.jsonl", "prompts.jsonl", "eval_prompts.jsonl")
MAX_SURPRISES = 3
"""Launches in a row that end by themselves with an error before the campaign gives up."""
CONFIG = f"""
base: {REPOSITORY}/configs/demo.yaml
name: chaos
model: {{layers: 2, hidden_size: 64, intermediate_size: 96, num_heads: 2, num_kv_heads: 1}}
prepare: {{vocab_size: 320, data: [{{path: corpus.jsonl}}]}}
pretrain: {{max_steps: 30, batch_size: 4, micro_batch_size: 4, log_every_steps: 1, checkpoint_every_steps: 3}}
sft:
  {{max_steps: 30, batch_size: 4, micro_batch_size: 4, log_every_steps: 1, checkpoint_every_steps: 3,
   data: [{{path: sft.jsonl}}]}}
reward:
  {{max_steps: 24, batch_size: 4, micro_batch_size: 4, log_every_steps: 1, checkpoint_every_steps: 3,
   min_accuracy: 0, normaliser_prompts: 8, data: [{{path: preferences.jsonl}}]}}
ppo:
  {{max_steps: 8, num_prompts: 8, batch_size: 4, micro_batch_size: 4, max_response_tokens: 8,
   checkpoint_every_steps: 2, data: [{{path: prompts.jsonl}}]}}
evaluate: {{max_prompts: 8, max_response_tokens: 8, prompts: [{{path: eval_prompts.jsonl}}]}}
rollout: {{kv_cache_mib: 64, max_num_seqs: 16}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What a killed stage had on the disk."""

    stage: str
    step: int  # of the newest checkpoint; 0: none
    journal: Mapping[str, int]  # rollouts by file -> time of writing


class Campaign:
    """The state on disk of one campaign: its runs, and what happened so far."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.seed = seed
        self._progress = directory / "progress.jsonl"
        of = {"seed": seed, "sources": _sources()}
        if self._progress.exists() and {key: self.events("begin")[0][key] for key in of} != of:
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if not self._progress.exists():
            self.record("begin", commit=git_commit(), **of)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Everything of one kind that was recorded: begin, kill, missed, surprise, whole, reference."""
        lines = map(json.loads, self._progress.read_text().splitlines())
        return [line for line in lines if line["kind"] == kind]

    def record(self, kind: str, **event: Any) -> None:
        """One line, and one for the person who watches."""
        with self._progress.open("a") as file:
            file.write(json.dumps({"kind": kind, "time": round(time.time(), 1), **event}) + "\n")
        shown = {key: value for key, value in event.items() if key not in ("weights", "killed")}
        print(kind, " ".join(f"{key}={value}" for key, value in shown.items()), flush=True)

    def go_on(self, num_kills: int) -> None:
        """Run after run until there were `num_kills` kills, each run to its end."""
        for run in itertools.count():
            if run in {event["run"] for event in self.events("whole")}:
                continue
            missing = num_kills - len(self.events("kill"))
            begun = self._num_aims_done(run)
            if missing <= 0 and not begun:
                return
            self._reference(engine_of(run))
            self._one_run(run, plan_of(self.seed, run)[begun : begun + max(missing, 0)])

    def _num_aims_done(self, run: int) -> int:
        return sum(event["run"] == run for kind in ("kill", "missed") for event in self.events(kind))

    def _reference(self, engine: Engine) -> None:
        if any(event["engine"] == engine for event in self.events("reference")):
            return
        directory = _fresh(self.directory / f"reference-{engine}")
        code = _launch(directory, engine).wait()
        assert code == 0, f"the undisturbed run ended with {code}; see {directory / 'log.txt'}"
        self.record("reference", engine=engine, weights=_weights(directory))

    def _one_run(self, run: int, aims: Iterable[Aim]) -> None:
        directory = self.directory / f"run-{run}"
        if not self._num_aims_done(run):
            _fresh(directory)
        engine = engine_of(run)
        before: Committed | None = None
        pending = list(aims)
        surprises = 0
        launch: Launch | None = None
        while True:
            launch = launch or _launch(directory, engine)
            with _ended_on_error(launch):
                aim = self._next_kill(launch, run, pending)
                outcome = None if aim is None else launch.kill(aim)
                code = launch.wait() if outcome is None else outcome.exit_code
            lost = {} if before is None else _lost(directory, before, launch.started)
            if aim is not None and outcome is not None:
                surprises, before = 0, _committed(directory, aim.stage)
                self.record("kill", run=run, engine=engine, **asdict(aim), **asdict(outcome), **lost)
                launch = launch if outcome.went_on else None
                continue
            if code == 0:
                self.record("whole", run=run, engine=engine, weights=_weights(directory), **lost)
                shutil.rmtree(directory)
                return
            surprises += 1
            self.record("surprise", run=run, code=code, line=launch.last_line(), **lost)
            assert surprises < MAX_SURPRISES, f"see {directory / 'log.txt'}"
            launch = None

    def _next_kill(self, launch: Launch, run: int, pending: list[Aim]) -> Aim | None:
        """The next aim whose moment has come, taken from `pending`; None when the run has ended, or goes on
        undisturbed.
        """
        while pending:
            aim = pending.pop(0)
            if launch.follow(aim):
                return aim
            if not launch.is_finished(aim.stage):  # the run ended, and not as planned
                pending.insert(0, aim)
                return None
            self.record("missed", run=run, stage=aim.stage, victim=aim.victim, moment=aim.moment)
        return None


@contextlib.contextmanager
def _ended_on_error(launch: Launch) -> Iterator[None]:
    """A campaign that is stopped takes the run it watches with it."""
    try:
        yield
    except BaseException:
        launch.end()
        raise


def _sources() -> str:
    """Digest of the code under test: what was recorded of another code is of no use."""
    hasher = blake3()
    for package in ("pipeline", "stages", "rollout", "tests/chaos"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            hasher.update(path.read_bytes())
    return hasher.hexdigest()[:12]


def _fresh(directory: Path) -> Path:
    """An empty run: its config, and the first rows of the demo's data."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "chaos.yaml").write_text(CONFIG)
    for name in DATASETS:
        lines = (REPOSITORY / "configs/demo" / name).read_text().splitlines()[:NUM_ROWS]
        (directory / name).write_text("\n".join(lines) + "\n")
    return directory


def _launch(directory: Path, engine: Engine) -> Launch:
    return Launch(directory, "chaos.yaml", f"rollout.engine={engine}")


def _weights(directory: Path) -> dict[str, str]:
    """blake3 of the final weights, by stage."""
    return {
        stage: blake3((directory / f"outputs/runs/chaos/{stage}/model.safetensors").read_bytes()).hexdigest()
        for stage in WEIGHTS
    }


def _committed(directory: Path, stage: str) -> Committed:
    steps = [
        int(path.name.removeprefix("step-"))
        for path in directory.glob(f"outputs/work/{stage}-*/checkpoints/step-*[0-9]")
    ]
    journal = {
        path.name: path.stat().st_mtime_ns
        for path in directory.glob(f"outputs/work/{stage}-*/journal/step-*.rollouts")
    }
    return Committed(stage=stage, step=max(steps, default=0), journal=journal)


def _lost(directory: Path, before: Committed, launched: float) -> dict[str, int]:
    """Of what a killed stage had committed: steps and rollouts that the next launch made a second time."""
    resumed = _first_new_step(directory, before.stage, launched)
    after = _committed(directory, before.stage)
    steps = 0 if resumed is None else before.step - (resumed - 1)
    again = [name for name, written in before.journal.items() if after.journal.get(name, written) != written]
    return {"lost_steps": max(0, steps), "rollouts_made_again": len(again)}


def _first_new_step(directory: Path, stage: str, since: float) -> int | None:
    """The first step that was logged after `since`; None when none was."""
    places = (f"outputs/work/{stage}-*/metrics.jsonl", f"outputs/artifacts/{stage}-*/metrics.jsonl")
    for path in (path for place in places for path in directory.glob(place)):
        lines = map(json.loads, path.read_text().splitlines())
        return min((line["step"] for line in lines if line["time"] >= since), default=None)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs in all")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments")
    parser.add_argument("--directory", type=Path, default=REPOSITORY / "outputs/chaos", help="of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page that is written")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what is running
    campaign = Campaign(arguments.directory, arguments.seed)
    campaign.go_on(arguments.kills)
    text, sound = page(campaign)
    arguments.results.write_text(text)
    print(f"{arguments.results}: {'nothing lost, left or different' if sound else 'NOT as it should be'}")
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
