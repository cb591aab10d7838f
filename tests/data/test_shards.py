"""Token shards: what was written is what is read, row by row."""

import json

import numpy as np
import pytest

from stages.data.shards import ShardCounts, TokenShards, heldout_sequences, write_shards

DOCUMENTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
STREAM = [0, 5, 6, 7, 0, 8, 9, 0, 10, 11, 12, 13, 0, 14, 0]


def write(
    directory, *, vocab_size=100, context_length=4, shard_tokens=4, heldout=((20, 21, 22, 23, 24), (25,))
):
    return write_shards(
        directory,
        DOCUMENTS,
        heldout,
        separator_id=0,
        vocab_size=vocab_size,
        context_length=context_length,
        shard_tokens=shard_tokens,
    )


@pytest.mark.parametrize("shard_tokens", [1, 4, 9, 1000])
def test_documents_are_separated_and_cut_into_rows_whatever_the_shard_size(tmp_path, shard_tokens):
    counts = write(tmp_path, shard_tokens=shard_tokens)
    assert counts == ShardCounts(tokens_train=12, tokens_dropped=3, tokens_heldout=10, rows=3)
    shards = TokenShards(tmp_path)
    assert (len(shards), shards.context_length, shards.separator_id, shards.vocab_size) == (3, 4, 0, 100)
    assert [token for row in range(3) for token in shards.row(row).tolist()] == STREAM[:12]
    assert shards.row(0).dtype == np.int64
    for index in (-1, 3):
        with pytest.raises(IndexError):
            shards.row(index)


def test_small_vocabularies_take_two_bytes_per_token_and_large_ones_four(tmp_path):
    for vocab_size, size, kind in ((2**16, 2, "<u2"), (2**16 + 1, 4, "<u4")):
        write(tmp_path, vocab_size=vocab_size, shard_tokens=1000)
        index = json.loads((tmp_path / "index.json").read_text())
        assert index["dtype"] == kind and (tmp_path / "train-00000.bin").stat().st_size == 12 * size
        assert index["shards"] == [{"file": "train-00000.bin", "tokens": 12}]
        assert TokenShards(tmp_path).row(2).tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("max_tokens", [2, 3, 4, 7, 100])
def test_every_held_out_token_is_predicted_once_whatever_the_window(tmp_path, max_tokens):
    write(tmp_path)
    windows = heldout_sequences(tmp_path, max_tokens)
    assert all(2 <= len(window) <= max_tokens for window in windows)
    predicted = [token for window in windows for token in window[1:].tolist()]
    assert predicted == [20, 21, 22, 23, 24, 0, 25, 0]
    if max_tokens == 100:
        assert [window.tolist() for window in windows] == [[0, 20, 21, 22, 23, 24, 0], [0, 25, 0]]
