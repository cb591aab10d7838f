"""Files that a crash leaves whole or absent, and digests by which damage is seen.

    bytes -> `.tmp` name -> fsync -> rename -> fsync of the directory

Owns: that order, and the one line a full or read-only disk costs. Used by all that a later run reads back:
checkpoints, the rollout journal, artifacts and their records. Light import.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from rollout.ground.errors import GO_ON, EnvironmentProblem

UNFINISHED = ".tmp"
BLOCK_BYTES = 2**22


def file_digest(path: Path, start: int = 0, end: int | None = None) -> str:
    """blake3 of a file's bytes from `start` up to `end` (None: the end of the file), hex. OSError."""
    hasher = blake3()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - file.tell())):
            hasher.update(block)
    return hasher.hexdigest()


def record_text(content: Mapping[str, Any]) -> str:
    """Canonical JSON with a blake3 over the rest of itself: no other text is what `record_content` takes."""
    text = json.dumps(content, sort_keys=True)
    digest = blake3(text.encode()).hexdigest()
    return json.dumps({**content, "blake3": digest}, sort_keys=True) + "\n"


def record_content(text: str) -> dict[str, Any]:
    """What `record_text` was given. Raises ValueError for a text that it did not write."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("not a record") from error
    if not isinstance(content, dict) or content.pop("blake3", None) is None or record_text(content) != text:
        raise ValueError("not a record")
    return content


def write_whole(path: Path, content: bytes) -> None:
    """Write all of a file or none of it, also beside another process that does; on the disk when this
    returns. OSError.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when the bytes of a file, or the names in a directory, are on the disk. OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_record(record: Path, files: Sequence[Path], content: Mapping[str, Any]) -> None:
    """The record of `files` beside it that are whole: their digests, and what is known of them. OSError."""
    for file in files:
        sync(file)
    digests = {file.name: file_digest(file) for file in files}
    write_whole(record, record_text({**content, "digests": digests}).encode())


def whole_record(record: Path) -> dict[str, Any] | None:
    """The content of a record that is, with its files, as `write_record` left it; else None."""
    try:
        content = record_content(record.read_text(encoding="utf-8"))
        whole = all(
            file_digest(record.with_name(name)) == digest for name, digest in content["digests"].items()
        )
    except (OSError, ValueError):  # never written, or damaged: it is made again
        return None
    return content if whole else None


@contextlib.contextmanager
def disk_problems(path: Path) -> Iterator[None]:
    """Inside, an OSError (no space, no permission, a broken disk) becomes one line about `path`."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(disk_line(error, path)) from error


def is_bad_sector(error: OSError) -> bool:
    """Whether a read failed because of what lies there: damage like other bytes, which the next run would
    meet again. A missing permission or a server that is gone is none.
    """
    return error.errno == errno.EIO


def disk_line(error: OSError, path: Path) -> str:
    """What is wrong with the disk, where, and how to go on."""
    where = path if error.filename is None else error.filename
    if error.filename2 is not None:  # a rename: either may be to blame
        where = f"{where} -> {error.filename2}"
    return f"{where}: {error.strerror or error}; check the disk, or set outputs=DIR; then {GO_ON}"
