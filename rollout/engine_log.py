"""Why an engine ended, in the words of the process that failed: vLLM's own error says "see root cause above".

    engine-0.log, from this start of the engine on --cause_in--> "RuntimeError: Insufficient space in ..."

Owns: finding the first cause among the errors that followed from it. Does not own: what is logged (vLLM), and
where (vllm_plugin). Light import.
"""

import re
import signal
from pathlib import Path

POINTS_ELSEWHERE = re.compile(
    r"see (the )?(root cause|stack ?trace)|stack trace above|initialization failed due to an exception"
    r"|Engine core initialization failed|EngineCore encountered an issue|EngineDeadError",
    re.IGNORECASE,
)
"""In an error that another one caused, in another process."""
PREFIX = re.compile(
    r"^(\([^)]*\) ?)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?(\([^)]*\) ?)?"
)
"""What vLLM and its children put before a line: "(EngineCore pid=7) ERROR 11-28 20:15:01 [core.py:9] "."""
RAISED = re.compile(r"^(?:[a-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Interrupt|Exit)|Exception): (.+)$")
"""The last line of a traceback."""
GOES_ON = re.compile(r"(:|validation errors? for \S+)$")
"""A message whose point is on the next line."""
AFTERMATH = frozenset(
    {"BrokenPipeError", "ConnectionResetError", "EOFError", "KeyboardInterrupt", "SystemExit"}
)
"""Raised by those that lose the process that failed."""
EXIT_CODE = re.compile(r"'[^']*': (-?\d+)")
DIED_OF = {
    signal.SIGKILL: "killed (SIGKILL); is there enough memory?",
    signal.SIGBUS: "ended by a bus error (SIGBUS); is /dev/shm full?",
    signal.SIGILL: "ended by SIGILL; this build of vLLM has instructions that this CPU has not",
}
MAX_LOG_BYTES = 2**20
MAX_CAUSE_CHARS = 500


def size_of(log: Path) -> int:
    """Bytes of a log so far; what comes after them is of the engine that starts now."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def cause_of(error: BaseException, log: Path, since: int = 0) -> str:
    """One line: what `error` says itself, or, where it points to another process, what that one wrote to
    `log` behind its first `since` bytes.
    """
    text = _one_line(error)
    if not POINTS_ELSEWHERE.search(f"{type(error).__name__}: {text}"):
        return text
    return cause_since(log, since) or _exit_of(str(error))


def cause_since(log: Path, since: int) -> str | None:
    """`cause_in` what was written to `log` behind its first `since` bytes."""
    return cause_in(_written(log, since))


def cause_in(log: str) -> str | None:
    """The error that the others followed from: the last one before the first that points elsewhere.

    Example: "RuntimeError: Insufficient space in /dev/shm for ...: 160 MiB required, 64 MiB free. ...".
    """
    lines = [PREFIX.sub("", line) for line in log.splitlines()]
    found: list[str] = []
    for index, line in enumerate(lines):
        if (raised := RAISED.match(line)) is None or raised[1] in AFTERMATH:
            continue
        if POINTS_ELSEWHERE.search(line):
            if found:
                break
            continue
        following = lines[index + 1].strip() if index + 1 < len(lines) and GOES_ON.search(line) else ""
        found.append(f"{raised[1]}: {raised[2]} {following}".strip()[:MAX_CAUSE_CHARS])
    return found[-1] if found else None


def _one_line(error: BaseException) -> str:
    """The first line of a message, without what vLLM wraps around a worker's error."""
    first, *_ = str(error).splitlines() or [type(error).__name__]
    _, _, inner = first.rpartition("Worker failed with error ")
    return inner.removesuffix(", please check the stack trace above for the root cause").strip("'\"")


def _written(log: Path, since: int) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(since, size_of(log) - MAX_LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _exit_of(message: str) -> str:
    """How a process ended that wrote no error; vLLM names some with their exit codes."""
    if (code := EXIT_CODE.search(message)) is None:
        return (
            "one of its processes wrote no error and is gone; was it killed, or is there too little memory?"
        )
    number = int(code[1])
    if -number in DIED_OF:
        return f"its process was {DIED_OF[signal.Signals(-number)]}"
    if -number in set(signal.Signals):
        return f"its process was ended by {signal.Signals(-number).name}"
    return f"its process wrote no error and ended with code {number}"
