"""Hub datasets: read through a hub on this machine; and one line, soon, when the hub gives nothing."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from stages.config.data import DataSource
from stages.data.reading.hub import hub_commit, is_hub_id, meant_id
from stages.data.reading.readers import content_digest

pytestmark = pytest.mark.process

COMMIT, OTHER = "c" * 40, "d" * 40
README = b"""---
configs:
- config_name: small
  data_files: [{split: train, path: small.jsonl}]
- config_name: large
  data_files: [{split: train, path: large-train.jsonl}, {split: test, path: large-test.jsonl}]
---
"""
FILES = {
    "train.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "test.jsonl": b'{"text": "three"}\n{"text": null}\n',
}
READ = """
import json, sys
from stages.config.data import DataSource
from stages.data.reading import readers
from stages.errors import DataError
for settings in json.loads(sys.argv[1]):
    source = DataSource(**settings)
    try:
        rows = readers.read([source], "documents", seed=0)
        seen = [next(readers.read_whole(source, "documents")).text]
        assert seen == [rows.records[0].text]
        (split,) = readers.splits_of(source, 1)
        assert list(readers.read_split(source, split, "documents")) == rows.records
        print(json.dumps([[r.text for r in rows.records], readers.content_digest(source)]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def read(home: Path, *sources: dict[str, Any], **environment: str) -> list[Any]:
    """What a fresh process makes of the sources: (texts, content digest), or the error line. The hub's
    address and its cache are read when the library is imported.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(sources)],
        env={**kept, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "one line is the reader's, and nothing else is printed"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(FILES, commit=COMMIT, revisions=("main", "v1")) as server:
        yield server


def test_splits_are_read_at_the_commit_that_a_revision_means(tmp_path, hub):
    hub.files = {**FILES, "test.jsonl": b'{"text": "three"}\n'}
    sources = [{"path": "org/name", **more} for more in (
        {}, {"revision": "v1"}, {"revision": COMMIT}, {"split": "test"}, {"split": "train[:1]"},
    )]  # fmt: skip
    newest, tag, commit, test, first = read(tmp_path, *sources, HF_ENDPOINT=hub.url)
    assert newest == tag == commit
    assert [newest[0], test[0], first[0]] == [["one", "two"], ["three"], ["one"]]
    assert len({newest[1], test[1], first[1]}) == 3
    assert any(f"/resolve/{COMMIT}/train.jsonl" in request for request in hub.requests)


def test_a_new_commit_has_other_rows_and_another_digest(tmp_path, hub):
    (before,) = read(tmp_path, {"path": "org/name"}, HF_ENDPOINT=hub.url)
    hub.commit, hub.files = OTHER, {**FILES, "train.jsonl": b'{"text": "new"}\n'}
    (after,) = read(tmp_path, {"path": "org/name"}, HF_ENDPOINT=hub.url)
    assert (before[0], after[0]) == (["one", "two"], ["new"])
    assert before[1] != after[1]


def test_subsets_are_chosen_by_name_and_unknown_names_are_met_with_the_known_ones(tmp_path, hub):
    rows = {name: json.dumps({"text": name}).encode() for name in ("small", "large-train", "large-test")}
    hub.files = {"README.md": README, **{f"{name}.jsonl": row for name, row in rows.items()}}
    sources = [{"path": "org/name", **more} for more in (
        {"subset": "small"}, {"subset": "large", "split": "test"}, {"subset": "big"}, {},
        {"subset": "small", "split": "test"}, {"subset": "small", "revision": "v9"},
    )]  # fmt: skip
    small, large, unknown, unnamed, no_split, no_revision = read(tmp_path, *sources, HF_ENDPOINT=hub.url)
    assert (small[0], large[0]) == (["small"], ["large-test"])
    assert unknown == "org/name: subset: no subset 'big'; subsets are small, large"
    assert unnamed == "org/name: subset: name one; subsets are small, large"
    assert no_split == "org/name: split: no split 'test'; splits are train"
    assert no_revision == "org/name: revision: no commit, tag or branch 'v9'"


def test_errors_in_a_hub_dataset_name_its_row(tmp_path, hub):
    (line,) = read(tmp_path, {"path": "org/name", "split": "test"}, HF_ENDPOINT=hub.url)
    assert line == "org/name:2: text: expected text, got null"


def test_what_the_hub_does_not_give_is_one_line(tmp_path, hub):
    hub.files = {**FILES, "train.jsonl": b'{"text": "one"\n'}
    broken, missing = read(tmp_path, {"path": "org/name"}, {"path": "org/gone"}, HF_ENDPOINT=hub.url)
    assert broken.startswith("org/name: JSON parse error: Missing a comma or '}'")
    assert missing == (
        "org/gone: no such file or directory, and no dataset of the hub either (a private one needs a login)"
    )
    hub.status = 503
    (line,) = read(tmp_path, {"path": "org/name"}, HF_ENDPOINT=hub.url)
    assert line == (
        "cannot reach the hub for org/name: it answered 503; try again later, or give a local path "
        "(there is no "
        "such directory here)"
    )


OFFLINE = "cannot reach the hub for org/name: offline; give a local path (there is no such directory here)"


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_an_unreachable_hub_is_one_line(tmp_path, revision):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        source = {"path": "org/name", "revision": revision}
        assert read(tmp_path, source, HF_ENDPOINT=url) == [OFFLINE]
        assert read(tmp_path, source, HF_HUB_OFFLINE="1", HF_ENDPOINT=url) == [OFFLINE]


def test_a_hub_that_never_answers_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert read(tmp_path, {"path": "org/name"}, HF_ENDPOINT=url) == [OFFLINE]


def test_a_page_instead_of_the_hub_is_no_hub(tmp_path, hub):
    hub.answer = lambda path: (200, {"Content-Type": "text/html"}, b"<html>log in to the network</html>")
    assert read(tmp_path, {"path": "org/name"}, HF_ENDPOINT=hub.url) == [OFFLINE]


def test_rows_of_another_commit_are_never_taken_for_the_one_that_is_asked_for(tmp_path, hub):
    (before,) = read(tmp_path, {"path": "org/name"}, HF_ENDPOINT=hub.url)
    assert before[0] == ["one", "two"]
    hub.commit = OTHER
    sound = hub.answer
    known = ("/api/datasets/org/name", f"/api/datasets/org/name/revision/{OTHER}")
    hub.answer = lambda path: sound(path) if path in known else (404, {}, b"")  # then it is out of order
    assert read(tmp_path, {"path": "org/name"}, HF_ENDPOINT=hub.url) == [OFFLINE], "and not the cached rows"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", True), ("Org-1/name.v2_x", True), ("org/name.jsonl", False), ("org/a.csv.gz", False),
        ("name", False), ("a/b/c", False), ("/org/name", False), ("./name", False), ("../name", False),
        ("org/na*e", False), ("org/name\n", False), ("örg/name", False), ("org/name.arrow", False),
        ("org/name.jsonl.bz2", False), ("org/name.zip", False), ("org/name/", False), ("org/v1.5", True),
    ],
)  # fmt: skip
def test_a_hub_id_is_told_from_a_path(path, expected):
    assert is_hub_id(path) == expected


@pytest.mark.parametrize("ending", ["gguf", "GGUF", "md", "pq", "pt", "onnx", "pdf"])
def test_what_ends_like_a_file_is_no_hub_id(ending):
    assert not is_hub_id(f"org/name.{ending}")


@pytest.mark.parametrize(
    ("path", "kind", "advice"),
    [
        ("https://huggingface.co/datasets/org/name", "dataset", ": write org/name"),
        ("https://huggingface.co/datasets/org/name/tree/main", "dataset", ": write org/name"),
        ("https://hf.co/org/name-1.5", "model", ": write org/name-1.5"),
        ("hf://datasets/org/name@main", "dataset", ": write org/name"),
        ("hf://org/name", "model", ": write org/name"),
        ("squad", "dataset", ""),
        ("squad", "model", None), ("a.jsonl", "dataset", None), ("a/b/c", "dataset", None),
        ("s3://bucket/name", "dataset", None), ("https://example.com/org/name", "dataset", None),
    ],
)  # fmt: skip
def test_what_is_meant_as_a_hub_id_and_is_none_gets_one(path, kind, advice):
    expected = "" if advice is None else f"; a hub id is organisation/name{advice}"
    assert meant_id(path, kind) == expected


def test_a_local_directory_comes_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_id("org/name")


def test_a_whole_commit_needs_no_hub_to_be_identified():
    source = DataSource(path="org/name", revision=COMMIT)
    assert hub_commit(source) == COMMIT
    test = source.model_copy(update={"split": "test"})
    small = source.model_copy(update={"subset": "small"})
    other = source.model_copy(update={"revision": OTHER})
    assert len({content_digest(each) for each in (source, test, small, other)}) == 4
