"""Validation: what is certain to end a reads is one line that names the file, before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.ground.section import Section
from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig
from stages.config.reward import RewardConfig
from stages.config.sft import SFTConfig
from stages.data.reading import readers
from stages.data.reading.schemas import Kind
from stages.data.validation import Validated, validate
from stages.errors import DataError

HELD_OUT, OTHERS = "question 11", [f"question {number}" for number in range(1, 6)]
"""Prompts on both sides of a share of 0.1."""


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(name: str, *rows: dict[str, Any], **settings: Any) -> DataSource:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=name, **settings)


def documents(name: str, *texts: str, **settings: Any) -> DataSource:
    return written(name, *({"text": text} for text in texts), **settings)


def pairs(name: str, *prompts: str, **columns: str) -> DataSource:
    return written(
        name, *({"prompt": prompt, "chosen": "yes", "rejected": "no", **columns} for prompt in prompts)
    )


def validated(reads: Kind, config: Section, sources: list[DataSource]) -> list[Validated]:
    return validate([source for source in sources if source.weight], reads, config)


def failure(reads: Kind, config: type[Section], *sources: DataSource, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        validated(reads, config(data=list(sources), **settings), list(sources))
    return str(caught.value)


def test_what_a_source_holds_is_counted():
    rows = [{"prompt": "2+2?", "completion": "4"}, {"prompt": 7, "completion": "4"}]
    source = written("a.jsonl", *rows, on_bad_row="skip")
    (found,) = validated("conversations", SFTConfig(data=[source]), [source])
    assert (found.num_records, found.counts.num_rows, found.counts.num_skipped) == (1, 2, 1)


def test_a_weight_that_comes_to_no_row_is_named():
    source = written("a.jsonl", *[{"prompt": "2+2?", "completion": "4"}] * 4, weight=0.1)
    line = "a.jsonl: no rows at weight 0.1 of 4; raise weight, or set it to 0"
    assert failure("conversations", SFTConfig, source) == line
    enough = source.model_copy(update={"weight": 0.2})
    assert validated("conversations", SFTConfig(data=[enough]), [enough])[0].num_records == 4


def test_a_row_without_the_group_column_is_a_bad_row():
    whole = pairs("whole.jsonl", HELD_OUT, *OTHERS, kind="a")
    lacking = pairs("lacking.jsonl", *OTHERS)
    line = "lacking.jsonl:1: kind: missing; columns are prompt, chosen, rejected - set reward.group_column"
    assert failure("pairs", RewardConfig, whole, lacking, group_column="kind") == line
    with pytest.raises(DataError, match=r"lacking\.jsonl:1: kind: missing"):
        readers.read_pairs([whole, lacking], seed=0, group_column="kind")
    tolerated = lacking.model_copy(update={"on_bad_row": "skip", "max_skipped_frac": 1.0})
    Path("lacking.jsonl").write_text(Path("lacking.jsonl").read_text() + Path("whole.jsonl").read_text())
    config = RewardConfig(data=[tolerated], group_column="kind")
    (found,) = validated("pairs", config, [tolerated])
    assert (found.counts.num_skipped, found.num_records) == (5, 6)


def test_pairs_are_needed_on_both_sides_of_the_held_out_share():
    train, heldout = pairs("train.jsonl", *OTHERS), pairs("heldout.jsonl", HELD_OUT)
    line = failure("pairs", RewardConfig, train)
    assert line.startswith("train.jsonl: no held-out pair among 5; add pairs with other prompts")
    assert failure("pairs", RewardConfig, heldout).startswith("heldout.jsonl: no training pair among 1; ")
    both = RewardConfig(data=[train, heldout])
    assert [one.num_records for one in validated("pairs", both, both.data)] == [5, 1]


def test_a_source_whose_documents_are_all_blank_is_named_beside_a_good_one():
    good = documents("good.jsonl", "one text", "another text", "a third")
    blank = documents("blank.jsonl", "", " \n")
    line = "blank.jsonl: no rows left of 2 (dropped: 2 by length (too_short)); set milder rules, or weight: 0"
    assert failure("documents", PrepareConfig, good, blank) == line


def test_documents_that_would_all_be_held_out_are_named():
    line = "one.jsonl: no rows left to train on: held out {} of {} (prepare.heldout_frac 0.01, one document "
    line += "at least); add documents, or lower heldout_frac"
    assert failure("documents", PrepareConfig, documents("one.jsonl", "a text")) == line.format(1, 1)
    copies = documents("one.jsonl", "a text", "a text\r\n")
    assert failure("documents", PrepareConfig, copies) == line.format(2, 2)
    two = PrepareConfig(data=[documents("one.jsonl", "a text", "another")])
    assert validated("documents", two, two.data)[0].num_records == 2


def test_a_weight_that_takes_no_document_is_named_where_it_alone_decides():
    large = documents("large.jsonl", *(f"a text {number}" for number in range(20)))
    small = documents("small.jsonl", *(f"another {number}" for number in range(4)), weight=0.1)
    line = "small.jsonl: no rows at weight 0.1 and mixing_temperature 1 of 4; raise weight, or set it to 0"
    assert failure("documents", PrepareConfig, large, small) == line
    evened = PrepareConfig(data=[large, small], mixing_temperature=100)
    assert [one.num_records for one in validated("documents", evened, evened.data)] == [20, 4]
