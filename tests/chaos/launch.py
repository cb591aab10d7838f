"""One execution of the run's command, and the kill of one of its processes at a planned moment.

    Launch.start --> follow(aim) --the moment, the victim--> SIGKILL --> the driver's end --> what is left?

Owns: seeing a run from outside (processes, files) as an operator could. Nothing of the pipeline is imported:
what the campaign claims does not rest on what it checks.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from aims import Aim

RLHF = Path(sys.executable).with_name("rlhf")
SHARED_MEMORY = Path("/dev/shm")
PROCESS_NAMES = {
    "trainer": "ray::_Training",
    "raylet": "raylet",
    "engine actor": "ray::EngineActo",
    "EngineCore": "VLLM::EngineCor",
    "vLLM worker": "VLLM::Worker",
}
"""As the kernel has them: 15 characters."""
LOOK_EVERY_S = 0.003
FAMILY_EVERY_S = 0.25
END_TIMEOUT_S = 120.0
FINISHED_TIMEOUT_S = 15.0
CLEAN_TIMEOUT_S = 10.0
LIFE_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one kill."""

    killed: float  # time.time()
    inside: bool  # an unfinished checkpoint was there just after the kill
    went_on: bool  # the victim had done its work: the stage finished, and the run goes on
    exit_code: int | None  # of the driver; None: it did not end, or went on
    detect_s: float  # from the kill to the driver's end
    clean_s: float | None  # from the kill until nothing was left; None: not within 10 s of the driver's end
    left: tuple[str, ...]
    last_line: str


class Launch:
    """A running command in `directory`, whose outputs are below it."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self.started = time.time()
        self._log = (directory / "log.txt").open("a+")
        self._log_start = self._log.tell()
        self._shared_before = _shared_memory()
        self._driver = subprocess.Popen(
            [RLHF, "run", *arguments], cwd=directory, stdout=self._log, stderr=self._log
        )
        self._family: dict[int, psutil.Process] = {}
        self._names: dict[int, str] = {}
        self._looked = 0.0
        self._run_directory: Path | None = None

    def wait(self) -> int:
        """To the end of a run that nobody disturbs; its exit code."""
        return self._driver.wait(LIFE_TIMEOUT_S)

    def follow(self, aim: Aim) -> bool:
        """Until the aim's moment has come and its victim is there. False: the stage, or all, ended before."""
        seen = _Moments(self, aim)
        deadline = time.monotonic() + LIFE_TIMEOUT_S
        while self._driver.poll() is None and not self.is_finished(aim.stage):
            assert time.monotonic() < deadline, f"{aim}: nothing happens; {self.directory / 'log.txt'}"
            self._look_around()
            if seen.has_come() and self.victim(aim) is not None:
                time.sleep(aim.delay_s)
                if self._driver.poll() is None and self.victim(aim) is not None:
                    return True
            time.sleep(LOOK_EVERY_S)
        return False

    def kill(self, aim: Aim) -> Outcome:
        """SIGKILL to the victim; wait for the driver, then for everything else, to be gone."""
        victim = self.victim(aim)
        self._look()
        assert victim is not None and self._run_directory is not None, "what is left can be told by its mark"
        killed = time.time()
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
        inside = bool(list(self.directory.glob("outputs/work/*/checkpoints/*.tmp")))
        went_on = not self._ends(aim.stage) and self.is_finished(aim.stage)
        code = self._driver.poll()
        ended = time.time()
        if code is None and not went_on:
            self.end()
        left = [] if went_on else self._left()
        while left and time.time() - ended < CLEAN_TIMEOUT_S:
            time.sleep(0.1)
            left = self._left()
        return Outcome(
            killed=killed,
            inside=inside,
            went_on=went_on,
            exit_code=code,
            detect_s=round(ended - killed, 3),
            clean_s=None if left else round(time.time() - killed, 3),
            left=tuple(left),
            last_line=self.last_line(),
        )

    def _ends(self, stage: str) -> bool:
        """Whether the driver ends after a kill; it has less time when the stage has finished all the same."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while self._driver.poll() is None and time.monotonic() < deadline:
            if self.is_finished(stage):
                deadline = min(deadline, time.monotonic() + FINISHED_TIMEOUT_S)
            time.sleep(0.02)
        return self._driver.poll() is not None

    def end(self) -> None:
        """For the campaign's own end: nothing of this launch goes on."""
        self._driver.kill()
        self._driver.wait()

    def last_line(self) -> str:
        """What the driver said last."""
        self._log.flush()
        lines = (self.directory / "log.txt").read_text()[self._log_start :].splitlines()
        return lines[-1] if lines else ""

    def victim(self, aim: Aim) -> psutil.Process | None:
        """The process to kill, if it is there now."""
        if aim.victim == "driver":
            return psutil.Process(self._driver.pid)
        name = f"ray::{aim.stage}"[:15] if aim.victim == "stage task" else PROCESS_NAMES[aim.victim]
        return self.named(name)

    def named(self, name: str) -> psutil.Process | None:
        """A process of the run by the start of its name."""
        self._look_around()
        for pid, process in self._family.items():
            if self._names[pid].startswith(name):
                with suppress(psutil.NoSuchProcess):
                    if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                        return process
        return None

    def weights_version(self) -> int:
        """Changes with every weight sync that begins."""
        if self._run_directory is None:  # the janitor has not been seen yet
            return 0
        with suppress(OSError):
            paths = SHARED_MEMORY.glob(f"rlhf-weights-{self._run_directory.name}-*/weights.bin")
            return max((path.stat().st_mtime_ns for path in paths), default=0)
        return 0

    def is_finished(self, stage: str) -> bool:
        return any(self.directory.glob(f"outputs/artifacts/{stage}-*"))

    def _look_around(self) -> None:
        """Who belongs to the run changes all the time."""
        if time.monotonic() - self._looked > FAMILY_EVERY_S:
            self._look()

    def _look(self) -> None:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._driver.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    self._family[process.pid] = process
                    self._names[process.pid] = process.name()
                    if self._run_directory is None and "pipeline.janitor" in (line := process.cmdline()):
                        self._run_directory = Path(line[line.index("pipeline.janitor") + 1])
        self._looked = time.monotonic()

    def _left(self) -> list[str]:
        """What must not be there any more: processes, directories, shared memory that nobody has mapped."""
        left = [
            f"process {process.pid} {self._names[process.pid]}"
            for process in self._family.values()
            if _runs(process)
        ]
        if self._run_directory is not None:
            mark = f"RLHF_RUN_ID={self._run_directory.name}".encode()
            left += [f"process {pid}" for pid in psutil.pids() if mark in _environment(pid)]
            left += [str(path) for path in (self._run_directory,) if path.exists()]
            left += map(str, SHARED_MEMORY.glob(f"rlhf-weights-{self._run_directory.name}-*"))
        if new := _shared_memory().items() - self._shared_before.items():
            mapped = _mapped_by_anybody()
            left += [str(path) for path, inode in new if inode not in mapped and path.exists()]
        return left


class _Moments:
    """Counts the occurrences of the aim's moment."""

    def __init__(self, launch: Launch, aim: Aim) -> None:
        self._launch = launch
        self._aim = aim
        self._work = f"outputs/work/{aim.stage}-*"
        self._state: object = None
        self._count = 0
        self._first = True

    def has_come(self) -> bool:
        state = self._look()
        if self._first:
            self._first = False
            self._state = state if self._aim.moment not in ("start", "engine", "end") else None
        if state != self._state and state:
            self._count += 1
        self._state = state
        return self._count >= self._aim.nth

    def _look(self) -> object:
        look: dict[str, Callable[[], object]] = {
            "start": lambda: self._launch.named(f"ray::{self._aim.stage}"[:15]) is not None,
            "engine": lambda: self._launch.named(PROCESS_NAMES["engine actor"]) is not None,
            "step": lambda: self._num_lines(),
            "save": lambda: self._names("checkpoints/*.tmp"),
            "journal": lambda: self._names("journal/*"),
            "sync": lambda: self._launch.weights_version(),
            "end": lambda: self._at_the_last_step(),
        }
        if self._aim.moment == "sync":
            self._launch.named("ray::")  # learns where the run's shared memory is
        return look[self._aim.moment]()

    def _names(self, pattern: str) -> tuple[str, ...]:
        return tuple(sorted(map(str, self._launch.directory.glob(f"{self._work}/{pattern}"))))

    def _lines(self) -> list[str]:
        for path in self._launch.directory.glob(f"{self._work}/metrics.jsonl"):
            with suppress(OSError):
                return path.read_text().splitlines()
        return []

    def _num_lines(self) -> int:
        return len(self._lines())

    def _at_the_last_step(self) -> bool:
        lines = self._lines()
        match = re.search(r'"step": (\d+), "max_steps": (\d+)', lines[-1]) if lines else None
        return match is not None and match[1] == match[2]


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _environment(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def _shared_memory() -> dict[Path, int]:
    found = {}
    for path in SHARED_MEMORY.iterdir():
        with suppress(OSError):
            if path.is_file() and path.stat().st_uid == os.getuid():
                found[path] = path.stat().st_ino
    return found


def _mapped_by_anybody() -> set[int]:
    inodes = set()
    for pid in psutil.pids():
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            inodes |= {int(line.split()[4]) for line in lines if " /dev/shm/" in line}
    return inodes
