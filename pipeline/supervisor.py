"""`rlhf run --retries N`: runs the same command as a child, and again after a crash.

    supervise --> child (the run) --exit code--> 0, 2, 3, 5, 75: passed on; 74: done, its output lost
                    ^                       `--> 1, 4, a signal: any new step? --> give up
                    `------------- wait ------------------------------------'

Owns: when a run is started again, and that its child does not outlive it. Does not own: what a run does.
No Ray, no torch: what restarts a run must not fall with it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.signals import ending_signals
from rollout.ground.errors import EnvironmentProblem

SUPERVISOR_VARIABLE = "RLHF_SUPERVISOR"
"""In a child's environment: the process that watches it."""
PR_SET_PDEATHSIG = 1
CRASHES = (1, EnvironmentProblem.exit_code)
DISPLAY_LOST = 74
"""Exit code of a child that did all it should, while standard output took no more: nothing to start again."""
INTERRUPTED = 75
MAX_WITHOUT_PROGRESS = 3
MAX_WAIT_S = 300.0
COMMITTED = (
    "artifacts/*/manifest.json",
    "work/*/checkpoints/step-*[0-9]",
    "work/*/journal/*.rollouts",
    "work/*/blocks-*/*.json",
)
"""Below `outputs`: what there is more of after a step, or a block of prepare, was committed."""


def end_with_the_supervisor() -> bool:
    """Called by every command first of all: a supervisor's child is killed when its supervisor is. Whether
    this is one.
    """
    if SUPERVISOR_VARIABLE not in os.environ:
        return False
    supervisor = int(os.environ.pop(SUPERVISOR_VARIABLE))  # this process's own, and none of its children's
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def supervise(outputs: Path, *, retries: int, wait_s: float) -> int:
    """Run this process's own command as a child until it ends for good; the exit code to end with.

    Starts it again `retries` times at most, after `wait_s`, doubled for every execution in a row that
    committed nothing, but for the first. Three such ones end it too. SIGINT, SIGTERM and SIGHUP go to the
    child, and are the end of restarts.
    """
    with _Child() as child:
        committed, num_idle = _committed(outputs), 0
        for attempt in range(retries + 1):
            code = child.run(_without_retries([sys.executable, *sys.orig_argv[1:]]))
            if child.told_to_end or (code >= 0 and code not in CRASHES):
                break
            before, committed = committed, _committed(outputs)
            num_idle = 0 if committed - before else num_idle + 1
            if num_idle == MAX_WITHOUT_PROGRESS:
                _say(f"{_ended(code)}, {num_idle} times in a row without a new step; giving up")
                break
            if attempt == retries:
                _say(f"{_ended(code)}; {retries} restarts are used up")
                break
            pause = min(wait_s * 2 ** max(0, num_idle - 1), MAX_WAIT_S)
            _say(f"{_ended(code)}; restart {attempt + 1} of {retries} in {pause:g} s")
            if child.told_to_end_within(pause):
                return INTERRUPTED
        if child.told_to_end and code < 0:  # before it could say so itself
            return INTERRUPTED
    return code if code >= 0 and code != DISPLAY_LOST else EnvironmentProblem.exit_code


class _Child:
    """One child at a time, and the signals that are meant for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._told = threading.Event()
        self._signal = signal.SIGTERM

    @property
    def told_to_end(self) -> bool:
        """Whether somebody wants the run to end."""
        return self._told.is_set()

    def told_to_end_within(self, seconds: float) -> bool:
        """Wait for it."""
        return self._told.wait(seconds)

    def run(self, command: Sequence[str]) -> int:
        """The child's exit code; negative: the signal that killed it."""
        self._process = subprocess.Popen(
            command,
            env=os.environ | {SUPERVISOR_VARIABLE: str(os.getpid())},
            process_group=0,  # else a terminal's Ctrl-C would reach it twice
        )
        if self.told_to_end:  # just before there was a process to tell
            self._process.send_signal(self._signal)
        return self._process.wait()

    def __enter__(self) -> "_Child":
        self._before = {number: signal.signal(number, self._pass_on) for number in ending_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _: Any) -> None:
        self._signal = signal.Signals(number)
        self._told.set()
        if self._process is not None:
            self._process.send_signal(number)  # nothing happens to one that has ended


def _without_retries(command: Sequence[str]) -> list[str]:
    """The same command, not supervised."""
    kept: list[str] = []
    parts = iter(command)
    for part in parts:
        if part == "--retries":
            next(parts)
        elif not part.startswith("--retries="):
            kept.append(part)
    return kept


def _committed(outputs: Path) -> set[tuple[str, int]]:
    """What was committed so far, by path and inode: a step that is saved again is another directory."""
    found = set()
    for path in (path for pattern in COMMITTED for path in outputs.glob(pattern)):
        with contextlib.suppress(OSError):
            found.add((str(path), path.stat().st_ino))
    return found


def _ended(code: int) -> str:
    return (
        f"the run ended with exit code {code}"
        if code >= 0
        else f"the run was killed ({signal.Signals(-code).name})"
    )


def _say(text: str) -> None:
    print(f"supervisor: {text}", file=sys.stderr, flush=True)
