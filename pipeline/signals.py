"""What SIGINT, SIGTERM and SIGHUP do to a run: first it is asked to stop, then it is stopped.

    first signal --> stop file: stages leave at their next step boundary, state saved; no other one starts
    second signal, or no end within the deadline --> KeyboardInterrupt: at once, from the last checkpoint

Both ways exit code 75, and the same command goes on. Owns: the handlers and the stop file. Does not own: who
looks at the file (training loops, executor), the exit code (cli).
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rollout.ground.disk import disk_problems

STOPPING = b"stopping at the next step; again: at once\n"


def ending_signals() -> tuple[signal.Signals, ...]:
    """What asks this process to end. A closed terminal does (SIGHUP), unless that was ignored when we
    started, as `nohup` does.
    """
    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])


@dataclass(kw_only=True)
class StopRequest:
    """Whether the run was asked to stop."""

    made: bool = False


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside, each of them raises KeyboardInterrupt, the one exception that ray.wait lets through."""
    with _handled_by(_raise_interrupt):
        yield


@contextlib.contextmanager
def signals_ask_to_stop(stop_file: Path, *, timeout_s: float) -> Iterator[StopRequest]:
    """Inside, the first signal creates `stop_file`; KeyboardInterrupt `timeout_s` later, or at the second.

    The file is there only while a request stands: one that a killed run left is removed.
    """
    request = StopRequest()

    def handle(*_: object) -> None:
        if request.made:
            raise KeyboardInterrupt
        request.made = True
        try:
            stop_file.touch()
        except OSError as error:  # nothing to ask with
            raise KeyboardInterrupt from error
        with contextlib.suppress(OSError):  # nobody may be listening any more
            os.write(1, STOPPING)  # not through sys.stdout, which this may have interrupted
        signal.setitimer(signal.ITIMER_REAL, timeout_s)

    with disk_problems(stop_file):
        stop_file.unlink(missing_ok=True)
    before = signal.signal(signal.SIGALRM, _raise_interrupt)
    try:
        with _handled_by(handle):
            yield request
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        with contextlib.suppress(OSError):  # the next run removes it
            stop_file.unlink(missing_ok=True)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Inside, nothing cuts a clean-up short. (Not SIG_IGN: children would inherit it.)"""
    signal.setitimer(signal.ITIMER_REAL, 0)
    with _handled_by(lambda *_: None):
        yield


@contextlib.contextmanager
def _handled_by(handler: "signal._HANDLER") -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in ending_signals()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt
