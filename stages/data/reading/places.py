"""Places: a path, glob or directory -> the files behind it, each once, in path order.

    path --a file or a glob--> those files
         --a directory--> all below it --directories--> data of the split | left out, with the reason

Owns walking, globs and links. Does not own which files of a directory are data (directories), what a file's
name says of its content (files), nor what is in it. Light import.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from pathlib import Path

from stages.data.reading.directories import Found, LeftOut, chosen
from stages.data.reading.files import KINDS, has_data_suffix, reading, shown
from stages.errors import DataError


def found_at(path: str, split: str) -> Found:
    """The files behind a path or glob, which is read whole, or those of `split` in a directory. Raises
    DataError where there is none.
    """
    place = Path(path)
    with reading(place):
        if place.is_dir():
            return _found_in(place, split)
        files = [_plain_file(place)] if place.exists() else files_matching(path)
    if not files:
        kind = "file" if has_data_suffix(path) else "file or directory"
        raise DataError(f"no such {kind}: {shown(path)}")
    return Found(files=tuple(files), left_out=())


def _found_in(directory: Path, split: str) -> Found:
    found = chosen(directory, list(_walk([directory])), split)
    files = _once(found.files)
    if not files:
        others = f"; left out: {found.reasons(directory)}" if found.left_out else ""
        raise DataError(f"{shown(directory)}: no {', '.join(KINDS)} file in this directory{others}")
    taken = {*files}
    further = [LeftOut(path=path, why=_why_not_taken(path)) for path in found.files if path not in taken]
    return Found(files=tuple(files), left_out=(*found.left_out, *further))


def _why_not_taken(path: Path) -> str:
    return "another name of a file that is read" if path.is_file() else "not a file"


def files_matching(pattern: str) -> list[Path]:
    """The files that a glob leads to, sorted, each once: `*`, `?` and `[...]` as in the shell, `**` for any
    directories between, or for all that is below. Raises DataError for a directory that cannot be read.
    """
    if "\0" in pattern or os.path.basename(pattern) in ("", "."):  # no name, or one of a directory
        return []
    path = Path(pattern)
    places = [Path(path.anchor)]
    parts = path.relative_to(path.anchor).parts
    for at, part in enumerate(parts, start=1):
        if part == "**":
            walked = list(_walk(places))
            places = [place for place, _ in walked]
            if at == len(parts):
                places = [place / name for place, names in walked for name in names]
        elif glob.has_magic(part):
            fits = re.compile(fnmatch.translate(part)).match
            takes_hidden = part.startswith(".")
            places = [
                place / entry.name
                for place in places
                for entry in _entries(place)
                if fits(entry.name) and (takes_hidden or not entry.name.startswith("."))
            ]
        else:
            places = [place / part for place in places if _is_there(place / part)]
    return _once(sorted(places, key=str))


def _walk(tops: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Those directories and all below, each once, by its shortest path, with the names of the files in it;
    links are followed, nothing hidden is seen. Raises DataError.
    """
    seen = set()
    waiting = [(len(top.parts), top) for top in tops]
    heapify(waiting)
    while waiting:
        depth, place = heappop(waiting)
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        names = []
        for entry in _entries(place):
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry):
                heappush(waiting, (depth + 1, place / entry.name))
            else:
                names.append(entry.name)
        yield place, names


def _is_there(place: Path) -> bool:
    """Whether a file, directory or link of this name exists. Raises DataError where that is kept secret."""
    try:
        place.lstat()
    except PermissionError as error:
        raise DataError(f"{shown(place)}: cannot be read: {error.strerror}") from error
    except OSError:
        return False
    return True


def _entries(place: Path) -> list[os.DirEntry[str]]:
    """What is in a directory; nothing is in what is none. Raises DataError."""
    if not os.path.isdir(place):
        return []
    with reading(place), os.scandir(place) as entries:
        return list(entries)


def _once(paths: Sequence[Path]) -> list[Path]:
    """The files among the paths, one that has several names by the shortest path. Raises DataError."""
    files: dict[Path, Path] = {}
    for path in sorted(paths, key=lambda path: len(path.parts)):
        real = Path(os.path.realpath(path))  # also where the path has more links than the system follows
        if path.is_symlink() and has_data_suffix(path) and not real.exists():
            raise DataError(f"{shown(path)}: a link that leads nowhere")
        if real.is_file():
            files.setdefault(real, path)
    shortest = {*files.values()}
    return [path for path in paths if path in shortest]


def _plain_file(path: Path) -> Path:
    if not path.is_file():  # a pipe or a device would never end
        raise DataError(f"{shown(path)}: not a file")
    return path
