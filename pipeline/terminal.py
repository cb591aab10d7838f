"""What a command prints, whoever reads it: a reader that leaves, a full disk, an encoding without our marks.

    print --> TextIOWrapper (marks for what the encoding lacks) --> _Descriptor --> file descriptor 1 or 2
                                     the reader left: silence <--'--> no room: one line, exit code 4

Owns: `sys.stdout` and `sys.stderr` of a command. Nothing that happens to them ends a run: its results do not
depend on who reads along. Does not own: what is printed (cli, progress).
"""

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

STDIN, STDOUT, STDERR = 0, 1, 2
MARKS = "rlhf-marks"
"""Error handler of our outputs: "?" for a character that they cannot hold, `\\xff` for a byte of a
name that is not UTF-8.
"""
NO_READER = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


@dataclass(kw_only=True)
class Shown:
    """How printing went."""

    problem: OSError | None = None  # why standard output took no more; None: it did, or its reader left

    def exit_code(self, code: int, *, if_lost: int) -> int:
        """That of the command; `if_lost` where it would be 0 although what it printed is lost."""
        return code or (0 if self.problem is None else if_lost)


@contextlib.contextmanager
def outputs_that_may_fail() -> Iterator[Shown]:
    """Inside, printing raises no OSError and no UnicodeEncodeError. Leaves alone what others have put in
    place of this process's own outputs.
    """
    codecs.register_error(MARKS, _marked)
    _open_missing_descriptors()
    shown, before = Shown(), (sys.stdout, sys.stderr)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text_output(STDOUT, sys.__stdout__, shown)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text_output(STDERR, sys.__stderr__, Shown())
    try:
        yield shown
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _text_output(descriptor: int, before: TextIO | None, shown: Shown) -> TextIO:
    """A text file like `before`; None: its descriptor was closed when this process started."""
    raw = _Descriptor(descriptor, shown)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),  # type: ignore[type-var]  # a RawIOBase is what it takes
        encoding="utf-8" if before is None else before.encoding,
        errors=MARKS,
        line_buffering=raw.isatty() or descriptor == STDERR,
    )


class _Descriptor(io.RawIOBase):
    """A file descriptor that takes everything. It is not closed with this object."""

    def __init__(self, descriptor: int, shown: Shown) -> None:
        self._descriptor = descriptor
        self._shown = shown
        self._is_terminal = os.isatty(descriptor)  # asked now: one that was closed does not know any more
        self._is_over = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]  # io's own stub is wider
        content = memoryview(data).cast("B")
        written = 0
        while written < len(content) and not self._is_over:
            try:
                written += os.write(self._descriptor, content[written:])
            except BlockingIOError:  # whoever shares it has set it so
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._end(error)
        return len(content)

    def _end(self, error: OSError) -> None:
        self._is_over = True
        if self._descriptor == STDERR or self._is_terminal or error.errno in NO_READER:
            return
        self._shown.problem = error
        line = f"standard output: {error.strerror}; make room, or send it elsewhere\n"
        with contextlib.suppress(OSError):
            os.write(STDERR, line.encode())


def _marked(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    return "".join(f"\\x{ord(mark) - 0xDC00:02x}" if _is_byte(mark) else "?" for mark in lost), error.end


def _is_byte(mark: str) -> bool:
    """Whether it stands for a byte that was not UTF-8 (PEP 383)."""
    return "\udc80" <= mark <= "\udcff"


def _open_missing_descriptors() -> None:
    """Else the next file that is opened gets the number of a closed output, and what is printed."""
    for descriptor in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
