"""Git LFS: a large file that was not fetched is a small text file that names it.

Owns: telling such a pointer from the file. Light import.
"""

from collections.abc import Collection
from pathlib import Path

MAX_POINTER_BYTES = 1024
"""The limit of the format (git-lfs, docs/spec.md)."""
_STARTS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
POINTER = "a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"


def first_pointer(path: Path, endings: Collection[str] | None = None) -> Path | None:
    """The first pointer, by name, among the files of a directory with these endings (None: any), or a file
    that is one itself. OSError.
    """
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    looked_at = (file for file in files if endings is None or file.suffix.lower() in endings)
    return next((file for file in looked_at if file.is_file() and is_lfs_pointer(file)), None)


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a pointer, whatever its ending. OSError."""
    if path.stat().st_size >= MAX_POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(max(map(len, _STARTS))).startswith(_STARTS)
