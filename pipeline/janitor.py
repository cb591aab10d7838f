"""Leaves nothing behind: what a run started or created is gone soon after its driver, however that ended.

    driver --pipe--> janitor (own process and session): follows the run's processes and what they share
       `--the pipe closes: the run is over, or the driver was killed--> kill, remove, keep Ray's logs, exit

A process belongs to a run when it carries the run's mark in its environment, or was started by one that
does. Everything temporary lies in one directory, which also says what the run has in shared memory: should
the janitor itself be killed, the driver tidies up, and if both were, the next run on this machine does.

Owns: the run's temporary directory, the end of its processes. Does not own: who starts them (executor).
Light import: psutil and the standard library, for it starts before everything else.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import psutil

from pipeline.signals import deaf
from rollout.run_mark import RUN_ID_VARIABLE, WEIGHTS_PREFIX
from rollout.shared_memory import SHARED_MEMORY, files, mapped_by

PREFIX = "rlhf-"
PLACE = Path("/tmp")
"""Not $TMPDIR: paths of Ray's sockets may have 107 bytes."""
OWNER_LOCK = "owner.lock"
SHARED_FILES = "shared-memory.txt"
TEMPORARY = "tmp"
LOOK_EVERY_S = 0.5
NUM_LOOKS = 6
"""A file in shared memory that no process of the run has mapped after so many looks is somebody else's."""
SETTLED_S = 10.0
"""A younger process may yet take the run's mark: Ray's workers start as a helper that becomes the worker."""
TRACKER_GRACE_S = 3.0
"""Python's resource trackers outlive the processes they tidy up after, by this much at most."""
KILL_TIMEOUT_S = 8.0
SWEEP_TIMEOUT_S = 30.0
SENT_TO_EVERYBODY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""By a terminal or a scheduler; the janitor outlives them."""


@contextlib.contextmanager
def nothing_left_behind(log_dir: Path | None) -> Iterator[Path]:
    """What this process starts inside is marked, and gone afterwards; yields the run's temporary directory.

    The logs of a Ray session in that directory end in `log_dir`/ray. Survives the SIGKILL of this process.
    """
    tidy_up_after_the_dead()
    directory, lock = _owned_directory()
    janitor = _start(directory, log_dir)
    try:
        with _environment({RUN_ID_VARIABLE: directory.name, "TMPDIR": str(directory / TEMPORARY)}):
            yield directory
    finally:
        with deaf():
            _finish(janitor, directory, log_dir)
            lock.release()


def tidy_up_after_the_dead() -> None:
    """End and remove what runs left whose driver and janitor were both killed: nobody holds their lock."""
    for path in PLACE.glob(f"{PREFIX}*/{OWNER_LOCK}"):
        lock = filelock.FileLock(path)
        with contextlib.suppress(OSError):  # its owner lives, or it was removed just now
            if path.parent.is_symlink() or path.parent.stat().st_uid != os.getuid():
                continue
            lock.acquire(timeout=0)
            try:
                sweep(Run(path.parent, driver=None), log_dir=None)
            finally:
                lock.release()


class Run:
    """The processes of one run on this machine, and the files they have in shared memory."""

    def __init__(self, directory: Path, *, driver: psutil.Process | None) -> None:
        """`driver`: whose children count as the run's when they are younger than this process."""
        self.directory = directory
        self._mark = f"{RUN_ID_VARIABLE}={directory.name}".encode()
        self._driver = driver
        self._since = psutil.Process().create_time()
        self._seen: dict[int, psutil.Process | None] = {os.getpid(): None}  # None: not one of the run
        self._num_looks: dict[Path, int] = {}  # at files in shared memory that are not known to be the run's
        self._shared = _recorded(directory)

    def look(self) -> None:
        """Take notice of new processes, and of what is new in shared memory."""
        pids = psutil.pids()
        for pid in self._seen.keys() - set(pids) - {os.getpid()}:
            del self._seen[pid]
        for pid in pids:
            self._belongs(pid)
        self._attribute(files())

    def processes(self) -> list[psutil.Process]:
        """Those of the last look that still run. The driver is not among them."""
        return [process for process in self._seen.values() if process is not None and _alive(process)]

    def shared_files(self) -> set[Path]:
        """What there is in shared memory of this run, mapped files and directories of weights."""
        weights = SHARED_MEMORY.glob(f"{WEIGHTS_PREFIX}{self.directory.name}-*")
        return {path for path in self._shared if path.exists()} | set(weights)

    def may_end_by_itself(self, process: psutil.Process) -> bool:
        """Whether it is a resource tracker: those remove what the processes they serve were killed with."""
        with contextlib.suppress(psutil.Error):
            return any("resource_tracker" in part for part in process.cmdline())
        return False

    def serves_the_driver(self, process: psutil.Process) -> bool:
        """Whether it is the resource tracker of a driver that lives on, and ends with it."""
        with contextlib.suppress(psutil.Error):
            return self._is_driver(process.ppid()) and self.may_end_by_itself(process)
        return False

    def _belongs(self, pid: int) -> bool:
        if pid not in self._seen:
            try:
                process = psutil.Process(pid)
                ours = self._is_ours(process)
                if not ours and time.time() - process.create_time() < SETTLED_S:
                    return False
            except psutil.NoSuchProcess:
                return False
            self._seen[pid] = process if ours else None
        return self._seen[pid] is not None

    def _is_ours(self, process: psutil.Process) -> bool:
        if self._is_driver(process.pid):
            return False
        if self._mark in _environment_of(process.pid):
            return True
        parent = process.ppid()
        if self._is_driver(parent):
            return process.create_time() >= self._since
        return parent > 1 and self._belongs(parent)

    def _is_driver(self, pid: int) -> bool:
        return self._driver is not None and pid == self._driver.pid and self._driver.is_running()

    def _attribute(self, present: dict[Path, int]) -> None:
        unknown = present.keys() - self._shared
        self._num_looks = {path: self._num_looks.get(path, 0) + 1 for path in unknown}
        new = {path for path in unknown if self._num_looks[path] <= NUM_LOOKS}
        mapped = mapped_by(process.pid for process in self.processes()) if new else set()
        if found := {path for path in new if present[path] in mapped}:
            self._shared |= found
            with contextlib.suppress(OSError), (self.directory / SHARED_FILES).open("a") as record:
                record.writelines(f"{path.name}\n" for path in sorted(found))


def sweep(run: Run, *, log_dir: Path | None) -> None:
    """End the run's processes and remove what they left. Safe to do twice, and by two at once."""
    _kill(run)
    for path in run.shared_files():
        if not _in_use(path):
            _remove(path)
    if log_dir is not None:
        _keep_logs(run.directory, log_dir / "ray")
    shutil.rmtree(run.directory, ignore_errors=True)


def main() -> None:
    """The janitor's process: `directory driver-pid log_dir-or-nothing`, and a pipe as standard input."""
    for number in SENT_TO_EVERYBODY:
        signal.signal(number, signal.SIG_IGN)
    directory, driver, log_dir = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    try:
        process = psutil.Process(driver)
    except psutil.NoSuchProcess:
        process = None
    run = Run(directory, driver=process)
    while not select.select([sys.stdin], [], [], LOOK_EVERY_S)[0]:
        run.look()
    sweep(run, log_dir=Path(log_dir) if log_dir else None)


def _owned_directory() -> tuple[Path, filelock.BaseFileLock]:
    """A new directory and its lock. It has its name only when it is locked: it never looks abandoned."""
    unlocked = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=PLACE))
    (unlocked / TEMPORARY).mkdir()
    lock = filelock.FileLock(unlocked / OWNER_LOCK)
    lock.acquire()
    return unlocked.rename(unlocked.with_name(unlocked.name.removeprefix("."))), lock


def _start(directory: Path, log_dir: Path | None) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", "pipeline.janitor", str(directory), str(os.getpid())]
    return subprocess.Popen(
        [*command, str(log_dir or "")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the driver's group must not end it
    )


def _finish(janitor: "subprocess.Popen[bytes]", directory: Path, log_dir: Path | None) -> None:
    assert janitor.stdin is not None
    janitor.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        if janitor.wait(SWEEP_TIMEOUT_S) == 0:
            return
    janitor.kill()
    sweep(Run(directory, driver=psutil.Process()), log_dir=log_dir)


def _kill(run: Run) -> None:
    """All of the run's processes: the killed leave their parents no time to start others."""
    started = time.monotonic()
    while time.monotonic() - started < KILL_TIMEOUT_S:
        run.look()
        left = [process for process in run.processes() if not run.serves_the_driver(process)]
        if not left:
            return
        patient = time.monotonic() - started < TRACKER_GRACE_S
        for process in left:
            with contextlib.suppress(psutil.Error):
                if not (patient and run.may_end_by_itself(process)):
                    process.kill()
        psutil.wait_procs(left, timeout=0.2)


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _environment_of(pid: int) -> set[bytes]:
    """What it was started with; nothing where that may not be read."""
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def _in_use(path: Path) -> bool:
    """Whether a process that is not the run's has it mapped too."""
    with contextlib.suppress(OSError):
        return path.stat().st_ino in mapped_by(psutil.pids())
    return False


def _recorded(directory: Path) -> set[Path]:
    try:
        names = (directory / SHARED_FILES).read_text().splitlines()
    except OSError:
        return set()
    return {SHARED_MEMORY / name for name in names if name and "/" not in name}


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _keep_logs(directory: Path, target: Path) -> None:
    paths = [path for path in directory.glob("session_2*/logs/*") if path.is_file() and path.stat().st_size]
    if paths:
        with contextlib.suppress(OSError):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for path in paths:
                shutil.copyfile(path, target / path.name)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set for what is started inside; this process computes its own temporary directory anew as well."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    tempfile.tempdir = None
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        tempfile.tempdir = None


if __name__ == "__main__":
    main()
