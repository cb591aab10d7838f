"""Pieces: the documents of a file that cannot be cut, in jsonl files that are blocks like any other.

    FileSplit --read_pieces--> 000003-000000.jsonl, 000003-000001.jsonl, ... + 000003.read.json

What is compressed, a table, one text or on the hub can only be read from its start, by one reader. It is read
once; all that takes time is then spread over its pieces. The record is written last: a killed run reads the
file again, a later one does not. Bad rows are counted, or end the run, here: a piece holds documents alone.
Owns: where a piece ends. Does not own: rows and their errors (readers), what becomes of documents (corpus).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from rollout.ground.whole import whole_record, write_record
from stages.config.data import DataSource
from stages.data.reading.files import FileSplit
from stages.data.reading.readers import Counts, read_split, split_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """One file, read."""

    counts: Counts  # of its rows
    names: tuple[str, ...]  # of its pieces, in order; one at least


def read_pieces(
    directory: Path,
    number: int,
    split: FileSplit,
    source: DataSource,
    piece_bytes: int,
    between: Callable[[], None],
) -> Pieces:
    """Write the documents of file `number` to `directory`, about `piece_bytes` to a piece. What is whole
    there already, and was made from what the file holds now, is taken. `between` is called between two
    pieces, and may raise. Raises DataError.
    """
    record = directory / f"{number:06d}.read.json"
    if (found := whole_record(record)) is not None and found["split"] == split_digest(split, source):
        return Pieces(counts=Counts(**found["counts"]), names=tuple(found["pieces"]))
    reader = read_split(source, split, "documents")
    lines = (json.dumps({"text": document.text}, ensure_ascii=False).encode() + b"\n" for document in reader)
    pieces: list[Path] = []
    for piece in count():
        path = directory / f"{number:06d}-{piece:06d}.jsonl"
        with path.open("wb") as stream:
            stream.writelines(_until(lines, piece_bytes))
        pieces.append(path)
        if path.stat().st_size < piece_bytes:
            break
        between()
    names = [path.name for path in pieces]
    content = {"counts": asdict(reader.counts), "pieces": names, "split": split_digest(split, source)}
    write_record(record, pieces, content)
    return Pieces(counts=reader.counts, names=tuple(names))


def piece_source(path: Path) -> DataSource:
    """A piece as a source: every document in it counts."""
    return DataSource(path=str(path), format="text")


def _until(lines: Iterator[bytes], num_bytes: int) -> Iterator[bytes]:
    """The next lines, up to the one with which they are `num_bytes` together."""
    while num_bytes > 0 and (line := next(lines, b"")):
        yield line
        num_bytes -= len(line)
