"""A forked process of the tests is its caller's child, as a spawned one would be, and inherits the same."""

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection

import pytest
from forks import ForkServer

pytestmark = pytest.mark.process
SPAWN = multiprocessing.get_context("spawn")


def tell(told: Connection, depth: int) -> None:
    """What this process finds, and after it what a process finds that it spawns."""
    told.send((os.getpid(), os.getppid(), os.environ["SAID"], os.getcwd(), "fractions" in sys.modules))
    if depth:
        os.environ["SAID"] = "by the first"
        spawned = SPAWN.Process(target=tell, args=(told, depth - 1))
        spawned.start()
        spawned.join()
        sys.exit(spawned.exitcode)
    sys.exit(7)


def test_a_fork_has_parent_environment_directory_and_end_of_a_spawned_process_and_so_has_what_it_spawns(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("SAID", "by the test")
    monkeypatch.chdir(tmp_path)
    told, end = SPAWN.Pipe(duplex=False)
    with ForkServer(("fractions",)).forking():
        process = SPAWN.Process(target=tell, args=(end, 1))
        process.start()
    process.join(60)
    first, second = told.recv(), told.recv()
    assert first == (process.pid, os.getpid(), "by the test", str(tmp_path), True)
    assert second[1:] == (process.pid, "by the first", str(tmp_path), True)
    assert process.exitcode == 7, "of the second, through the first"
