"""Whole bytes are taken, and of all others it is told which differ."""

import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from blake3 import blake3

from rollout.ground.whole import (
    Measured,
    NotWhole,
    bad_sectors_as_damage,
    block_bytes,
    block_content,
    check_directory,
    check_own_digest,
    file_digest,
    files_below,
    holds,
    measure,
    record_content,
    record_text,
    whole_record,
    with_own_digest,
    write_record,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Three files, one of them in a directory below, and the record that lists them."""
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "below/b").write_bytes(b"")
    (tmp_path / "record.json").write_text("{}")
    return tmp_path


def listed(directory: Path) -> dict[str, Measured]:
    return {name: measure(path) for name, path in files_below(directory).items() if name != "record.json"}


def test_a_file_is_told_by_its_size_and_its_blake3(directory: Path):
    assert measure(directory / "a") == Measured(size=3, blake3=blake3(b"one").hexdigest())
    assert holds(directory / "a", measure(directory / "a"))
    assert not holds(directory / "below/b", measure(directory / "a"))
    assert not holds(directory / "below", measure(directory / "a"))
    assert not holds(directory / "nowhere", measure(directory / "a"))


def test_a_part_of_a_file_has_a_digest_too(directory: Path):
    assert file_digest(directory / "a", 1, 3) == blake3(b"ne").hexdigest()
    assert file_digest(directory / "a", 1) == blake3(b"ne").hexdigest()


def test_a_file_of_another_size_is_not_read(directory: Path):
    def never(path: Path) -> str:
        raise AssertionError(path)

    assert not holds(directory / "a", Measured(size=4, blake3=""), never)


def test_a_directory_as_it_was_written_is_whole(directory: Path):
    check_directory(directory, listed(directory), record="record.json")
    assert list(files_below(directory)) == ["a", "below/b", "record.json"]


DAMAGE = {
    "a: not the bytes that record.json records": lambda path: (path / "a").write_bytes(b"two"),
    "a: missing, but record.json lists it": lambda path: (path / "a").unlink(),
    "below/b: missing, but record.json lists it": lambda path: (
        (path / "below/b").unlink(),
        (path / "below/b").mkdir(),
    ),
    "below/c: not listed in record.json": lambda path: (path / "below/c").touch(),
    "z: not listed in record.json": lambda path: (path / "z").symlink_to("nowhere"),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_what_differs_in_a_directory_is_named(directory: Path, said: str):
    files = listed(directory)
    DAMAGE[said](directory)
    with pytest.raises(NotWhole) as caught:
        check_directory(directory, files, record="record.json")
    assert str(caught.value) == said


def test_a_record_holds_the_digest_of_itself():
    text = record_text({"step": 3, "loss": 0.5})
    empty = text.replace(json.loads(text)["digest"], "")
    assert empty == '{"digest": "", "step": 3, "loss": 0.5}\n'
    assert json.loads(text)["digest"] == blake3(empty.encode()).hexdigest()
    assert record_content(text) == {"step": 3, "loss": 0.5}


def test_only_the_first_digest_of_a_text_is_its_own():
    text = record_text({"inner": {"digest": ""}})
    assert record_content(text) == {"inner": {"digest": ""}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        '{"digest": ""}',
        '{"digest": null, "step": 3}',
        record_text({"step": 3}).replace('"step": 3', '"step": 4'),
        record_text({"step": 3}) + " ",
        record_text({"step": 3})[:-2],
    ],
)
def test_a_text_that_was_not_written_as_a_record_is_none(text: str):
    with pytest.raises(NotWhole, match=r"not a record|not the record that was written"):
        record_content(text)


def test_a_text_in_another_layout_holds_its_digest_as_well():
    text = with_own_digest('{\n  "digest": "",\n  "step": 3\n}\n')
    check_own_digest(text, json.loads(text)["digest"])
    for changed in (text.replace('"step": 3', '"step": 4'), text.replace('"digest": "', '"digest":"')):
        with pytest.raises(NotWhole, match="not the record that was written"):
            check_own_digest(changed, json.loads(text)["digest"])


def test_a_record_beside_its_files_is_taken_while_all_of_them_hold(directory: Path):
    files = [directory / "a", directory / "below/b"]
    beside = directory / "below/b.json"
    write_record(directory / "a.json", files[:1], {"count": 1})
    write_record(beside, files[1:], {"count": 2})
    assert whole_record(directory / "a.json") == {"files": {"a": asdict(measure(files[0]))}, "count": 1}
    assert whole_record(beside) == {"files": {"b": asdict(measure(files[1]))}, "count": 2}
    (directory / "a").write_bytes(b"two")
    assert whole_record(directory / "a.json") is None
    assert whole_record(directory / "none.json") is None
    beside.write_bytes(b"\xff")
    assert whole_record(beside) is None


def test_a_block_is_read_by_its_own_kind_and_version_only():
    content = block_bytes("rollouts", 3, b"\n\0bytes")
    assert content == b"rollouts 3 " + blake3(b"\n\0bytes").hexdigest().encode() + b"\n\n\0bytes"
    assert block_content(content, kind="rollouts", version=3) == b"\n\0bytes"
    with pytest.raises(NotWhole, match="schema version 3, this code reads 4"):
        block_content(content, kind="rollouts", version=4)
    with pytest.raises(NotWhole, match="not a file of tokens"):
        block_content(content, kind="tokens", version=3)
    for damaged in (content[:-1], content + b"\0", content.replace(b"bytes", b"bites")):
        with pytest.raises(NotWhole, match="not the bytes that were written"):
            block_content(damaged, kind="rollouts", version=3)
    for none in (b"", b"\0" * 200, content[10:], b"rollouts 3 " + b"0" * 64):
        with pytest.raises(NotWhole, match="not a file of rollouts"):
            block_content(none, kind="rollouts", version=3)


def test_a_bad_sector_is_damage_and_a_missing_permission_is_none(tmp_path: Path):
    (tmp_path / "a").symlink_to("/proc/self/mem")  # no memory lies at address 0
    with pytest.raises(NotWhole, match=r"^a: Input/output error$"), bad_sectors_as_damage():
        file_digest(tmp_path / "a")
    with pytest.raises(PermissionError), bad_sectors_as_damage():
        raise PermissionError(errno.EACCES, "Permission denied")
