"""Whole: how a reader tells that bytes are as they were written. Owns digests and records of them.

    a file       measure --> Measured (size, blake3)
    a directory  a Measured for every path below it --check_directory--> NotWhole names the first that differs
    a record     JSON that holds the digest of itself: record_text --> record_content
    a block      one line of kind, version and digest, then bytes: block_bytes --> block_content

All that a later run reads back says it in one of these ways: artifacts, checkpoints, prepare's blocks, files
of tokens, the rollout journal. Does not own: how bytes get onto the disk (durable), nor what a reader does
with damaged ones. Digests tell damage; they are no defence against somebody who may write to `outputs/`.
Light import.
"""

import contextlib
import errno
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from rollout.ground.durable import sync, write_whole

BLOCK_BYTES = 2**22
NO_DIGEST = '"digest": ""'
"""Where a text that holds the digest of itself gets it."""
HEADER = re.compile(rb"([a-z-]+) (0|[1-9]\d*) ([0-9a-f]{64})\n")
MAX_HEADER_BYTES = 128


class NotWhole(Exception):
    """Bytes that are not what was written, or are of another version of this code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a file's bytes are told by."""

    size: int  # bytes
    blake3: str  # hex


def file_digest(path: Path, start: int = 0, end: int | None = None) -> str:
    """blake3 of a file's bytes from `start` up to `end` (None: the end of the file), hex. OSError, which
    names the file also where reading failed and not opening.
    """
    hasher = blake3()
    try:
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - file.tell())):
                hasher.update(block)
    except OSError as error:
        error.filename = str(path)
        raise
    return hasher.hexdigest()


def measure(path: Path) -> Measured:
    """A file as it is now. OSError."""
    return Measured(size=path.stat().st_size, blake3=file_digest(path))


def holds(path: Path, measured: Measured, digest_of: Callable[[Path], str] = file_digest) -> bool:
    """Whether a path is a file with the bytes that were measured. A size that differs saves reading them.
    OSError.
    """
    return path.is_file() and path.stat().st_size == measured.size and digest_of(path) == measured.blake3


def files_below(directory: Path) -> dict[str, Path]:
    """All below a directory that is no directory, links included, by its path from there. OSError."""
    paths = [path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {str(path.relative_to(directory)): path for path in sorted(paths)}


def check_directory(
    directory: Path,
    files: Mapping[str, Measured],
    *,
    record: str,
    digest_of: Callable[[Path], str] = file_digest,
) -> None:
    """Compare all below `directory` with `files`, which the file `record` lists. Raises NotWhole for the
    first path, in their order, that is missing, not listed or has other bytes; OSError.
    """
    present = files_below(directory)
    present.pop(record, None)
    for name in sorted(files.keys() | present.keys()):
        if name not in files:
            raise NotWhole(f"{name}: not listed in {record}")
        if not (directory / name).is_file():
            raise NotWhole(f"{name}: missing, but {record} lists it")
        if not holds(directory / name, files[name], digest_of):
            raise NotWhole(f"{name}: not the bytes that {record} records")


@contextlib.contextmanager
def bad_sectors_as_damage() -> Iterator[None]:
    """Inside, a read that fails because of what lies there raises NotWhole: it is damage like other bytes,
    which the next run would meet again. Not so a missing permission, or a server that is gone.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        where = "" if error.filename is None else f"{Path(error.filename).name}: "
        raise NotWhole(f"{where}{error.strerror}") from error


def with_own_digest(text: str) -> str:
    """`text` with its first empty digest (`NO_DIGEST`) filled: the blake3 of the text as it is given."""
    return text.replace(NO_DIGEST, f'"digest": "{blake3(text.encode()).hexdigest()}"', 1)


def check_own_digest(text: str, digest: str) -> None:
    """Raises NotWhole unless `text` is what `with_own_digest` gave when it filled in `digest`."""
    empty = text.replace(f'"digest": "{digest}"', NO_DIGEST, 1)
    if empty == text or with_own_digest(empty) != text:
        raise NotWhole("not the record that was written")


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that a text is. Raises NotWhole."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotWhole("not a record") from error
    if not isinstance(content, dict):
        raise NotWhole("not a record")
    return content


def record_text(content: Mapping[str, Any]) -> str:
    """JSON of `content` with the digest of itself."""
    assert "digest" not in content, "the name of its own digest"
    return with_own_digest(json.dumps({"digest": "", **content}) + "\n")


def record_content(text: str) -> dict[str, Any]:
    """What `record_text` was given. Raises NotWhole for a text that it did not write."""
    content = json_object(text)
    digest = content.pop("digest", None)
    if not isinstance(digest, str):
        raise NotWhole("not a record")
    check_own_digest(text, digest)
    return content


def write_record(record: Path, files: Sequence[Path], content: Mapping[str, Any]) -> dict[str, Any]:
    """Write the record of `files`, which lie beside it and are on the disk when this returns, and what is
    known of them. Returns what `whole_record` reads of it. OSError.
    """
    for file in files:
        sync(file)
    written = {"files": {file.name: asdict(measure(file)) for file in files}, **content}
    write_whole(record, record_text(written).encode())
    return written


def whole_record(record: Path) -> dict[str, Any] | None:
    """The content of a record that is, with its files, as `write_record` left it; else None. Under `files`
    stands what each of them was measured as.
    """
    try:
        content = record_content(record.read_bytes().decode())
        files = {record.with_name(name): Measured(**one) for name, one in content["files"].items()}
        return content if all(holds(path, one) for path, one in files.items()) else None
    except (NotWhole, OSError, UnicodeDecodeError):  # never written, or damaged: it is made again
        return None


def block_bytes(kind: str, version: int, block: bytes) -> bytes:
    """A file of one block: `kind` (small letters and dashes) and `version` say who may read it."""
    return f"{kind} {version} {blake3(block).hexdigest()}\n".encode() + block


def block_version(content: bytes, *, kind: str) -> int:
    """The version of which a file of one block is; its first MAX_HEADER_BYTES suffice. Raises NotWhole."""
    return int(_header(content, kind)[2])


def _header(content: bytes, kind: str) -> re.Match[bytes]:
    header = HEADER.match(content[:MAX_HEADER_BYTES])
    if header is None or header[1].decode() != kind:
        raise NotWhole(f"not a file of {kind}")
    return header


def block_content(content: bytes, *, kind: str, version: int) -> bytes:
    """The block that `block_bytes` was given. Raises NotWhole."""
    header = _header(content, kind)
    if int(header[2]) != version:
        raise NotWhole(f"schema version {int(header[2])}, this code reads {version}")
    block = content[header.end() :]
    if blake3(block).hexdigest() != header[3].decode():
        raise NotWhole("not the bytes that were written")
    return block
