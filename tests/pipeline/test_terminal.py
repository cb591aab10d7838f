"""What a command prints, to readers that leave, full disks and encodings without our marks."""

import os
import signal
import subprocess
import sys

import pytest
from fake_chain import FAKE_CLI, Chain, wait_for

pytestmark = pytest.mark.process

RUN = ("run", "demo.yaml", "--until", "pretrain")


def in_shell(chain: Chain, text: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """`rlhf ...` in a line of bash, with pipes that fail as one of their commands does."""
    line = text.replace("rlhf", f'"{sys.executable}" -c "$FAKE_CLI"')
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=chain.directory,
        env=os.environ | {"FAKE_CLI": FAKE_CLI} | environment,
        capture_output=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("reader", ["head -1", "true", "(sleep 0.2; exec 0<&-)"])
def test_a_reader_that_leaves_ends_the_display_and_not_the_run(chain: Chain, reader: str):
    ended = in_shell(chain, f"rlhf {' '.join(RUN)} | {reader}")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert list(chain.summary()) == chain.calls() == ["prepare", "pretrain"]


@pytest.mark.parametrize(
    ("command", "code"),
    [("check demo.yaml", 0), ("--help", 0), ("schema", 0), ("check demo.yaml sft.lrr=1", 2)],
)
def test_without_a_reader_every_command_ends_with_its_own_code(chain: Chain, command: str, code: int):
    ended = in_shell(chain, f"rlhf {command} | true")
    assert ended.returncode == code
    assert ended.stderr.count(b"\n") == (code != 0)


def test_a_reader_of_errors_that_leaves_changes_no_code(chain: Chain):
    assert in_shell(chain, "rlhf check demo.yaml sft.lrr=1 2>&1 >/dev/null | true").returncode == 2


@pytest.mark.parametrize("command", [" ".join(RUN), "check demo.yaml", "schema", "--help"])
def test_a_full_disk_behind_the_output_is_code_4_and_one_line(chain: Chain, command: str):
    ended = in_shell(chain, f"rlhf {command} > /dev/full")
    assert ended.returncode == 4
    assert ended.stderr == b"standard output: No space left on device; make room, or send it elsewhere\n"
    if command.startswith("run"):  # which is as good as it would be elsewhere
        assert list(chain.summary()) == ["prepare", "pretrain"]


def test_a_closed_output_takes_nothing_and_no_file_gets_what_is_printed(chain: Chain):
    ended = in_shell(chain, f"rlhf {' '.join(RUN)} >&- 2>&-")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    printed = [
        path for path in chain.directory.rglob("*") if path.is_file() and b"running\n" in path.read_bytes()
    ]
    assert printed == []


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_an_output_gets_marks_for_what_its_encoding_lacks(chain: Chain, encoding: str):
    (chain.directory / "sft.jsonl").write_text('{"prompt": "häß →", "completion": "日本 🙂"}\n' * 12)
    ended = in_shell(chain, "rlhf check demo.yaml", PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stderr) == (0, b"")
    text = ended.stdout.decode(encoding)
    assert ("日本" in text) == (encoding == "utf-8") and ("?" in text) == (encoding != "utf-8")


def test_a_name_that_is_not_utf_8_is_shown_by_its_bytes(chain: Chain):
    (chain.directory / os.fsdecode(b"d\xff.yaml")).write_text("sft: {lrr: 1}\n")
    ended = in_shell(chain, "rlhf check $'d\\xff.yaml'")
    assert (ended.returncode, ended.stderr.count(b"\n")) == (2, 1)
    assert b"ff.yaml:1: sft.lrr" in ended.stderr


def test_under_nohup_a_closed_terminal_is_nothing(chain: Chain):
    chain.order("sft", sleep_s=2)
    started = subprocess.Popen(
        ["nohup", sys.executable, "-c", FAKE_CLI, "run", "demo.yaml", "--until", "sft"],
        cwd=chain.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    wait_for(chain.control / "sft.sleeping")
    started.send_signal(signal.SIGHUP)
    assert started.wait(60) == 0
