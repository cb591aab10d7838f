"""The stage task writes examples once; every worker maps the same bytes."""

import pytest

from rollout.ground.errors import EnvironmentProblem
from stages.data.token_file import RECORD_FILE, TOKENS_FILE, Columns, MappedTokens, prepared
from stages.errors import DataError

COLUMNS = Columns(
    ragged={"ids": [(7, 8, 9), (), (5,)]},
    masks={"mask": [(0, 1, 1), (), (1,)]},
    flat={"group": [0, -1, 2]},
    facts={"metrics": [["examples", 3.0], ["dropped", 0.0]], "names": ["é"]},
)


def must_not_run() -> Columns:
    raise AssertionError("the rows are read again")


def test_what_is_written_is_what_is_mapped(tmp_path):
    made = prepared(tmp_path, lambda: COLUMNS)
    tokens = MappedTokens(made)
    assert tokens.num_examples("ids") == 3
    assert [tokens.row("ids", index) for index in range(3)] == [(7, 8, 9), (), (5,)]
    assert [tokens.row("mask", index) for index in range(3)] == [(0, 1, 1), (), (1,)]
    assert tokens.lengths("ids") == tokens.lengths("mask") == [3, 0, 1]
    assert tokens.flat("mask").dtype == "uint8" and tokens.flat("ids").dtype == "int32"
    assert tokens.flat("group").tolist() == [0, -1, 2]
    assert made.facts == COLUMNS.facts and list(dict(made.facts["metrics"])) == ["examples", "dropped"]
    with pytest.raises(IndexError):
        tokens.row("ids", 3)


def test_a_resumed_stage_reads_no_row_again(tmp_path):
    first = prepared(tmp_path, lambda: COLUMNS)
    assert prepared(tmp_path, must_not_run) == first


@pytest.mark.parametrize("name", [TOKENS_FILE, RECORD_FILE])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"{}")])
def test_a_file_or_a_record_that_is_not_whole_is_made_again(tmp_path, name, damage):
    first = prepared(tmp_path, lambda: COLUMNS)
    damage(tmp_path / name)
    assert prepared(tmp_path, lambda: COLUMNS) == first
    assert MappedTokens(first).row("ids", 0) == (7, 8, 9)


def test_of_rows_that_cannot_be_read_nothing_is_written(tmp_path):
    def fails() -> Columns:
        raise DataError("rows.jsonl:3: not JSON")

    with pytest.raises(DataError):
        prepared(tmp_path, fails)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_does_not_see_the_file_says_so_in_one_line(tmp_path):
    made = prepared(tmp_path, lambda: COLUMNS)
    made.path.unlink()
    with pytest.raises(EnvironmentProblem, match=r"tokens\.safetensors: .*not there on this node"):
        MappedTokens(made)


def test_a_worker_that_sees_other_bytes_says_so_in_one_line(tmp_path):
    made = prepared(tmp_path, lambda: COLUMNS)
    content = bytearray(made.path.read_bytes())
    content[-1] ^= 1
    made.path.write_bytes(content)
    with pytest.raises(EnvironmentProblem, match="not the bytes that the stage wrote"):
        MappedTokens(made)
