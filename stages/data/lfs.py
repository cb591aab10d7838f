"""Git LFS: a large file that was not fetched is a small text file that names it.

Owns: telling such a pointer from the file. Light import.
"""

from pathlib import Path

MAX_POINTER_BYTES = 1024
"""The limit of the format (git-lfs, docs/spec.md)."""
_STARTS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
POINTER = "a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a pointer, whatever its ending. OSError."""
    if path.stat().st_size >= MAX_POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(max(map(len, _STARTS))).startswith(_STARTS)
