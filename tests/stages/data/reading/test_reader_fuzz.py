"""Whatever stands in a file of whatever kind: records, or a DataError of one printable line. Nothing else."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.config.data import DataSource
from stages.data.reading import readers
from stages.data.reading.schemas import Kind
from stages.errors import DataError

STAGES: tuple[Kind, ...] = get_args(Kind)
TEXT_KINDS = ("jsonl", "json", "csv", "tsv", "txt")
NAMES = [f"a.{kind}{suffix}" for kind in TEXT_KINDS for suffix in ("", ".gz", ".zst")]
NAMES += ["a.parquet", "a.arrow"]
FUZZ = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TURN = "\n\nHuman: q\n\nAssistant: "
ROWS: list[dict[str, Any]] = [
    {"text": "one", "prompt": "q", "completion": "a", "chosen": "good", "rejected": "bad", "label": True},
    {"text": "2\n", "prompt": "p", "completion": "é", "chosen": "good", "rejected": 'b,"ad', "label": False},
]  # fmt: skip
COLUMNS = [
    "text", "messages", "conversations", "prompt", "question", "completion", "response", "answer",
    "instruction", "input", "output", "chosen", "rejected", "label", "responses", "scores", "score", "rank",
    "ranks", "replies", "role", "content", "from", "value", "tools", "functions", "tool_calls", "loss_mask",
    "weights", "train", "labels", "reasoning_content", "name", "arguments", "instances", "message_id",
]  # fmt: skip
TURN_KEYS = [
    "weight", "train", "trainable", "loss", "loss_mask", "train_mask", "tool_calls", "function_call",
    "tool_call_id", "name", "reasoning_content", "reasoning", "thinking", "thought", "text", "parts", "id",
    "tools", "images", "content", "value",
]  # fmt: skip
ROLES = ["user", "assistant", "system", "tool", "function_call", "observation", "human", "gpt", "narrator"]


def zstd(data: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gz": gzip.compress, "zst": zstd}


def sound_file(name: str) -> bytes:
    """A small file that loads, of the kind its name says."""
    _, kind, *compression = name.split(".")
    if kind == "parquet":
        out = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), out)
        return out.getvalue().to_pybytes()
    if kind == "arrow":
        out, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(ROWS)
        with pyarrow.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
        return out.getvalue().to_pybytes()
    if kind == "tsv":
        text = "\n".join("\t".join(json.dumps(value) for value in row.values()) for row in ROWS)
        text = "\t".join(ROWS[0]) + "\n" + text
    elif kind == "csv":
        table = io.StringIO()
        writer = csv.DictWriter(table, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
        text = table.getvalue()
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
        text = {"jsonl": "\n".join(lines), "json": f"[{','.join(lines)}]", "txt": "\n\n".join(lines)}[kind]
    return PACK["".join(compression)](text.encode())


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with a few bytes flipped, cut out, put in or doubled."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 40))
        match draw(st.sampled_from(["flip", "cut", "insert", "delete", "double"])):
            case "flip" if at < len(data):
                data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
            case "cut":
                data = data[:at]
            case "insert":
                data = data[:at] + draw(st.binary(min_size=1, max_size=20)) + data[at:]
            case "delete":
                data = data[:at] + data[at + length :]
            case "double":
                data = data[: at + length] + data[at:]
    return data


def json_values() -> st.SearchStrategy[Any]:
    """Any JSON value, lone surrogates, NaN and columns that schemas look for included."""
    text = st.text(st.characters(), max_size=20) | st.sampled_from(
        [TURN + "a", TURN, "user", "assistant", ""]
    )
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | text
    keys = st.sampled_from(COLUMNS) | text
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
        max_leaves=15,
    )


ADD = [
    {"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": {"b": None}}}, {"name": "add"},
    {"type": "function", "function": {"name": "add", "arguments": '{"a": null}'}},
]  # fmt: skip
ODD_CALLS = [
    {"name": " "}, {"name": 7}, {"name": "add", "arguments": "{'a': 1}"}, {"name": "add", "arguments": [1]},
    {"name": "add", "parameters": {}}, {"function": {}}, "add", [],
]  # fmt: skip


def calls() -> st.SearchStrategy[Any]:
    """Calls as people write them: one, a list, JSON text."""
    listed = st.lists(st.sampled_from(ADD), min_size=1, max_size=2) | st.sampled_from(ADD)
    return listed | listed.map(json.dumps)


def odd_calls() -> st.SearchStrategy[Any]:
    """Calls and tools that are wrong somewhere, or no such thing."""
    listed = st.lists(st.sampled_from([*ADD, *ODD_CALLS]), max_size=2) | st.sampled_from(ODD_CALLS)
    return listed | listed.map(json.dumps) | listed.map(repr) | json_values()


def turns() -> st.SearchStrategy[dict[str, Any]]:
    """A message in the words of OpenAI or ShareGPT, with keys beside its content; at times any message."""
    mark = st.sampled_from([0, 1, True, False, None])
    marked = st.dictionaries(st.sampled_from(["weight", "train", "loss", "id"]), mark, max_size=1)
    thoughts = st.dictionaries(st.sampled_from(["reasoning", "thinking"]), st.just("x"), max_size=2)
    speaks = {"role": "assistant", "content": "a"}
    answers = st.builds(lambda mark, thought: {**mark, **thought, **speaks}, marked, thoughts)
    called = calls().map(lambda made: {"role": "assistant", "tool_calls": made})
    spelled = st.sampled_from(ADD).map(lambda one: {"from": "function_call", "value": json.dumps(one)})
    result = {"role": "tool", "content": "3", "name": "add"}
    others = st.sampled_from([result, {"from": "observation", "value": ""}, {"role": "user", "content": "q"}])
    keys = st.dictionaries(st.sampled_from(TURN_KEYS), mark | odd_calls(), max_size=2)
    role, said = st.sampled_from(ROLES), st.sampled_from(["q", "a", "", None])
    anything = st.builds(lambda more, role, text: {**more, "role": role, "content": text}, keys, role, said)
    return answers | answers | answers | called | spelled | others | anything


@st.composite
def chat_rows(draw: st.DrawFn) -> dict[str, Any]:
    """A row of messages with tools, marks or another column beside them."""
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    talk = [question, *draw(st.lists(turns(), max_size=2)), answer]
    marks = st.just([0] * (len(talk) - 1) + [1]) | st.lists(st.sampled_from([0, 1, None, 0.5]), max_size=4)
    beside = draw(
        st.just({})
        | st.fixed_dictionaries({"tools": calls() | odd_calls()})
        | st.fixed_dictionaries({"functions": calls() | odd_calls()})
        | st.dictionaries(st.sampled_from(["loss_mask", "weights", "turn_labels"]), marks, max_size=1)
        | st.fixed_dictionaries({"label": st.sampled_from([0, 1.0, "1", "False", 2, None])})
    )
    sides = {"chosen": talk, "rejected": [*talk[:-1], {**answer, "content": "b"}]}
    cells = {"prompt": talk[:1], "completion": talk[-1:], **sides}
    match draw(st.sampled_from(["messages", "conversations", "lists", "cells", "reprs"])):
        case "lists":
            return {**cells, **beside}
        case "cells":
            return {**{column: json.dumps(messages) for column, messages in cells.items()}, **beside}
        case "reprs":
            return {**cells, "chosen": repr(talk), **beside}
        case field:
            return {field: talk, **beside}
    raise AssertionError("every field is a case")


def assert_records_or_one_line(path: Path, reads: Kind, **more: Any) -> None:
    source = DataSource(path=str(path), **more)
    try:
        rows = readers.read([source], reads, seed=0)
    except DataError as error:
        assert str(error).isprintable() and path.name in str(error)
    else:
        assert rows.records
        splits = readers.splits_of(source, 16)
        in_splits = [record for split in splits for record in readers.read_split(source, split, reads)]
        assert repr(in_splits) == repr(rows.records), "NaN included"


@pytest.mark.parametrize("name", NAMES)
def test_the_file_that_is_mutated_loads(tmp_path, name):
    (tmp_path / name).write_bytes(sound_file(name))
    assert len(readers.read([DataSource(path=str(tmp_path / name))], "documents", seed=0).records) >= 2


@FUZZ
@given(
    data=st.binary(max_size=200),
    name=st.sampled_from(NAMES),
    reads=st.sampled_from(STAGES),
    pack=st.booleans(),
    bad=st.sampled_from(["error", "skip"]),
)
def test_any_bytes_in_any_kind_of_file(tmp_path, data, name, reads, pack, bad):
    compression = name.split(".")[2] if name.count(".") == 2 else ""
    (tmp_path / name).write_bytes(PACK[compression](data) if pack else data)
    assert_records_or_one_line(tmp_path / name, reads, on_bad_row=bad)


@settings(FUZZ, max_examples=400)
@given(data=st.data(), name=st.sampled_from(NAMES), reads=st.sampled_from(STAGES))
def test_any_mutation_of_a_sound_file(tmp_path, data, name, reads):
    (tmp_path / name).write_bytes(data.draw(mutated(sound_file(name))))
    document = data.draw(st.sampled_from(["file", "paragraph", "line"]))
    bad = data.draw(st.sampled_from(["error", "skip"]))
    assert_records_or_one_line(tmp_path / name, reads, document=document, on_bad_row=bad)


@settings(FUZZ, max_examples=300)
@given(data=st.data(), name=st.sampled_from(["a.parquet", "a.arrow"]))
def test_any_mutation_of_a_table_of_arrow(tmp_path, data, name):
    (tmp_path / name).write_bytes(data.draw(mutated(ARROW[name])))
    assert_records_or_one_line(tmp_path / name, data.draw(st.sampled_from(STAGES)))


ARROW = {name: sound_file(name) for name in ("a.parquet", "a.arrow")}


@settings(FUZZ, max_examples=300)
@given(
    values=st.lists(json_values(), max_size=4),
    reads=st.sampled_from(STAGES),
    kind=st.sampled_from(["jsonl", "json"]),
)
def test_any_json_values(tmp_path, values, reads, kind):
    lines = [json.dumps(value) for value in values]
    text = "\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]"
    (tmp_path / f"a.{kind}").write_text(text)
    assert_records_or_one_line(tmp_path / f"a.{kind}", reads)


@settings(FUZZ, max_examples=120)
@given(row=chat_rows(), reads=st.sampled_from(STAGES), kind=st.sampled_from(["jsonl", "json", "parquet"]))
def test_any_tools_calls_thoughts_and_marks(tmp_path, row, reads, kind):
    path = tmp_path / f"a.{kind}"
    try:
        text = json.dumps(row)
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        else:
            path.write_text(text)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):  # no such table
        return
    assert_records_or_one_line(path, reads)


@FUZZ
@given(
    lines=st.lists(st.text(st.sampled_from('a,;|"\t\r\n\0\ufeff é\u2028'), max_size=12), max_size=6),
    kind=st.sampled_from(["csv", "tsv", "txt"]),
    header=st.sampled_from([[], ["text"], ["text", "b"]]),
)
def test_any_lines_of_a_table(tmp_path, lines, kind, header):
    path = tmp_path / f"a.{kind}"
    path.write_bytes("\n".join([*(["text,b"] if not header else []), *lines]).encode())
    assert_records_or_one_line(path, "documents", columns=header)
