"""Files: a file of a known kind, opened and decompressed, or cut into splits.

    places --> file --cut--> FileSplit --opened--> bytes        (rows: bytes -> columns)

Owns names, kinds, compression, what the operating system and a decompressor complain of, and where a file may
be cut. Does not own which files a path means (places), what is in a file (rows, json_rows) nor what a row
means (schemas). Light import.
"""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal, cast

from stages.config.data import DataSource
from stages.errors import DataError

Kind = Literal["jsonl", "json", "parquet", "arrow", "csv", "tsv", "txt"]
KINDS: tuple[Kind, ...] = ("jsonl", "json", "parquet", "arrow", "csv", "tsv", "txt")
ARROW_KINDS = ("parquet", "arrow")
"""Tables of Arrow's, which compress by themselves."""
_OTHER_NAMES: dict[str, Kind] = {"ndjson": "jsonl", "jsonlines": "jsonl"}
COMPRESSIONS = ("gz", "zst")
"""Of every kind but Arrow's."""
MAX_SHOWN_CHARS = 2000
"""An error line longer than this (a column name of a megabyte) is shortened in the middle."""
_READ_BYTES = 1 << 20
_HALF_A_GZIP_MAGIC = r"(b'\x1f')"
"""What gzip did not take for the beginning of a file when only the first byte of one is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """What a file's name says about its content."""

    kind: Kind
    compression: str = ""  # gz, zst or none


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSplit:
    """A part of a file that can be read on its own; those of a source, in order, hold all its rows once."""

    path: Path  # of a hub dataset: its id
    start: int  # byte at which its first line begins
    end: int | None  # byte after its last line; None: the file cannot be cut, this is all of it
    first_line: int  # number of its first line in the file, from 1

    @property
    def num_bytes(self) -> int:
        """Bytes to read; of a hub dataset 0: how large it is, is known once it was fetched."""
        if self.end is not None:
            return self.end - self.start
        return self.path.stat().st_size if self.path.exists() else 0


def one_line(text: str | Path) -> str:
    """`text` as an error line may hold it: signs that do not print (line ends, escapes, half surrogate pairs)
    written as Python would, and no more than MAX_SHOWN_CHARS.
    """
    plain = str(text)
    if len(plain) > MAX_SHOWN_CHARS:
        plain = f"{plain[: MAX_SHOWN_CHARS // 2]} … {plain[-MAX_SHOWN_CHARS // 2 :]}"
    return printable(plain)


def printable(text: str, but_also: str = "") -> str:
    """`text` with the signs that do not print written as Python would, except those of `but_also`."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in but_also else ascii(sign)[1:-1] for sign in text)


def shown(path: str | Path) -> str:
    """The path as a person would write it: relative where it lies below the working directory."""
    relative = str(path) if "\0" in str(path) else os.path.relpath(path)
    return one_line(path if relative.startswith("..") else relative)


def shown_column(name: str) -> str:
    """A column's name as an error line may hold it."""
    return one_line(name if len(name) <= 80 else f"{name[:80]}…")


def has_data_suffix(path: str | Path) -> bool:
    """Whether the name is that of a file this package reads."""
    return _kind_in(Path(path).name) is not None


def _kind_in(name: str) -> FileKind | None:
    stem, _, last = name.lower().rpartition(".")
    compression = last if stem and last in COMPRESSIONS else ""
    suffix = stem.rpartition(".")[2] if compression else last
    kind = next((kind for kind in KINDS if kind == suffix), _OTHER_NAMES.get(suffix))
    if kind is None or "." not in name or (kind in ARROW_KINDS and compression):
        return None
    return FileKind(kind=kind, compression=compression)


def kind_of(path: Path) -> FileKind:
    """Kind and compression, by the file's name. Raises DataError."""
    kind = _kind_in(path.name)
    if kind is None:
        raise DataError(
            f"{shown(path)}: cannot tell what it is by its name; {', '.join(KINDS)} and {_compressed()} of "
            "the text ones are read"
        )
    return kind


def _compressed() -> str:
    return " or ".join(f".{compression}" for compression in COMPRESSIONS)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system or a decompressor says into one line about the file."""
    try:
        yield
    except EOFError as error:
        raise DataError(f"{shown(path)}: file ends early (truncated?)") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        if str(error).endswith(_HALF_A_GZIP_MAGIC):
            raise DataError(f"{shown(path)}: file ends early (truncated?)") from error
        raise DataError(f"{shown(path)}: not a valid gzip file, or damaged") from error
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {one_line(error.strerror or str(error))}") from error


def opened(path: Path, compression: str) -> BinaryIO:
    """The file's bytes, decompressed, in constant memory. To be read within `reading(path)`."""
    if compression == "gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression == "zst":
        return io.BufferedReader(_ZstdStream(path), _READ_BYTES)
    return path.open("rb", buffering=_READ_BYTES)


class _ZstdStream(io.RawIOBase):
    """A zstd file as Arrow decompresses it, with the errors of `reading`."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._path = path
        self._stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the buffer BufferedReader gives
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:  # Arrow gives neither an error number nor a class of its own
            if "Truncated" in str(error):
                raise EOFError from error
            reason = "not a valid zstd file, or damaged"
            if "too much memory" in str(error):
                reason = f"{error} (a window above 128 MiB); compress it with zstd --long=27 or less"
            raise DataError(f"{shown(self._path)}: {reason}") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def cut(path: Path, source: DataSource, block_bytes: int) -> Iterator[FileSplit]:
    """The file in splits of about `block_bytes`, cut after line ends; in one piece where lines cannot be told
    apart without reading from the start.
    """
    kind = kind_of(path)
    is_by_line = kind.kind == "jsonl" or (kind.kind == "txt" and source.document == "line")
    if kind.compression or not is_by_line:
        yield whole(path)
        return
    with reading(path), opened(path, "") as stream:
        size = os.fstat(stream.fileno()).st_size
        line = 1
        for start, end in pairwise(_line_starts(stream, size, block_bytes)):
            yield FileSplit(path=path, start=start, end=end, first_line=line)
            if end < size:
                line += _line_ends_between(stream, start, end)


def whole(path: Path) -> FileSplit:
    """All of a file."""
    return FileSplit(path=path, start=0, end=None, first_line=1)


def _line_starts(stream: BinaryIO, size: int, block_bytes: int) -> Iterator[int]:
    """0, then every first start of a line at least `block_bytes` further on, then the size."""
    at = 0
    while at < size:
        yield at
        stream.seek(at + block_bytes - 1)
        stream.readline()
        at = min(stream.tell(), size)
    yield size


def _line_ends_between(stream: BinaryIO, start: int, end: int) -> int:
    stream.seek(start)
    num_lines = 0
    while start < end:
        data = stream.read(min(_READ_BYTES, end - start))
        if not data:
            raise EOFError  # the file was cut while it was read
        num_lines += data.count(b"\n")
        start += len(data)
    return num_lines


def lines_of(stream: BinaryIO, split: FileSplit) -> Iterator[bytes]:
    """The lines of a split, with their line ends."""
    if split.end is None:
        yield from stream
        return
    at = split.start
    stream.seek(at)
    while at < split.end:
        line = stream.readline()
        if not line:
            raise EOFError  # the file was cut after it was divided
        yield line
        at += len(line)
