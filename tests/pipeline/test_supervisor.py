"""`rlhf run --retries`: the real command on fake stages, crashing to order."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_chain import FAKE_CLI, Chain, wait_for

from pipeline.supervisor import _without_retries

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
QUICK = "pipeline.retry_wait_s=0.05"


def lines_of(stderr: str) -> list[str]:
    """What the supervisor said."""
    return [line for line in stderr.splitlines() if line.startswith("supervisor: ")]


def the_run(supervisor: subprocess.Popen) -> psutil.Process:
    (child,) = psutil.Process(supervisor.pid).children()
    return child


def test_a_killed_run_is_started_again_and_goes_on(chain: Chain):
    chain.order("sft", kill=True)  # inline: the driver itself
    code, stdout, stderr = chain.cli("run", "demo.yaml", QUICK, "--until", "sft", "--retries", "3")
    assert (code, chain.calls()) == (0, ["prepare", "pretrain", "sft", "sft"])
    assert stderr == "supervisor: the run was killed (SIGKILL); restart 1 of 3 in 0.05 s\n"
    assert chain.summary()["sft"]["metrics"]["first_step"] == 3
    assert "report: outputs/runs/demo/report.html" in stdout


@pytest.mark.parametrize(("error", "code"), [("TrainingStopped", 5), ("DataError", 3)])
def test_what_another_try_cannot_mend_is_not_tried_again(chain: Chain, error: str, code: int):
    chain.order("sft", error=error)
    ended, _, stderr = chain.cli("run", "demo.yaml", QUICK, "--retries", "3")
    assert (ended, chain.calls()) == (code, ["prepare", "pretrain", "sft"])
    assert lines_of(stderr) == []


def test_three_crashes_without_a_new_step_end_it_with_the_reason_and_the_code(chain: Chain):
    chain.order("sft", error="OSError")
    code, _, stderr = chain.cli("run", "demo.yaml", QUICK, "--retries", "9")
    assert code == 4
    assert chain.calls() == ["prepare", "pretrain", "sft", "sft", "sft", "sft"]
    assert lines_of(stderr) == [
        "supervisor: the run ended with exit code 4; restart 1 of 9 in 0.05 s",  # two stages were finished
        "supervisor: the run ended with exit code 4; restart 2 of 9 in 0.05 s",
        "supervisor: the run ended with exit code 4; restart 3 of 9 in 0.1 s",
        "supervisor: the run ended with exit code 4, 3 times in a row without a new step; giving up",
    ]


def test_restarts_are_counted(chain: Chain):
    chain.order("prepare", error="ValueError")
    code, _, stderr = chain.cli("run", "demo.yaml", QUICK, "--retries=1")
    assert (code, chain.calls()) == (1, ["prepare", "prepare"])
    assert lines_of(stderr) == [
        "supervisor: the run ended with exit code 1; restart 1 of 1 in 0.05 s",
        "supervisor: the run ended with exit code 1; 1 restarts are used up",
    ]


def test_a_mistake_in_the_config_is_told_before_anything_starts(chain: Chain):
    code, _, stderr = chain.cli("run", "demo.yaml", "sft.lrr=1", "--retries", "3")
    assert code == 2
    assert stderr.count("\n") == 1 and "lrr" in stderr


@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_is_passed_on_once_and_ends_the_restarts(chain: Chain, to_all: bool):
    chain.order("sft", sleep_s=100)
    supervisor = chain.start("run", "demo.yaml", QUICK, "--retries", "3")
    wait_for(chain.control / "sft.sleeping")
    if to_all:  # Ctrl-C in a terminal
        os.killpg(supervisor.pid, signal.SIGINT)
    else:
        supervisor.send_signal(signal.SIGTERM)
    _, stderr = supervisor.communicate(timeout=60)
    assert (supervisor.returncode, stderr) == (
        75,
        "sft: stopped after step 2; run the same command to go on\n",
    )


def test_a_signal_while_it_waits_to_restart_ends_it(chain: Chain):
    chain.order("sft", kill=True)
    supervisor = chain.start("run", "demo.yaml", "pipeline.retry_wait_s=300", "--retries", "3")
    assert supervisor.stderr is not None and "restart 1 of 3" in supervisor.stderr.readline()
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(30) == 75


def test_when_the_supervisor_is_killed_its_run_ends_too(chain: Chain):
    chain.order("sft", sleep_s=100, stubborn=True)
    supervisor = chain.start("run", "demo.yaml", "--retries", "3")
    wait_for(chain.control / "sft.sleeping")
    run = the_run(supervisor)
    family = [run, *run.children(recursive=True)]
    supervisor.kill()
    supervisor.communicate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(runs, family)):
        time.sleep(0.05)
    assert not any(map(runs, family)), family


def test_the_supervisor_loads_neither_ray_nor_torch(chain: Chain):
    """At the moment when it starts a child, that is with everything it ever loads."""
    program = """
import sys
from pipeline import supervisor
from pipeline.cli import main

def run(self, command):
    print(sorted({"torch", "ray", "transformers", "vllm", "datasets"} & sys.modules.keys()))
    return 0

supervisor._Child.run = run
main(sys.argv[1:])
"""
    answer = subprocess.run(
        [sys.executable, "-c", program, "run", "demo.yaml", "--retries", "1"],
        cwd=chain.directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "[]\n"


def test_a_finished_run_is_not_started_again_for_what_it_could_not_print(chain: Chain):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [
                sys.executable,
                "-c",
                FAKE_CLI,
                "run",
                "demo.yaml",
                QUICK,
                "--until",
                "prepare",
                "--retries",
                "1",
            ],
            cwd=chain.directory,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (ended.returncode, chain.calls()) == (4, ["prepare"])
    assert ended.stderr == b"standard output: No space left on device; make room, or send it elsewhere\n"


def test_the_child_gets_the_same_command_but_for_the_retries():
    command = ["python", "rlhf", "run", "--retries", "3", "demo.yaml", "sft.lr=1", "--until", "sft"]
    assert _without_retries(command) == ["python", "rlhf", "run", "demo.yaml", "sft.lr=1", "--until", "sft"]
    assert _without_retries(["rlhf", "run", "demo.yaml", "--retries=3"]) == ["rlhf", "run", "demo.yaml"]


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
