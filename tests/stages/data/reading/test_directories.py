"""Directories: of what people bring as one, the data of a split is read, and all else is named with a "
"reason."""

import json
import re
from pathlib import Path

import pyarrow
import pytest

from stages.config.data import DataSource
from stages.data.reading import readers
from stages.data.reading.directories import split_of
from stages.data.reading.places import found_at
from stages.errors import DataError

PAGE = (Path(__file__).parents[4] / "docs/data.md").read_text(encoding="utf-8")
ROW = json.dumps({"prompt": "Cow?", "completion": "Moo."})


def filled(directory: Path, *names: str) -> Path:
    """The directory with these files, each with a row that sft reads where its kind has any."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{ROW}\n")
    listed = [{"filename": name} for name in names if re.fullmatch(r"data-.*\.arrow", name)]
    if "state.json" in names:
        (directory / "state.json").write_text(json.dumps({"_data_files": listed, "_split": "train"}))
    return directory


def read_of(directory: Path, split: str = "train") -> list[str]:
    return [str(path.relative_to(directory)) for path in found_at(str(directory), split).files]


def left_out_of(directory: Path, split: str = "train") -> set[tuple[str, str]]:
    found = found_at(str(directory), split)
    return {(str(one.path.relative_to(directory)), one.why) for one in found.left_out}


def table_of_the_page() -> list[list[str]]:
    rows = PAGE[PAGE.index("\n| below the directory |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize(("names", "split", "read", "left_out"), table_of_the_page())
def test_a_directory_is_read_as_the_page_says(tmp_path, names, split, read, left_out):
    filled(tmp_path, *re.findall(r"`([^`]+)`", names))
    split = split.strip("`") or "train"
    assert read_of(tmp_path, split) == re.findall(r"`([^`]+)`", read)
    groups = re.findall(r"((?:`[^`]+`(?:, )?)+) \(([^)]+)\)", left_out)
    expected = {(name, why) for group, why in groups for name in re.findall(r"`([^`]+)`", group)}
    assert left_out_of(tmp_path, split) == expected


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"), ("data/train-00000-of-00002.parquet", "train"),
        ("train/part-1.jsonl", "train"),
        ("my_test.jsonl", "test"), ("TEST.csv", "test"), ("dev-v2.0.json", "validation"),
        ("gsm8k.val.jsonl", "validation"), ("eval/a.jsonl", "validation"), ("TrainData.jsonl", "train"),
        ("test2019.csv", "test"), ("train_sft-00000-of-00001-b42a775f407cee45.parquet", "train"),
        ("test/train.jsonl", "train"), ("train/a/b/c.jsonl", "train"), ("training/x.jsonl", "train"),
        ("contest.jsonl", None), ("trainer.jsonl", None), ("latest.jsonl", None), ("devices/a.jsonl", None),
        ("train_test.jsonl", None), ("test/train_test.jsonl", "test"), ("validity.jsonl", None),
        ("heldout.jsonl", "test"), ("held_out/a.jsonl", "test"), ("HoldOut-1.jsonl", "test"),
        ("upheld_out.jsonl", None), ("a.jsonl", None), ("\u00e9test.jsonl", None),
    ],
)  # fmt: skip
def test_a_split_is_told_by_a_word_of_its_own_nearest_to_the_file(name, split):
    assert split_of(Path("test/d") / name, Path("test/d")) == split, "its own name is no reason"


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (("a.jsonl", "test.jsonl"), "train", ["a.jsonl", "test.jsonl"]),
        (("test.jsonl",), "train", ["test.jsonl"]),
        (("a.jsonl", "test.jsonl"), "test", ["test.jsonl"]),
        (("train.jsonl", "valid.jsonl", "test.jsonl"), "train+validation", ["train.jsonl", "valid.jsonl"]),
        (("train.jsonl", "valid.jsonl", "test.jsonl"), "dev", ["valid.jsonl"]),
        (("data/train_sft-0.jsonl", "data/train_prefs-0.jsonl", "data/test_sft-0.jsonl"), "train_sft",
         ["data/train_sft-0.jsonl"]),
        (("train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl"), "train",
         ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]),
        ((".hidden.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl", "_SUCCESS", "a.jsonl"), "train",
         ["a.jsonl"]),
    ],
)  # fmt: skip
def test_a_split_picks_its_files(tmp_path, names, split, read):
    assert read_of(filled(tmp_path, *names), split) == read


@pytest.mark.parametrize(
    ("names", "split", "line"),
    [
        (("test.jsonl", "dev.jsonl"), "train",
         "d: split: no file of split 'train' by its name; splits are test, validation - set split: to "
         "one of them, or name the files"),
        (("a.jsonl",), "test",
         "d: split: no file of split 'test' by its name; splits are none - set split: to one of them, "
         "or name the files"),
        (("train.jsonl", "test.jsonl"), "train[:10%]",
         "d: split: train[:10%]: only a split of the hub can be cut"),
        (("README.jsonl", "a.xlsx"), "train",
         "d: no jsonl, json, parquet, arrow, csv, tsv, txt file in this directory; left out: "
         "README.jsonl (no data by its name); a.xlsx (its ending is not read)"),
        (("state.json", "data-1.arrow"), "train", None),
    ],
)  # fmt: skip
def test_what_a_directory_does_not_hold_is_one_line(tmp_path, monkeypatch, names, split, line):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / "d", *names)
    if line is None:
        (tmp_path / "d/data-1.arrow").unlink()
        line = "d/state.json: names data-1.arrow, which is not there; save the dataset again"
    with pytest.raises(DataError) as caught:
        found_at("d", split)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "name",
    ["MIT-LICENSE.txt", "llama_3_license.txt", "ATTRIBUTION.txt", "TERMS.txt", "terms_of_use.txt",
     "SHA256SUMS.txt", "md5sum.txt", "checksums.txt", "README.txt",
     "readme.zh.txt", "README_zh.txt", "LICENSE.txt", "LICENSE-MIT.txt", "Licence.txt",
     "NOTICE.txt",
     "requirements.txt", "requirements-dev.txt",
     "cache-0a1f.arrow", "dataset_infos.json", "config.json", "tokenizer.json"],
)  # fmt: skip
def test_documentation_and_metadata_are_no_data_unless_they_are_named(tmp_path, name):
    filled(tmp_path, name, "a.jsonl")
    assert read_of(tmp_path) == ["a.jsonl"]
    assert left_out_of(tmp_path) == {(name, "no data by its name")}
    assert found_at(str(tmp_path / name), "train").files == (tmp_path / name,)


@pytest.mark.parametrize(
    "name",
    [
        "license_questions.jsonl",
        "readmes.jsonl",
        "changes.txt",
        "configs.json",
        "driver_license.txt",
        "sha.txt",
        "terminals.txt",
    ],
)
def test_names_that_only_begin_like_documentation_are_data(tmp_path, name):
    assert read_of(filled(tmp_path, name)) == [name]


def test_a_file_or_glob_that_is_named_is_never_filtered(tmp_path):
    filled(tmp_path, "train.jsonl", "test.jsonl", "README.jsonl")
    assert len(found_at(str(tmp_path / "*.jsonl"), "train").files) == 3
    assert found_at(str(tmp_path / "test.jsonl"), "train").files == (tmp_path / "test.jsonl",)


def test_links_are_followed_and_another_name_of_a_file_is_said(tmp_path):
    filled(tmp_path, "blobs/1f", "blobs/2e")
    snapshot = tmp_path / "snapshots/main"
    (snapshot / "data").mkdir(parents=True)
    for name, blob in (("train-0.jsonl", "1f"), ("test-0.jsonl", "2e"), ("train-1.jsonl", "1f")):
        (snapshot / "data" / name).symlink_to(tmp_path / "blobs" / blob)
    assert read_of(snapshot) == ["data/train-0.jsonl"]
    assert left_out_of(snapshot) == {
        ("data/test-0.jsonl", "split test"),
        ("data/train-1.jsonl", "another name of a file that is read"),
    }


def saved(directory: Path, *texts: str, shards: tuple[str, ...] = ("data-00000-of-00001.arrow",)) -> None:
    """What `datasets.save_to_disk` writes, as far as it is read."""
    directory.mkdir(parents=True)
    for shard in shards:
        table = pyarrow.table({"text": [f"{text} {shard[5:10]}" for text in texts]})
        with pyarrow.ipc.new_stream(directory / shard, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": shard} for shard in shards], "_fingerprint": "abc", "_split": None}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text("{}")


def texts_of(directory: Path, **settings: str) -> list[str]:
    source = DataSource(path=str(directory), **settings)
    return [document.text for document in readers.read_source(source, "documents").records]


def test_what_save_to_disk_wrote_is_read_in_the_order_of_its_state(tmp_path):
    shards = ("data-00001-of-00002.arrow", "data-00000-of-00002.arrow")
    saved(tmp_path / "d", "a", "b", shards=shards)
    (tmp_path / "d/cache-1f.arrow").write_bytes(b"not data")
    assert texts_of(tmp_path / "d") == ["a 00001", "b 00001", "a 00000", "b 00000"]


def test_a_saved_dataset_dict_has_a_folder_for_each_split(tmp_path):
    for split in ("train", "test"):
        saved(tmp_path / "d" / split, split)
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts_of(tmp_path / "d") == ["train 00000"]
    assert texts_of(tmp_path / "d", split="test") == ["test 00000"]


def saved_dict(directory: Path, *splits: str, stated: tuple[str, ...] = ()) -> Path:
    for split in splits:
        saved(directory / split, split)
    (directory / "dataset_dict.json").write_text(json.dumps({"splits": stated or splits}))
    return directory


def test_the_splits_of_a_saved_dataset_dict_are_those_that_it_states(tmp_path):
    one = saved_dict(tmp_path / "d", "train", "calibration", "train_more")
    assert texts_of(one) == ["train 00000"]
    assert texts_of(one, split="calibration") == ["calibration 00000"]
    assert ("calibration/data-00000-of-00001.arrow", "split calibration") in left_out_of(one)
    assert texts_of(saved_dict(tmp_path / "e", "train_sft", "probe")) == ["train_sft 00000"]
    assert texts_of(saved_dict(tmp_path / "f", "calibration")) == ["calibration 00000"]
    with pytest.raises(
        DataError, match="no file of split 'train' by its name; splits are calibration, probe"
    ):
        texts_of(saved_dict(tmp_path / "g", "calibration", "probe"))
    with pytest.raises(DataError, match="no file of split 'train'"):
        texts_of(saved_dict(tmp_path / "h", "test", stated=("train", "test")))


def test_what_save_to_disk_wrote_of_no_row_has_no_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "d", shards=())
    saved_dict(tmp_path / "e", "test")
    saved(tmp_path / "e/train", shards=())
    for path, line in (("d", "d: no rows"), ("e", "e/train: no rows")):
        with pytest.raises(DataError) as caught:
            found_at(path, "train")
        assert str(caught.value) == line
    assert texts_of(Path("e"), split="test") == ["test 00000"]


def test_the_content_digest_covers_what_is_read_and_nothing_else(tmp_path):
    filled(tmp_path, "train.jsonl", "test.jsonl", "README.txt", "config.json")
    source = DataSource(path=str(tmp_path))
    before = readers.content_digest(source)
    for name in ("test.jsonl", "README.txt", "config.json"):
        (tmp_path / name).write_text(f"{ROW}\n{ROW}\n")
    assert readers.content_digest(source) == before
    test = source.model_copy(update={"split": "test"})
    assert readers.content_digest(test) != before
    (tmp_path / "train.jsonl").write_text(f"{ROW}\n{ROW}\n")
    assert readers.content_digest(source) != before


@pytest.mark.parametrize("name", ["stats.csv", "zz.csv"])
def test_a_file_of_other_columns_is_named_beside_one_that_can_be_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / "d", "train.jsonl")
    (tmp_path / "d" / name).write_text("name,value\nrows,3\n")
    with pytest.raises(DataError) as caught:
        readers.read_source(DataSource(path="d"), "conversations")
    assert str(caught.value) == (
        f"d/{name}:2: columns name, value are not those of d/train.jsonl (prompt, completion), and one "
        "entry has one format; move this file elsewhere, or name the others by a glob"
    )


def test_a_bad_first_row_of_a_file_of_the_same_format_is_not_called_foreign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / "d", "a.jsonl")
    (tmp_path / "d/b.jsonl").write_text('{"prompt": "x", "completion": " ", "source": "web"}\n')
    with pytest.raises(DataError, match=r"d/b\.jsonl:1: completion: empty response"):
        readers.read_source(DataSource(path="d"), "conversations")
