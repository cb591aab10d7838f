"""Disks that are full, read-only, in use or gone: one line, code 4, and nothing that was finished is lost.

The disks are real: a small tmpfs in a mount namespace of its own; where the machine lets us mount nothing,
the kernel's limit on the size of files stands in.
"""

import ctypes
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_chain import Chain
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_cli import complaint, rlhf

from pipeline.artifacts import Store
from pipeline.manifest import MANIFEST
from pipeline.stage_task import as_expected
from rollout.ground.errors import EnvironmentProblem
from rollout.weight_file import WeightFileWriter

pytestmark = pytest.mark.process

NAMESPACE = ["unshare", "--map-root-user", "--mount"]
MAY_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(
        [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], stderr=subprocess.DEVNULL, check=False
    ).returncode
    == 0
)
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
IN_PROCESS = """
import contextlib, io, json, os, resource, sys
from dataclasses import replace
from pathlib import Path
from pipeline import stage_table
for name, stage in stage_table.STAGES.items():
    stage_table.STAGES[name] = replace(stage, recipe=stage_table.Recipe(entry="fake_stages:run"))
from pipeline.cli import main

def run(*arguments):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(["run", "demo.yaml", *arguments])
        except SystemExit as end:
            return [end.code, err.getvalue()]
"""
FULL_DISK = """
def leave(pages):
    ballast = Path("outputs/ballast")
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, max(0, ballast.stat().st_size // 4096 - pages) * 4096)

ends = []
for pages in range(45):
    leave(pages)
    ends.append(run())
os.unlink("outputs/ballast")
ends.append(run())
print(json.dumps([ends, sorted(str(path) for path in Path("outputs").rglob("*"))]))
"""
LIMITED_FILES = """
ends = []
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for size in (0, 1000, 3000, 8000, 12_000, 16_000, 20_000, 24_000, 28_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    ends.append(run())
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
ends.append(run())
print(json.dumps([ends, sorted(str(path) for path in Path("outputs").rglob("*"))]))
"""


def in_small_disk(chain: Chain, script: str, size: str) -> list:
    """What `script` prints, run with a file system of `size` as `outputs`."""
    command = [sys.executable, "-c", IN_PROCESS + script]
    if MAY_MOUNT and size:
        chain.outputs.mkdir()
        mount = f'mount -t tmpfs -o size={size} none outputs && exec "$@"'
        command = [*NAMESPACE, "sh", "-c", mount, "sh", *command]
    done = subprocess.run(command, cwd=chain.directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("script", "size", "num_places"),
    [(LIMITED_FILES, "", 2), *([(FULL_DISK, "512k", 4)] if MAY_MOUNT else [])],
)
def test_wherever_the_disk_gets_full_it_is_one_line_and_the_same_command_ends_well(
    chain: Chain, script: str, size: str, num_places: int
):
    ends, files = in_small_disk(chain, script, size)
    *while_full, at_last = ends
    assert at_last == [0, ""]
    assert {code for code, _ in while_full} <= {0, 4} and while_full[0][0] == 4
    for code, stderr in while_full:
        assert stderr.count("\n") == (code == 4) and "bug" not in stderr, stderr
    assert len({stderr for _, stderr in while_full if stderr}) >= num_places, while_full
    calls = chain.calls()
    assert set(calls) == {"prepare", "pretrain", "sft", "reward", "ppo", "evaluate"}
    names = [Path(file).name for file in files]
    assert names.count(MANIFEST) == 6
    assert [name for name in names if name.startswith(".") or name.endswith(".tmp")] == []


def test_a_stage_that_finished_before_the_disk_got_full_is_not_run_again(chain: Chain):
    script = """
first = run("--until", "sft")
with contextlib.suppress(OSError), open("outputs/ballast", "ab", buffering=0) as file:
    while True:
        file.write(bytes(4096))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
full = run()
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
os.unlink("outputs/ballast")
print(json.dumps([first, full, run()]))
"""
    if not MAY_MOUNT:
        script = script.replace("while True", "for _ in range(9)")
    first, full, last = in_small_disk(chain, script, "512k")
    assert first == [0, ""] == last
    assert full[0] == 4
    assert chain.calls() == ["prepare", "pretrain", "sft", "reward", "ppo", "evaluate"]


def no_override() -> None:
    """From here on permissions hold for root too: exec gives no capability outside of the bounding set."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


@pytest.mark.parametrize("part", ["work", "artifacts", "runs/demo"])
def test_outputs_that_may_not_be_written_are_code_4(chain: Chain, part: str):
    assert chain.cli("run", "demo.yaml", "--until", "sft")[0] == 0
    chain.calls()
    target = chain.outputs / part
    target.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", IN_PROCESS + 'print(json.dumps(run("seed=1")))'],
            cwd=chain.directory,
            capture_output=True,
            text=True,
            preexec_fn=no_override,
            check=True,
        )
    finally:
        target.chmod(0o755)
    code, stderr = json.loads(done.stdout)
    assert code == 4 and stderr.count("\n") == 1 and "Permission denied" in stderr and part in stderr


def test_new_outputs_in_a_directory_that_may_not_be_written_are_code_4(chain: Chain):
    sealed = chain.directory / "sealed"
    sealed.mkdir(mode=0o555)
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS + 'print(json.dumps(run("outputs=sealed/outputs")))'],
        cwd=chain.directory,
        capture_output=True,
        text=True,
        preexec_fn=no_override,
        check=True,
    )
    code, stderr = json.loads(done.stdout)
    assert code == 4 and "sealed/outputs" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("where", ["taken", "taken/below", "dangling", "loop", "/proc/nothing/outputs"])
def test_outputs_that_cannot_be_a_directory_are_code_4(chain: Chain, capsys, where: str):
    (chain.directory / "taken").write_text("a file")
    (chain.directory / "dangling").symlink_to("/nowhere/at/all/x")
    (chain.directory / "loop").symlink_to("loop")
    code, stderr = complaint(capsys, "run", "demo.yaml", f"outputs={where}")
    assert code == 4 and where.split("/")[-1] in stderr
    assert (chain.directory / "taken").read_text() == "a file"


@pytest.mark.parametrize("where", ["inline", "ray"])
def test_outputs_that_vanish_under_a_stage_are_code_4(chain: Chain, where: str):
    chain.order("sft", remove=str(chain.outputs))
    code, _, stderr = chain.cli("run", "demo.yaml", f"pipeline.executor={where}")
    assert code == 4, stderr
    assert stderr.count("\n") == 1 and "sft" in stderr and "disappeared" in stderr
    chain.order("sft")
    assert chain.cli("run", "demo.yaml")[0] == 0


def test_two_runs_on_one_stage_do_not_race_the_second_waits_or_is_code_4(chain: Chain, capsys):
    config = chain.config()
    from pipeline.planning import plan_run

    node = plan_run(config, last="prepare").nodes["prepare"]
    with Store(config.outputs).lock("prepare", node.fingerprint, timeout_s=1):
        code, stderr = complaint(capsys, "run", "demo.yaml", "pipeline.lock_timeout_s=0.2")
    assert code == 4 and f"process {os.getpid()}" in stderr and "pipeline.lock_timeout_s" in stderr
    assert rlhf(capsys, "run", "demo.yaml", "--until", "prepare")[0] == 0


@pytest.mark.parametrize("library", ["safetensors", "torch", "python"])
def test_a_full_disk_is_known_as_such_whichever_library_meets_it(tmp_path: Path, library: str):
    weights = torch.zeros(100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises((SafetensorError, RuntimeError, OSError)) as failed:
            if library == "safetensors":
                save_file({"a": weights}, tmp_path / "a.safetensors")
            elif library == "torch":
                with (tmp_path / "a.pt").open("wb") as file:
                    torch.save(weights, file)
            else:
                (tmp_path / "a.txt").write_text("x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = as_expected("sft", failed.value, tmp_path)
    assert isinstance(line, EnvironmentProblem) and "File too large" in str(line)


@pytest.mark.parametrize(
    "number",
    [
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG),
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),  # of a file server
    ],
)
def test_the_disk_is_to_blame_wherever_its_error_hides(tmp_path: Path, number: int):
    wrapped = RuntimeError(f"engine: I/O error: {os.strerror(number)} (os error {number})")
    chained = ValueError("could not save")
    chained.__cause__ = OSError(number, os.strerror(number))
    for error in (OSError(number, os.strerror(number)), wrapped, chained):
        line = as_expected("sft", error, tmp_path)
        assert isinstance(line, EnvironmentProblem) and os.strerror(number) in str(line)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_missing_permission_is_no_bug_unless_it_was_only_met_on_the_way(tmp_path: Path, number: int):
    error = OSError(number, os.strerror(number), "outputs/work/sft-1/metrics.jsonl")
    line = as_expected("sft", error, tmp_path)
    assert isinstance(line, EnvironmentProblem) and "sft-1/metrics.jsonl" in str(line)
    bug = ValueError("a bug")
    bug.__context__ = error
    assert as_expected("sft", bug, tmp_path).exit_code == 1


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path: Path):
    assert as_expected("sft", ValueError("no space in this model"), tmp_path).exit_code == 1
    assert as_expected("sft", FileNotFoundError(2, "No such file", "x"), tmp_path).exit_code == 1


def test_no_space_in_shared_memory_is_one_line_that_names_the_place(tmp_path: Path):
    script = """
import torch
from pathlib import Path
from rollout.errors import EnvironmentProblem
from rollout.weight_file import WeightFileWriter
try:
    with WeightFileWriter(Path("shm/weights.bin")) as writer:
        for index in range(100):
            writer.add(f"layer.{index}", torch.zeros(2**14))
except EnvironmentProblem as error:
    print(error)
"""
    command = [sys.executable, "-c", script]
    (tmp_path / "shm").mkdir()
    if MAY_MOUNT:
        small = 'mount -t tmpfs -o size=1m none shm && exec "$@"'
        command = [*NAMESPACE, "sh", "-c", small, "sh", *command]
    else:
        command = ["sh", "-c", 'ulimit -f 1024 && exec "$@"', "sh", *command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    reason = "No space left on device" if MAY_MOUNT else "File too large"
    assert done.stdout == f"shm/weights.bin: cannot write the weights ({reason}); make room in shm\n"


def test_shared_memory_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(
        EnvironmentProblem, match=r"gone/weights\.bin: cannot write the weights \(No such file"
    ):
        WeightFileWriter(tmp_path / "gone/weights.bin")


def test_a_link_in_the_place_of_the_shared_file_is_not_followed(tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "weights.bin").symlink_to(tmp_path / "mine")
    with pytest.raises(EnvironmentProblem, match="cannot write the weights"):
        WeightFileWriter(tmp_path / "weights.bin")
    assert (tmp_path / "mine").read_text() == "mine"
