"""Pieces: a file that is read from its start alone becomes blocks, whole or not at all."""

import gzip
import json
from pathlib import Path

import pytest

from stages.config.data import DataSource
from stages.data.corpus.pieces import Pieces, piece_source, read_pieces
from stages.data.reading import readers
from stages.data.reading.files import whole
from stages.data.reading.records import Document

TEXTS = [
    "",
    "h\u00e9llo \u65e5\u672c \U0001f389",
    "a\nb\r\n\tc \u2028 \x85",
    *(f"document {n}" for n in range(40)),
]


class Killed(BaseException):
    """Stands for the end of the process."""


def kill() -> None:
    raise Killed


def go_on() -> None: ...


def compressed(path: Path, texts: list[str]) -> DataSource:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return DataSource(path=str(path))


def read(directory: Path, source: DataSource, piece_bytes: int = 100, between=go_on) -> Pieces:
    return read_pieces(directory, 0, whole(Path(source.path)), source, piece_bytes, between)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def texts_of(path: Path) -> list[str]:
    records = list(readers.read_split(piece_source(path), whole(path), "documents"))
    assert all(isinstance(record, Document) for record in records)
    return [record.text for record in records]


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    (tmp_path / "blocks").mkdir()
    return tmp_path / "blocks"


@pytest.mark.parametrize("piece_bytes", [1, 100, 10**9])
def test_the_pieces_hold_the_documents_of_the_file_in_order(tmp_path, blocks, piece_bytes):
    source = compressed(tmp_path / "a.jsonl.gz", TEXTS)
    pieces = read(blocks, source, piece_bytes)
    found = [texts_of(blocks / name) for name in pieces.names]
    assert [text for texts in found for text in texts] == TEXTS
    assert all(len(texts) <= 1 + piece_bytes // 20 for texts in found)
    assert pieces.counts.num_rows == pieces.counts.num_records == len(TEXTS)


def test_a_file_of_which_no_document_is_taken_is_one_empty_piece_with_its_counts(tmp_path, blocks):
    source = compressed(tmp_path / "a.jsonl.gz", TEXTS)
    pieces = read(blocks, source.model_copy(update={"part": "heldout", "heldout_frac": 1e-9}))
    assert [texts_of(blocks / name) for name in pieces.names] == [[]]
    assert pieces.counts.num_records == len(TEXTS)


def test_a_killed_reading_begins_again_and_a_whole_one_is_taken(tmp_path, blocks):
    source = compressed(tmp_path / "a.jsonl.gz", TEXTS)
    with pytest.raises(Killed):
        read(blocks, source, between=kill)
    pieces = read(blocks, source)
    (tmp_path / "undisturbed").mkdir()
    assert read(tmp_path / "undisturbed", source) == pieces and len(pieces.names) > 5
    assert contents(tmp_path / "undisturbed") == contents(blocks)
    assert read(blocks, source, between=kill) == pieces


def test_a_damaged_piece_or_record_is_read_again(tmp_path, blocks):
    source = compressed(tmp_path / "a.jsonl.gz", TEXTS)
    pieces = read(blocks, source)
    undamaged = contents(blocks)
    for name in (pieces.names[2], "000000.read.json"):
        (blocks / name).write_bytes(undamaged[name].replace(b"1", b"2"))
        assert contents(blocks) != undamaged
        assert read(blocks, source) == pieces
        assert contents(blocks) == undamaged
