"""What a person sees of a run: a live line per stage on a terminal, elsewhere a plain line per logged step.

    recipe --append--> work/<stage>-<fp>/metrics.jsonl <--tail-- Progress --> terminal | pipe

Owns: following metrics.jsonl and wording the lines. Reads files only: the same for stages on another machine.
"""

import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.yaml_nodes import short
from stages.training.metrics import step_line

KEY_METRICS = (
    "loss",
    "score",
    "kl",
    "accuracy",
    "margin",
    "policy_loss",
    "value_loss",
    "length",
    "tokens_per_second",
    "lr",
)
"""What is shown of a step, the most telling first, by the name after the slash."""
NUM_SHOWN = 4
POLL_S = 0.3
BAR_CHARS = 20
MAX_LINE_CHARS = 400  # a name may hold text of a dataset, and goes to a terminal


class Progress:
    """Follows the stages of one run, on a thread of its own while it is entered.

    Example:
        with Progress() as progress:
            progress.start("sft", [work_dir / "metrics.jsonl", artifact / "metrics.jsonl"], warnings)
            progress.end("sft", "done", seconds=21.4)
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._console = Console(file=self._stream, highlight=False)
        self._stages: dict[str, _Followed] = {}
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def note(self, text: str) -> None:
        """A line of its own."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def start(self, stage: str, metrics: list[Path], warnings: Path | None) -> None:
        """Follow the first of `metrics` that exists (the unfinished file, later the published one), and what
        is added to `warnings` from now on.
        """
        with self._lock:
            self._stages[stage] = _Followed(paths=metrics, warnings=warnings)
        if self._live is None:
            self.note(f"{stage}: running")

    def end(self, stage: str, outcome: str, *, seconds: float | None = None, summary: str = "") -> None:
        """The stage is over: "done", "skipped", "failed" or "not run"."""
        self.poll()
        with self._lock:
            followed = self._stages.setdefault(stage, _Followed(paths=[], warnings=None))
        followed.outcome = " ".join(
            part for part in (outcome, "" if seconds is None else f"in {duration(seconds)}", summary) if part
        )
        if self._live is None:
            self.note(f"{stage}: {followed.outcome}")
        self.poll()

    def poll(self) -> None:
        """Show what was logged since the last call."""
        with self._lock:
            for stage, followed in self._stages.items():
                for warning in followed.new_warnings():
                    self.note(warning)
                for line in followed.new_lines():
                    if self._live is None:
                        self.note(f"{stage}: {followed.position(line)} {shown(line)}")
            if self._live is not None:
                self._live.update(self._table(), refresh=True)

    def _follow(self) -> None:
        while not self._over.wait(POLL_S):
            self.poll()

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for stage, followed in self._stages.items():
            table.add_row(stage, *followed.cells())
        return table


@dataclass(kw_only=True)
class _Followed:
    """One stage that is being followed."""

    paths: list[Path]
    warnings: Path | None
    started: float = field(default_factory=time.time)
    offset: int = 0
    inode: int | None = None
    first: Mapping[str, Any] | None = None
    last: Mapping[str, Any] | None = None
    outcome: str = ""

    warned: int = 0  # bytes of `warnings` that were told, by this execution or an earlier one

    def __post_init__(self) -> None:
        if self.warnings is not None and self.warnings.is_file():
            self.warned = self.warnings.stat().st_size

    def new_warnings(self) -> Iterator[str]:
        """Whole lines that this execution wrote since the last call."""
        try:
            content = self.warnings.read_bytes() if self.warnings is not None else b""
        except OSError:  # there are none yet, or the disk does not answer: the next call tries again
            return
        whole = content[self.warned : content.rfind(b"\n") + 1]
        self.warned += len(whole)
        yield from whole.decode(errors="replace").splitlines()

    def new_lines(self) -> Iterator[Mapping[str, Any]]:
        """Whole lines that this execution appended since the last call."""
        try:
            path = next((path for path in self.paths if path.is_file()), None)
            if path is None or self.outcome:
                return
            content, inode = path.read_bytes(), path.stat().st_ino
        except OSError:  # published in between, or the disk does not answer: the next call tries again
            return
        if inode != self.inode:  # cut back by a resume: another file, under the same name
            self.inode, self.offset = inode, 0
        whole = content[self.offset : content.rfind(b"\n") + 1]
        self.offset += len(whole)
        for text in whole.splitlines():
            line = _timed(text)
            if line is None or not self.started <= line["time"] < math.inf:
                continue
            if self.last is None or line["step"] > self.last["step"]:
                self.first = self.first or line
                self.last = line
                yield line

    def position(self, line: Mapping[str, Any]) -> str:
        """Step, speed and time left."""
        assert self.first is not None
        parts = [
            f"step {line['step']}/{line['max_steps']}" if "max_steps" in line else f"step {line['step']}"
        ]
        steps, seconds = line["step"] - self.first["step"], line["time"] - self.first["time"]
        if steps and seconds > 0:
            parts.append(f"{steps / seconds:.2f} steps/s")
            if line.get("max_steps", 0) > line["step"]:
                parts.append(f"{duration((line['max_steps'] - line['step']) * seconds / steps)} left")
        return " ".join(parts)

    def cells(self) -> tuple[str, str, str]:
        """Bar, position and metrics of the live line."""
        if self.outcome:
            return ("", self.outcome, "")
        if self.last is None:
            return ("", f"starting, {duration(time.time() - self.started)}", "")
        done = (
            round(BAR_CHARS * self.last["step"] / self.last["max_steps"]) if "max_steps" in self.last else 0
        )
        return ("━" * done + "─" * (BAR_CHARS - done), self.position(self.last), shown(self.last))


def _timed(text: bytes) -> Mapping[str, Any] | None:
    """The step in a line; None where damage left none that could be followed."""
    line = step_line(text)
    if line is None or not isinstance(line.get("time"), int | float):
        return None
    max_steps = line.get("max_steps", 1)
    return line if isinstance(max_steps, int) and max_steps > 0 else None


def shown(line: Mapping[str, Any]) -> str:
    """The few metrics of a step that fit on a line, e.g. "loss 2.31 lr 0.001"; those that are no numbers do
    not.
    """
    metrics = {key: value for key, value in line.items() if "/" in key and isinstance(value, int | float)}
    names = {key.partition("/")[2]: value for key, value in reversed(metrics.items())}
    chosen = [name for name in KEY_METRICS if name in names][:NUM_SHOWN]
    chosen += [name for name in reversed(names) if name not in chosen][: NUM_SHOWN - len(chosen)]
    return short(" ".join(f"{name} {number(names[name])}" for name in chosen), MAX_LINE_CHARS)


def number(value: float) -> str:
    """Four significant digits, large numbers with separators."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """E.g. "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
