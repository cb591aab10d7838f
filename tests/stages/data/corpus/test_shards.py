"""Token shards: what was written is what is read, row by row, and no row mixes documents."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.corpus import row_packers as module
from stages.data.corpus.row_packers import MIN_CHUNK, chunk_spans
from stages.data.corpus.shards import (
    ShardCounts,
    TokenRow,
    TokenShards,
    check_digests,
    heldout_sequences,
    write_shards,
)
from stages.errors import DataError

SEP = 0
DOCUMENTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
STREAM = [0, 5, 6, 7, 0, 8, 9, 0, 10, 11, 12, 13, 0, 14, 0]
PACKINGS = ["concat", "best_fit", "bucket"]


def write(
    directory,
    documents=DOCUMENTS,
    *,
    packing="concat",
    vocab_size=100,
    context_length=4,
    shard_tokens=4,
    heldout=((20, 21, 22, 23, 24), (25,)),
) -> ShardCounts:
    return write_shards(
        directory,
        documents,
        heldout,
        packing=packing,
        separator_id=SEP,
        vocab_size=vocab_size,
        context_length=context_length,
        shard_tokens=shard_tokens,
    )


def documents_of(*lengths: int) -> list[list[int]]:
    """Documents of which no token occurs twice, in any of them."""
    ids = iter(range(1, 1 + sum(lengths)))
    return [[next(ids) for _ in range(length)] for length in lengths]


VARIED = documents_of(1, 40, 3, 15, 16, 17, 100, 2, 64, 5, 33, 29, 7, 70)


def rows_of(directory: Path) -> list[TokenRow]:
    shards = TokenShards(directory)
    return [shards.row(index) for index in range(len(shards))]


def segments_of(rows: list[TokenRow]) -> list[list[int]]:
    return [segment.tolist() for row in rows for segment in np.split(row.ids, np.cumsum(row.lengths)[:-1])]


def predictions_of(rows: list[TokenRow]) -> list[tuple[list[int], int]]:
    """(what of its segment stands before it, the token) of every target: all that a model is trained on."""
    found = []
    for row in rows:
        starts = np.cumsum([0, *row.lengths])
        for place in np.flatnonzero(row.is_target):
            start = starts[np.searchsorted(starts, place - 1, side="right") - 1]
            found.append((row.ids[start:place].tolist(), int(row.ids[place])))
    return found


# concat


@pytest.mark.parametrize("shard_tokens", [1, 4, 9, 1000])
def test_documents_are_separated_and_cut_into_rows_whatever_the_shard_size(tmp_path, shard_tokens):
    counts = write(tmp_path, shard_tokens=shard_tokens)
    assert counts == ShardCounts(
        rows=3,
        tokens_train=12,
        tokens_text=10,
        tokens_dropped=3,
        tokens_repeated=0,
        tokens_heldout=10,
        utilisation=1.0,
    )
    shards = TokenShards(tmp_path)
    assert (len(shards), shards.context_length, shards.separator_id, shards.vocab_size) == (3, 4, 0, 100)
    assert [token for row in range(3) for token in shards.row(row).ids.tolist()] == STREAM[:12]
    assert shards.row(0).ids.dtype == np.int64
    for index in (-1, 3):
        with pytest.raises(IndexError):
            shards.row(index)


def test_under_concat_a_document_is_a_segment_from_its_separator_on_and_goes_on_in_the_next_row(tmp_path):
    """0 5 6 7 | 0 8 9 0 | 10 11 12 13"""
    write(tmp_path)
    assert [row.lengths for row in rows_of(tmp_path)] == [(4,), (3, 1), (4,)]


def test_under_concat_the_closing_separator_is_a_target_of_its_document_and_the_first_input_of_the_next(
    tmp_path,
):
    """0 5 6 7 0 8 9 0 | 10 11 12 13 0 14 0 is cut off."""
    write(tmp_path, context_length=8)
    (row,) = rows_of(tmp_path)
    assert row.lengths == (4, 3, 1)
    assert row.is_target.tolist() == [False] + [True] * 7
    predicted = predictions_of([row])
    assert ([0, 5, 6, 7], 0) in predicted and ([0, 8, 9], 0) in predicted, "both documents learn to end"
    assert ([0], 5) in predicted and ([0], 8) in predicted, "both learn to begin, from the separator alone"
    assert TokenShards(tmp_path).num_targets(0) == 7


# best_fit


def test_under_best_fit_documents_stay_whole_and_what_is_left_of_a_row_is_padding(tmp_path):
    """Lengths with separators 5, 4, 6, 3 in rows of 9: 6 + 3 and 5 + 4."""
    counts = write(tmp_path, packing="best_fit", context_length=9)
    assert segments_of(rows_of(tmp_path)) == [
        [0, 10, 11, 12, 13, 0],
        [0, 14, 0],
        [0, 5, 6, 7, 0],
        [0, 8, 9, 0],
    ]
    assert (counts.rows, counts.tokens_train, counts.utilisation) == (2, 18, 1.0)
    counts = write(tmp_path, packing="best_fit", context_length=8)
    assert [row.lengths for row in rows_of(tmp_path)] == [(6,), (5, 3), (4,)]
    assert counts.utilisation == 18 / 24 and (counts.tokens_dropped, counts.tokens_repeated) == (0, 0)
    assert [len(row.ids) for row in rows_of(tmp_path)] == [6, 8, 4], "padding is not read"
    assert [TokenShards(tmp_path).num_targets(index) for index in range(3)] == [5, 6, 3]
    assert (tmp_path / "train-00000.bin").stat().st_size == 8 * 2


def test_under_best_fit_the_pieces_of_a_long_document_predict_each_of_its_tokens_once(tmp_path):
    counts = write(tmp_path, [list(range(1, 12))], packing="best_fit", context_length=4)
    pieces = segments_of(rows_of(tmp_path))
    assert pieces == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [9, 10, 11, 0]]
    assert counts.tokens_repeated == 3


def test_best_fit_chooses_within_windows_of_bounded_size(tmp_path, monkeypatch):
    """Documents of 9 and 3 with their separators: in windows of two they share a row of 12."""
    documents = documents_of(*[7, 1] * 5)
    write(tmp_path, documents, packing="best_fit", context_length=12)
    assert [sorted(row.lengths) for row in rows_of(tmp_path)] == [[3, 9]] * 5
    monkeypatch.setattr(module, "WINDOW_PIECES", 1)
    write(tmp_path, documents, packing="best_fit", context_length=12)
    assert [row.lengths for row in rows_of(tmp_path)] == [(9,), (3,)] * 5


# bucket


@pytest.mark.parametrize(
    ("num_tokens", "context_length", "spans"),
    [
        (85, 32, [(0, 32), (32, 32), (64, 16), (69, 16)]),
        (64, 64, [(0, 64)]),
        (112, 64, [(0, 64), (64, 32), (96, 16)]),
        (17, 64, [(0, 16), (1, 16)]),
        (11, 64, [(0, 8), (3, 8)]),
        (3, 64, [(0, 2), (1, 2)]),
        (2, 64, [(0, 2)]),
        (200, 100, [(0, 64), (64, 64), (128, 64), (184, 16)]),
    ],
)
def test_chunks_are_the_largest_powers_of_two_and_the_last_one_reaches_back(
    num_tokens, context_length, spans
):
    assert chunk_spans(num_tokens, context_length) == spans


@given(num_tokens=st.integers(2, 5000), context_length=st.integers(16, 2048))
def test_chunks_are_powers_of_two_that_reassemble_to_the_document(num_tokens, context_length):
    spans = chunk_spans(num_tokens, context_length)
    document = list(range(num_tokens))
    again: list[int] = []
    for start, length in spans:
        assert length & (length - 1) == 0 and length <= context_length
        assert start <= len(again), "no gap"
        again[start:] = document[start : start + length]
    assert again == document
    assert sum(length for _, length in spans) - num_tokens < MIN_CHUNK
    if num_tokens >= MIN_CHUNK:
        assert min(length for _, length in spans) >= MIN_CHUNK


def test_under_bucket_a_row_holds_chunks_of_one_length_and_nothing_of_any_document_is_lost(tmp_path):
    counts = write(tmp_path, VARIED, packing="bucket", vocab_size=500, context_length=64, shard_tokens=128)
    rows = rows_of(tmp_path)
    for row in rows:
        (length,) = set(row.lengths)
        assert length & (length - 1) == 0 and len(row.lengths) <= 64 // length
    expected = [
        [SEP, *document, SEP][start : start + length]
        for document in VARIED
        for start, length in chunk_spans(len(document) + 2, 64)
    ]
    assert sorted(segments_of(rows)) == sorted(expected)
    assert counts.tokens_repeated == sum(map(len, expected)) - sum(len(document) + 2 for document in VARIED)
    partial = [row.lengths[0] for row in rows if len(row.ids) < 64]
    assert len(partial) == len(set(partial)), "padding in the last row of a length only"


# All packings


@pytest.mark.parametrize("packing", PACKINGS)
def test_no_target_is_predicted_from_another_document(tmp_path, packing):
    """Each target, with all that its prediction may attend to, is a piece of one document."""
    write(tmp_path, VARIED, packing=packing, vocab_size=500, context_length=32)
    whole = [" ".join(map(str, [SEP, *document, SEP])) + " " for document in VARIED]
    predicted = predictions_of(rows_of(tmp_path))
    assert len(predicted) == sum(TokenShards(tmp_path).num_targets(i) for i in range(len(rows_of(tmp_path))))
    for before, token in predicted:
        assert before, "something predicts it"
        piece = " ".join(map(str, [*before, token])) + " "
        assert any(text.startswith(piece) or f" {piece}" in text for text in whole), (before, token)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_model_learns_how_documents_begin_and_end(tmp_path, packing):
    """Each document comes four times, for a row's end may fall between its last token and the separator."""
    documents = [*VARIED, list(range(450, 490))] * 4
    write(tmp_path, documents, packing=packing, vocab_size=500, context_length=128)
    predicted = predictions_of(rows_of(tmp_path))
    for document in VARIED:
        assert ([SEP], document[0]) in predicted
        assert any(before[-1] == document[-1] and token == SEP for before, token in predicted)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_same_documents_give_the_same_bytes_and_the_index_their_digests(tmp_path, packing):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, iter(VARIED), packing=packing, vocab_size=500, context_length=32)
    digests = [
        {path.name: blake3(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    index = json.loads((tmp_path / "one" / "index.json").read_text())
    entries = [*index["shards"], *(index["segments"][key] for key in ("lengths", "offsets"))]
    entries += [index["heldout"][key] for key in ("ids", "lengths")]
    assert {entry["file"]: entry["blake3"] for entry in entries} == {
        name: digest for name, digest in digests[0].items() if name != "index.json"
    }
    assert sum(shard["rows"] for shard in index["shards"]) == index["rows"] == len(rows_of(tmp_path / "one"))
    assert sum(shard["tokens"] for shard in index["shards"]) == index["tokens"]
    assert index["utilisation"] == index["tokens"] / index["slots"] == index["tokens"] / (index["rows"] * 32)


@pytest.mark.parametrize("packing", PACKINGS)
def test_shards_are_on_the_disk_before_the_last_document_is_read(tmp_path, monkeypatch, packing):
    monkeypatch.setattr(module, "WINDOW_TOKENS", 256)
    early = []

    def documents() -> Iterator[list[int]]:
        yield from documents_of(*[30] * 40)
        early.extend(path.name for path in tmp_path.glob("train-*.bin"))

    write(tmp_path, documents(), packing=packing, vocab_size=2000, context_length=32, shard_tokens=64)
    assert len(early) > 10


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    context_length=st.sampled_from([16, 24, 32, 64]),
    packing=st.sampled_from(PACKINGS),
)
def test_rows_never_overflow_and_counts_add_up(tmp_path_factory, lengths, context_length, packing):
    directory = tmp_path_factory.mktemp("shards")
    documents = documents_of(*lengths)
    counts = write(directory, documents, packing=packing, vocab_size=4000, context_length=context_length)
    rows = rows_of(directory)
    assert all(0 < len(row.ids) == sum(row.lengths) <= context_length for row in rows)
    assert counts.rows == len(rows) and counts.tokens_text == sum(lengths)
    assert counts.tokens_train == sum(len(row.ids) for row in rows)
    separators = len(lengths) + 1 if packing == "concat" else 2 * len(lengths)
    written = sum(lengths) + separators + counts.tokens_repeated
    assert counts.tokens_train + counts.tokens_dropped == written


def test_small_vocabularies_take_two_bytes_per_token_and_large_ones_four(tmp_path):
    for vocab_size, size, kind in ((2**16, 2, "<u2"), (2**16 + 1, 4, "<u4")):
        write(tmp_path, vocab_size=vocab_size, shard_tokens=1000)
        index = json.loads((tmp_path / "index.json").read_text())
        assert index["dtype"] == kind and (tmp_path / "train-00000.bin").stat().st_size == 12 * size
        (shard,) = index["shards"]
        assert (shard["file"], shard["tokens"], shard["rows"], shard["bytes"]) == (
            "train-00000.bin",
            12,
            3,
            12 * size,
        )
        assert TokenShards(tmp_path).row(2).ids.tolist() == [10, 11, 12, 13]


# Files that are not whole


@pytest.mark.parametrize(
    "name",
    ["train-00001.bin", "segment_lengths.bin", "segment_offsets.bin", "heldout.bin", "heldout_lengths.bin"],
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_cut_or_missing_file_is_one_line(tmp_path, name, damage):
    write(tmp_path)
    path = tmp_path / name
    size = path.stat().st_size
    found = "no such file" if damage == "gone" else f"{size - 1} bytes"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError) as error:
        TokenShards(tmp_path)
        heldout_sequences(tmp_path, 8)
    assert str(error.value) == (
        f"{path}: {found}, where index.json says {size} bytes; copy it again, or run rlhf prepare"
    )


def test_segments_of_other_shards_are_refused(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"].pop()
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"segment_offsets\.bin: does not belong to these shards"):
        TokenShards(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; give a directory that rlhf prepare wrote"),
        ('{"format": 2, "pack', "not valid JSON"),
        ('{"dtype": "<u2"}', "not an index of format 2; run rlhf prepare of this version"),
        ("[]", "not an index of format 2"),
    ],
)
def test_an_index_that_cannot_be_read_is_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=words) as error:
        TokenShards(tmp_path)
    assert "\n" not in str(error.value)


def test_a_changed_byte_is_found_by_its_digest(tmp_path):
    write(tmp_path)
    check_digests(tmp_path)
    path = tmp_path / "train-00002.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"train-00002\.bin: not the bytes that were written"):
        check_digests(tmp_path)


# Held out


@pytest.mark.parametrize("max_tokens", [2, 3, 4, 7, 100])
def test_every_held_out_token_is_predicted_once_whatever_the_window(tmp_path, max_tokens):
    write(tmp_path)
    windows = heldout_sequences(tmp_path, max_tokens)
    assert all(2 <= len(window) <= max_tokens for window in windows)
    predicted = [token for window in windows for token in window[1:].tolist()]
    assert predicted == [20, 21, 22, 23, 24, 0, 25, 0]
    if max_tokens == 100:
        assert [window.tolist() for window in windows] == [[0, 20, 21, 22, 23, 24, 0], [0, 25, 0]]


def test_there_may_be_nothing_held_out_and_nothing_to_train_on(tmp_path):
    counts = write(tmp_path, [], heldout=[])
    assert counts.rows == counts.tokens_heldout == 0 and counts.utilisation == 0.0
    assert len(TokenShards(tmp_path)) == 0 and heldout_sequences(tmp_path, 8) == []
