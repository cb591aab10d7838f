"""What is left of a run whose driver, or driver and janitor, were killed: nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from fake_chain import wait_for

from pipeline.janitor import PLACE, nothing_left_behind, tidy_up_after_the_dead

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
DRIVER = """
import subprocess, sys, time
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from pipeline.janitor import nothing_left_behind
from rollout.run_mark import weights_prefix

CHILD = '''
import sys, tempfile, time
from multiprocessing import get_context, resource_tracker
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=64)
lock = get_context("spawn").Lock()
resource_tracker.unregister(memory._name, "shared_memory")  # as when its tracker was killed too
resource_tracker.unregister(lock._semlock.name, "semaphore")
open(sys.argv[1], "w").write(f"{memory.name} {lock._semlock.name.strip('/')} {tempfile.mkdtemp()}")
time.sleep(300)
'''

where = Path(sys.argv[1])
if __name__ == "__main__":
    with nothing_left_behind(where) as directory:
        weights = Path("/dev/shm") / f"{weights_prefix()}x"
        weights.mkdir()
        logs = directory / "session_2/logs"
        logs.mkdir(parents=True)
        (logs / "raylet.out").write_text("the raylet's last words")
        for index in range(2):  # in sessions of their own, and the first one stopped
            command = [sys.executable, "-c", CHILD, str(where / f"child-{index}")]
            subprocess.Popen(command, start_new_session=True)
        while not all((where / f"child-{index}").exists() for index in range(2)):
            time.sleep(0.05)
        time.sleep(1.2)
        (where / "ready").write_text(f"{directory} {weights}")
        if "end" not in sys.argv:
            time.sleep(300)
"""


class Left:
    """What a driver made, by path, and the processes it started."""

    def __init__(self, driver: subprocess.Popen, where: Path) -> None:
        family = psutil.Process(driver.pid).children(recursive=True)
        (self.janitor,) = [child for child in family if "pipeline.janitor" in child.cmdline()]
        self.processes = [child for child in family if child != self.janitor]
        self.paths = [Path(name) for name in (where / "ready").read_text().split()]
        for index in range(2):
            memory, semaphore, temporary = (where / f"child-{index}").read_text().split()
            self.paths += [Path("/dev/shm", memory), Path("/dev/shm", f"sem.{semaphore}"), Path(temporary)]

    def is_gone(self) -> bool:
        return not any(map(runs, self.processes)) and not any(path.exists() for path in self.paths)


def runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.05)
    return condition()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), *arguments], cwd=ROOT)
        started.append(driver)
        return driver

    yield start
    for driver in started:
        driver.kill()
        driver.wait()


@pytest.fixture
def made(start: Callable[..., subprocess.Popen], tmp_path: Path) -> tuple[subprocess.Popen, Left]:
    """A driver in the middle of its work, and what it has made."""
    driver = start()
    wait_for(tmp_path / "ready")
    left = Left(driver, tmp_path)
    assert len(left.processes) >= 2 and all(path.exists() for path in left.paths)
    return driver, left


def test_after_a_kill_of_the_driver_no_process_shared_memory_or_directory_is_left(made, tmp_path):
    driver, left = made
    left.processes[0].suspend()
    driver.kill()
    driver.wait()
    assert within(10, left.is_gone), left.paths
    assert within(10, lambda: not runs(left.janitor))
    assert (tmp_path / "ray/raylet.out").read_text() == "the raylet's last words"


def test_signals_that_go_to_everybody_do_not_end_the_janitor(made):
    driver, left = made
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        left.janitor.send_signal(number)
    time.sleep(0.2)
    assert runs(left.janitor)
    driver.kill()
    assert within(10, left.is_gone)


def test_when_driver_and_janitor_are_killed_the_next_run_tidies_up(made):
    driver, left = made
    left.janitor.kill()
    driver.kill()
    driver.wait()
    assert not left.is_gone()
    with nothing_left_behind(log_dir=None):
        assert left.is_gone()


def test_when_the_janitor_is_killed_the_driver_tidies_up_itself(start, tmp_path):
    driver = start("end")
    wait_for(tmp_path / "child-1")
    (janitor,) = [one for one in psutil.Process(driver.pid).children() if "pipeline.janitor" in one.cmdline()]
    time.sleep(0.6)
    janitor.kill()
    assert driver.wait(60) == 0
    directory, weights = (tmp_path / "ready").read_text().split()
    assert not Path(directory).exists() and not Path(weights).exists()


def test_what_others_have_in_shared_memory_and_their_directories_stay():
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(create=True, size=64)
    try:
        with nothing_left_behind(log_dir=None) as directory:
            tidy_up_after_the_dead()
            assert directory.exists(), "its owner lives"
            bystander = subprocess.Popen(["sleep", "60"], env={}, start_new_session=True)
            ours = psutil.Process(bystander.pid)
            time.sleep(0.7)
        assert not runs(ours), "a child of the driver belongs to the run, whatever its environment says"
        assert Path("/dev/shm", memory.name).exists()
        bystander.wait()
    finally:
        memory.close()
        memory.unlink()
    assert not directory.exists()


def test_the_environment_is_as_before_afterwards():
    before = dict(os.environ)
    with nothing_left_behind(log_dir=None) as directory:
        assert os.environ["RLHF_RUN_ID"] == directory.name
        assert Path(os.environ["TMPDIR"]).parent == directory
        assert directory.parent == PLACE
    assert dict(os.environ) == before
