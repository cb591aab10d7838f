"""An engine that ended is reported with its own cause, not with "see root cause above"."""

from pathlib import Path

import pytest

from rollout.engine_log import cause_in, cause_of

ABOVE = RuntimeError(
    "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_DP0': 1}"
)
SHM = (
    "Insufficient space in /dev/shm for shared-memory allocation: 160 MiB required, 64 MiB free. "
    "Increase /dev/shm (e.g. --shm-size or --ipc=host)."
)
CORE = "(EngineCore pid=71) ERROR 11-28 20:15:01 [core.py:1100] "
WORKER = "(Worker pid=72) ERROR 11-28 20:15:00 [multiproc_executor.py:871] "
POINTS = (
    "Exception: WorkerProc initialization failed due to an exception in a background process. See stack "
    "trace for root cause."
)
LOG = f"""\
(EngineCore pid=71) INFO 11-28 20:14:59 [core.py:93] Initializing a V1 LLM engine
(EngineCore pid=71) WARNING 11-28 20:14:59 [cpu.py:9] ImportError: no such kernel; using another one
{WORKER}WorkerProc failed to start.
{WORKER}Traceback (most recent call last):
{WORKER}  File "shm_broadcast.py", line 253, in check_shm_free_space
{WORKER}    raise RuntimeError(
{WORKER}RuntimeError: {SHM}
{CORE}EngineCore failed to start.
{CORE}{POINTS}
(EngineCore pid=71) Process EngineCore:
(EngineCore pid=71) Traceback (most recent call last):
(EngineCore pid=71) Exception: WorkerProc initialization failed due to an exception in a background process.
(EngineCore pid=71) BrokenPipeError: [Errno 32] Broken pipe
ValueError: of the clean-up, long after
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (LOG, f"RuntimeError: {SHM}"),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, max_model_len is greater than the derived one [type=value_error]\n",
            "ValidationError: 1 validation error for ModelConfig Value error, max_model_len is greater than "
            "the derived one [type=value_error]",
        ),
        (
            f"{CORE}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n",
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (
            f"{CORE}zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:5555')\n",
            "ZMQError: Address already in use (addr='tcp://127.0.0.1:5555')",
        ),
        ("INFO all is well\nBrokenPipeError: [Errno 32] Broken pipe\n", None),
        ("", None),
    ],
)
def test_the_first_cause_is_found_in_a_log(log: str, cause: str | None):
    assert cause_in(log) == cause


def test_an_error_that_points_elsewhere_is_told_by_what_it_points_to(tmp_path: Path):
    log = tmp_path / "engine-0.log"
    log.write_text(LOG)
    assert cause_of(ABOVE, log) == f"RuntimeError: {SHM}"


def test_what_was_logged_before_this_start_is_not_its_cause(tmp_path: Path):
    log = tmp_path / "engine-0.log"
    log.write_text("ValueError: of yesterday\n" + LOG)
    since = len("ValueError: of yesterday\n")
    assert cause_of(ABOVE, log, since) == f"RuntimeError: {SHM}"
    assert "yesterday" not in cause_of(ABOVE, log, len(log.read_bytes()))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-9, "killed (SIGKILL); is there enough memory?"),
        (-7, "is /dev/shm full?"),
        (-11, "SIGSEGV"),
        (1, "wrote no error and ended with code 1"),
    ],
)
def test_a_process_that_ended_without_a_word_is_told_by_its_end(tmp_path: Path, code: int, said: str):
    error = RuntimeError(str(ABOVE).replace(": 1}", f": {code}}}"))
    assert said in cause_of(error, tmp_path / "no.log")


def test_an_error_with_a_cause_of_its_own_says_it(tmp_path: Path):
    (tmp_path / "log").write_text(LOG)
    error = RuntimeError(
        "Worker failed with error 'no such tensor', please check the stack trace above for the root cause\n"
    )
    assert cause_of(ValueError("dtype float64\nmore"), tmp_path / "log") == "dtype float64"
    assert cause_of(error, tmp_path / "log") == "no such tensor"
