"""Readers: every accepted shape gives its record, every bad one one line with file, line, field and fix."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from stages.config.data import DataSource
from stages.data.reading import readers
from stages.data.reading.readers import read
from stages.data.reading.records import Conversation, Document, Message, split_key
from stages.data.reading.schemas import SCHEMAS, Cells, Kind, Schema
from stages.errors import DataError

HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Name a colour.\n\nAssistant:"


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(path: Path | str, **settings: Any) -> DataSource:
    return DataSource(path=str(path), **settings)


def records(path: Path, reads: Kind, **settings: Any) -> list[Any]:
    return readers.read([source(path, **settings)], reads, seed=0).records


def failure(path: Path, reads: Kind, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        readers.read([source(path, **settings)], reads, seed=0)
    message = str(caught.value)
    assert "\n" not in message, "an error is one line"
    return message.replace(f"{path.parent}/", "")


# What each schema reads


def test_text_rows_and_paragraphs_become_documents(tmp_path):
    rows = jsonl(tmp_path / "a.jsonl", {"text": "one", "id": 1}, {"text": "two"})
    assert records(rows, "documents") == [Document(text="one"), Document(text="two")]
    (tmp_path / "b.txt").write_text("\n\nfirst line\nsecond line\n \n\nnext paragraph\n")
    assert records(tmp_path / "b.txt", "documents") == [
        Document(text="first line\nsecond line"),
        Document(text="next paragraph"),
    ]


TALK = Conversation(messages=(user("q"), assistant("a")))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
        {"prompt": "q", "response": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "input": None, "output": "a", "chosen": "x", "rejected": "y"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ],
    ids=lambda row: "+".join(row),
)
def test_every_sft_schema_gives_the_same_conversation(tmp_path, row):
    assert records(jsonl(tmp_path / "a.jsonl", row), "conversations") == [TALK]


def test_an_instruction_is_joined_with_its_input_by_a_blank_line(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert records(path, "conversations") == [Conversation(messages=(user("Add.\n\n1 2"), assistant("3")))]


def test_messages_after_the_last_answer_are_left_out(tmp_path):
    turns = [("system", ""), ("user", "q"), ("assistant", "a"), ("user", "more?")]
    path = jsonl(tmp_path / "a.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    (conversation,) = records(path, "conversations")
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant"]


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "", "output": "x", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [say("assistant", "good")], "rejected": [say("assistant", "bad")]},
        {"prompt": "q", "chosen": say("assistant", "good"), "rejected": say("assistant", "bad")},
        {"prompt": [say("user", "q")], "chosen": "good", "rejected": "bad"},
        {
            "chosen": [say("user", "q"), say("assistant", "good")],
            "rejected": [say("user", "q"), say("assistant", "bad")],
        },
        {
            "prompt": "q",
            "chosen": [say("user", "q"), say("assistant", "good")],
            "rejected": [say("user", "q"), say("assistant", "bad")],
        },
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"chosen": "q\ngood", "rejected": "q\nbad"},
    ],
    ids=lambda row: "+".join(f"{k}:{type(v).__name__}" for k, v in row.items()),
)
def test_every_preference_schema_gives_the_same_pair(tmp_path, row):
    (pair,) = records(jsonl(tmp_path / "a.jsonl", row), "pairs")
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        (user("q"),),
        (assistant("good"),),
        (assistant("bad"),),
    )
    assert pair.row == row


def test_hh_transcripts_share_their_common_turns_as_the_prompt(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"chosen": f"{HH} Red.", "rejected": f"{HH} No."})
    (pair,) = records(path, "pairs")
    assert pair.prompt == (user("Hi."), assistant("Hello."), user("Name a colour."))
    assert (pair.chosen, pair.rejected) == ((assistant("Red."),), (assistant("No."),))


def test_hh_transcripts_may_part_before_the_last_turn(tmp_path):
    other = HH.replace("Hello.", "Yes?")
    path = jsonl(tmp_path / "a.jsonl", {"chosen": f"{HH} Red.", "rejected": f"{other} Red."})
    (pair,) = records(path, "pairs")
    assert pair.prompt == (user("Hi."),)
    assert pair.chosen == (assistant("Hello."), user("Name a colour."), assistant("Red."))


def test_turns_of_one_speaker_in_a_row_are_joined(tmp_path):
    talk = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"
    path = jsonl(tmp_path / "a.jsonl", {"chosen": talk})
    assert records(path, "conversations") == [Conversation(messages=(user("a\n\nb"), assistant("c")))]


@pytest.mark.parametrize(
    ("row", "prompt", "further"),
    [
        ({"prompt": "q", "answer": "4", "level": 2}, "q", {"answer": "4", "level": 2}),
        ({"question": "q", "answer": "4"}, "q", {"answer": "4"}),
        ({"instruction": "q", "input": "x", "output": "y"}, "q\n\nx", {"output": "y"}),
        ({"messages": [say("user", "q"), say("assistant", "a")], "answer": "4"}, "q", {"answer": "4"}),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: z\n\nAssistant:", "rejected": "", "id": 1},
            "q",
            {"id": 1},
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("reads", ["prompts", "prompts"])
def test_prompts_keep_their_further_columns(tmp_path, reads, row, prompt, further):
    (read,) = records(jsonl(tmp_path / "a.jsonl", row), reads)
    assert (read.messages, read.row) == ((user(prompt),), further)


def detected(given: DataSource, reads: Kind) -> readers.RecordReader:
    """A reader after its first record."""
    reader = readers.read_whole(given, reads)
    next(reader)
    return reader


def test_the_schema_depends_on_the_stage_and_can_be_stated(tmp_path):
    row = {"instruction": "q", "input": "", "output": "o", "chosen": "c", "rejected": "r", "prompt": "p"}
    path = jsonl(tmp_path / "a.jsonl", row)
    assert detected(source(path), "conversations").schema.format == "instruction"
    assert detected(source(path), "pairs").schema.format == "preference"
    stated = source(path, format="prompt_completion", columns={"completion": "chosen"})
    assert detected(stated, "conversations").columns_seen == {"prompt": "prompt", "completion": "chosen"}
    assert records(path, "conversations", format="prompt_completion", columns={"completion": "chosen"}) == [
        Conversation(messages=(user("p"), assistant("c")))
    ]
    assert "format preference gives no conversations; use labelled or tree or messages" in failure(
        path, "conversations", format="preference"
    )
    assert "columns: no field 'chosn'; fields are chosen, rejected, conversations" in failure(
        path, "pairs", columns={"chosn": "x"}
    )


def test_renamed_columns_take_part_in_detection(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"q": "q", "gold": "a"})
    assert records(path, "conversations", columns={"prompt": "q", "completion": "gold"}) == [TALK]
    line = failure(path, "conversations", columns={"prompt": "q", "completion": "best"})
    assert line == "a.jsonl:1: best: missing; columns are q, gold - set columns: {completion: …}"


GOOD = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize("first", [GOOD, {**GOOD, "label": None}, {**GOOD, "label": 2}])
@pytest.mark.parametrize("label", [{"label": False}, {"label": "False"}, {"kto_tag": False}], ids=str)
def test_a_false_label_after_rows_without_one_is_not_imitated(tmp_path, first, label):
    path = jsonl(tmp_path / "a.jsonl", first, {**GOOD, **label})
    (name,) = label
    assert failure(path, "conversations") == (
        f"a.jsonl:2: {name}: false, but by its first row the source is not labelled; set format: labelled, "
        "or format: prompt_completion to imitate it"
    )
    assert records(path, "conversations", format="prompt_completion") == [TALK, TALK]
    assert len(records(path, "prompts")) == 2
    kept = jsonl(tmp_path / "b.jsonl", GOOD, {**GOOD, "label": True})
    assert records(kept, "conversations") == [TALK, TALK]


def test_a_bad_first_row_does_not_decide_the_schema(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"comment": "made by us"}, *[GOOD] * 3)
    settings = source(path, on_bad_row="skip")
    rows = readers.read_conversations([settings], seed=0)
    assert (rows.records, rows.num_skipped) == ([TALK] * 3, 1)
    splits = readers.splits_of(settings, 1)
    assert len(splits) == 4
    found = [readers.read_split(settings, split, "conversations") for split in splits]
    assert [[*reader] for reader in found] == [[], [TALK], [TALK], [TALK]]
    assert [reader.counts.num_skipped for reader in found] == [1, 0, 0, 0]


# Files


def test_files_globs_and_directories_are_read_in_path_order(tmp_path):
    for name in ("b", "a", "c/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    (tmp_path / ".hidden.jsonl").write_text("{")
    (tmp_path / "README.md").write_text("not data")
    texts = [[d.text for d in records(tmp_path / end, "documents")] for end in ("", "*.jsonl", "**/*.jsonl")]
    assert texts == [["a", "b", "c/d"], ["a", "b"], ["a", "b", "c/d"]]


def test_gzipped_files_bom_crlf_and_blank_lines_are_tolerated(tmp_path):
    data = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two\xc3\xa9"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\xc3\xa9")
    for name in ("a.jsonl", "a.jsonl.gz", "a.txt"):
        assert records(tmp_path / name, "documents") == [Document(text="one"), Document(text="twoé")]


@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "one"},\n {"text": "two"}]',
        '{"text": "one"}\n{"text": "two"}\n',
        '[\n{"text":\n"one"}\n,{"text": "two"}\n]\n',
        '{"version": "1", "data": [{"text": "one"}, {"text": "two"}], "by": {"name": "us"}}',
        '{"rows": 2, "data": "rows", "train": [{"text": "one"}, {"text": "two"}]}',
        '{\n"type": "text_only",\n"instances": [{"text": "one"},\n{"text": "two"}]\n}\n',
    ],
)
def test_json_files_hold_a_list_alone_or_in_an_object_or_objects_one_after_another(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert records(tmp_path / "a.json", "documents") == [Document(text="one"), Document(text="two")]


def test_a_row_in_a_list_inside_an_object_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n"type": "text_only",\n"instances": [{"text": "one"},\n{"text": 7}]\n}\n')
    assert failure(path, "documents") == "a.json:4: text: expected text, got number 7"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "examples": [{"q": "x", "a": "y"}], "train": [{"x": 1}]},
        {"data": [say("user", "q"), say("assistant", "a")]},
    ],
    ids=lambda row: "+".join(row),
)
def test_a_row_alone_in_a_json_file_is_a_row_with_the_lists_it_has(tmp_path, row):
    (tmp_path / "a.json").write_text(json.dumps(row))
    columns = {"messages": "data"} if "data" in row else {}
    assert records(tmp_path / "a.json", "conversations", columns=columns) == [TALK]


def test_a_reader_reads_no_further_than_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{broken\n')
    reader = readers.read_whole(source(path), "documents")
    assert [next(reader).text, next(reader).text] == ["one", "two"] and reader.counts.num_rows == 2


# The error table of DATA_FORMATS.md


@pytest.mark.parametrize(
    ("name", "data", "reads", "line"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "long enough y" "z": 1}\n', "documents",
         "a.jsonl:2: not valid JSON: missing ',' or '}' (column 26)"),
        ("a.jsonl", b'{"prompt": "x", "completion": "y"}\n{"prompt": "x", "completion": 7}\n',
         "conversations",
         "a.jsonl:2: completion: expected text, got number 7"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 7}\n', "documents",
         "a.jsonl:2: text: expected text, got number 7"),
        ("a.jsonl", b'{"text": null}\n', "documents", "a.jsonl:1: text: expected text, got null"),
        ("a.jsonl", b'{"prompt": "x", "rejected": "y"}\n', "pairs",
         "a.jsonl:1: chosen: missing; columns are prompt, rejected - set columns: {chosen: …}"),
        ("a.jsonl", b"", "conversations", "a.jsonl: no rows"),
        ("a.jsonl", b"\n\n", "conversations", "a.jsonl: no rows"),
        ("a.txt", b" \n\n", "documents", "a.txt: no rows"),
        ("a.json", b"[]", "documents", "a.json: no rows"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "documents",
         "a.jsonl:1: not UTF-8 (byte 0xE9 at column 14); convert with iconv"),
        ("a.txt", b"one\n\ntwo\ncaf\xe9\n", "documents",
         "a.txt:4: not UTF-8 (byte 0xE9 at column 4); convert with iconv"),
        ("a.jsonl", b'{"text": "x"}\n[1, 2]\n', "documents",
         "a.jsonl:2: expected an object {column: value}, got list"),
        ("a.jsonl", b'\xef\xbb\xbf[{"text": "x"}]\n', "documents",
         "a.jsonl:1: expected an object {column: value}, got list; a list or multi-line objects: name it "
         ".json"),
        ("a.jsonl", b'[\n{"text": "x"}\n]\n', "documents",
         "a.jsonl:1: not valid JSON: expected a value (column 2); a list or multi-line objects: name it "
         ".json"),
        ("a.jsonl", b'{\n"text": "x"\n}\n', "documents",
         "a.jsonl:1: not valid JSON: expected a property name in double quotes (column 2); a list or "
         "multi-line objects: name it .json"),
        ("a.jsonl", b'{"text": "x"}{"text": "y"}\n', "documents",
         "a.jsonl:1: not valid JSON: more text after the end of the object (column 14)"),
        ("a.jsonl", b'{"text": "x\n', "documents",
         "a.jsonl:1: not valid JSON: text never closed (column 10)"),
        ("a.jsonl", b'{"text": "a\x00b"}\n', "documents",
         "a.jsonl:1: not valid JSON: control character inside text (column 12)"),
        ("a.jsonl", b'{"text": "a\\ud800b"}\n', "documents",
         "a.jsonl:1: text: half a surrogate pair (\\ud800) at character 2; it is no text"),
        ("a.jsonl", b'{"a": ' + b"[" * 200_000 + b"\n", "documents",
         "a.jsonl:1: not valid JSON: nested too deeply"),
        ("a.json", b'[{"text": "x"},\n {"text": 7}]', "documents",
         "a.json:2: text: expected text, got number 7"),
        ("a.json", b'[{"text": "x"}\n {"text": "y"}]', "documents",
         "a.json:2: not valid JSON: missing ',' or ']' (column 2)"),
        ("a.json", b'[{"text": "x"},', "documents", "a.json:1: not valid JSON: the list is never closed"),
        ("a.jsonl", b'{"prompt": " ", "completion": "y"}\n', "conversations",
         "a.jsonl:1: prompt: empty prompt; remove the row, or set on_bad_row: skip"),
        ("a.jsonl", b'{"prompt": "x", "completion": ""}\n', "conversations",
         "a.jsonl:1: completion: empty response; remove the row, or set on_bad_row: skip"),
        ("a.jsonl", b'{"prompt": "x", "chosen": "y", "rejected": "y"}\n', "pairs",
         "a.jsonl:1: rejected: the same as chosen; remove the row, or set on_bad_row: skip"),
        ("a.jsonl", b'{"chosen": "abc", "rejected": "xyz"}\n', "pairs",
         "a.jsonl:1: chosen: shares no beginning with rejected, so there is no prompt; write "
         "it into a column prompt, or before both"),
        ("a.jsonl", b'{"messages": [{"role": "bot", "content": "y"}]}\n', "conversations",
         "a.jsonl:1: messages[0].role: unknown role 'bot'; use system, user, assistant, tool"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 1}]}\n', "conversations",
         "a.jsonl:1: messages[0].content: expected text, got number 1"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', "conversations",
         "a.jsonl:1: messages: no assistant message, so nothing to train on"),
        ("a.jsonl", b'{"messages": []}\n', "prompts", "a.jsonl:1: messages: no messages"),
        ("a.doc", b"text\nx\n", "documents",
         "a.doc: cannot tell what it is by its name; jsonl, json, parquet, arrow, csv, tsv, txt and "
         ".gz or .zst of the text ones are read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:-9], "documents",
         "a.jsonl.gz: file ends early (truncated?)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:1], "documents",
         "a.jsonl.gz: file ends early (truncated?)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n') + gzip.compress(b"")[:1], "documents",
         "a.jsonl.gz: file ends early (truncated?)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n') + b"x", "documents",
         "a.jsonl.gz: not a valid gzip file, or damaged"),
        ("a.jsonl.gz", b'{"text": "x"}\n', "documents", "a.jsonl.gz: not a valid gzip file, or damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) and ":" in value else "",
)  # fmt: skip
def test_bad_input_is_named_by_file_line_field_and_fix(tmp_path, name, data, reads, line):
    (tmp_path / name).write_bytes(data)
    assert failure(tmp_path / name, reads) == line


def test_a_broken_line_takes_a_few_times_its_size_in_memory(tmp_path):
    line = b'{"text": "' + b"\\n" * 200_000 + b"x" * 200_000 + b'" "b": 1}\n'
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    tracemalloc.start()
    try:
        assert failure(path, "documents") == "a.jsonl:1: not valid JSON: missing ',' or '}' (column 600013)"
        assert tracemalloc.get_traced_memory()[1] < 10 * len(line)
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_named(tmp_path):
    assert failure(tmp_path / "nope.jsonl", "conversations") == "no such file: nope.jsonl"
    assert failure(tmp_path / "no*.jsonl", "conversations") == "no such file: no*.jsonl"
    (tmp_path / "empty").mkdir()
    assert failure(tmp_path / "empty", "conversations") == (
        "empty: no jsonl, json, parquet, arrow, csv, tsv, txt file in this directory"
    )


def test_odd_but_sound_text_is_read_as_it_is(tmp_path):
    odd = [
        "🎉👩‍👩‍👧 e\u0301",
        "שלום \u202eabc",
        "<|im_end|>",
        "<|im_start|>system\nobey<|im_end|>",
        "a\u2028b",
    ]
    path = jsonl(tmp_path / "a.jsonl", *[{"text": text} for text in [*odd, "a\u0000b", "x" * 10_000_000]])
    assert [document.text for document in records(path, "documents")] == [*odd, "a\u0000b", "x" * 10_000_000]
    for name, separator in (("a.txt", "\n\n"), ("b.csv", '"\n"'), ("c.tsv", "\n")):
        odd_lines = [text for text in odd if "\n" not in text]
        start, end = {"a.txt": ("", ""), "b.csv": ('text\n"', '"\n'), "c.tsv": ("text\n", "\n")}[name]
        (tmp_path / name).write_text(start + separator.join(odd_lines) + end, encoding="utf-8")
        assert [document.text for document in records(tmp_path / name, "documents")] == odd_lines, name


def test_one_row_is_enough(tmp_path):
    assert records(jsonl(tmp_path / "a.jsonl", {"text": "x"}), "documents") == [Document(text="x")]


def test_an_error_is_one_printable_line_whatever_the_columns_are_called(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"a\nb": 1, "\x1b[31m": 2, "\ud800": 3})
    assert failure(path, "documents") == (
        r"a.jsonl:1: text: missing; columns are a\nb, \x1b[31m, \ud800 - set columns: {text: …}"
    )
    assert len(failure(jsonl(tmp_path / "b.jsonl", {"k" * 1_000_000: 1}), "documents")) < 3000


# Bad rows, weights, identity


def test_skipped_rows_are_counted_and_capped_at_one_percent_or_one_row(tmp_path):
    good, bad = {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}
    few = jsonl(tmp_path / "few.jsonl", good, bad, good)
    rows = readers.read_conversations([source(few, on_bad_row="skip")], seed=0)
    assert (len(rows.records), rows.num_skipped) == (2, 1)
    many = jsonl(tmp_path / "many.jsonl", *[good] * 198, bad, bad)
    assert readers.read_conversations([source(many, on_bad_row="skip")], seed=0).num_skipped == 2
    over = jsonl(tmp_path / "over.jsonl", *[good] * 150, bad, bad)
    assert failure(over, "conversations", on_bad_row="skip") == (
        "over.jsonl:151: completion: empty response; remove the row, or set on_bad_row: skip - and 2 of 152 "
        "rows are bad, more than max_skipped_frac allows (1%, at least one)"
    )
    milder = source(over, on_bad_row="skip", max_skipped_frac=0.02)
    assert readers.read_conversations([milder], seed=0).num_skipped == 2
    assert "1 of 1 rows are bad" in failure(
        jsonl(tmp_path / "one.jsonl", bad), "conversations", on_bad_row="skip"
    )


def test_a_row_may_give_no_record_or_several_and_those_without_are_counted(tmp_path, monkeypatch):
    def words(cells: Cells) -> tuple[Document, ...]:
        return tuple(Document(text=word) for word in cells.text("text").split())

    schema = Schema(format="text", required=("text",), aliases={"text": ("text",)}, parse=words)
    monkeypatch.setitem(SCHEMAS, "documents", (schema,))
    path = jsonl(tmp_path / "a.jsonl", *[{"text": text} for text in ("one two", "", "three", " ")])
    rows = readers.read([source(path), source(path)], "documents", seed=0)
    assert [record.text for record in rows.records] == ["one", "two", "three"] * 2
    assert (rows.num_filtered, rows.num_skipped) == (4, 0)
    assert failure(jsonl(tmp_path / "b.jsonl", {"text": ""}), "documents") == "b.jsonl: no rows"


def test_weights_repeat_rows_and_take_a_seeded_share(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *[{"text": str(n)} for n in range(10)])

    def texts(weight: float, seed: int = 0) -> list[str]:
        return [d.text for d in readers.read([source(path, weight=weight)], "documents", seed=seed).records]

    everything = [str(n) for n in range(10)]
    assert texts(1) == everything and texts(2) == everything * 2
    half = texts(0.5)
    assert len(half) == 5 and half == sorted(set(half)) and half == texts(0.5)
    assert len({tuple(texts(0.5, seed)) for seed in range(8)}) > 1
    assert texts(1.5)[:10] == everything and len(texts(1.5)) == 15


def test_a_weight_of_zero_leaves_the_source_out(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "x"})
    rows = readers.read([source(path), source(tmp_path / "missing.jsonl", weight=0)], "documents", seed=0)
    assert len(rows.records) == 1
    assert failure(path, "documents", weight=0) == "a.jsonl: no rows"


def test_a_weight_that_comes_to_no_row_is_an_error(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *[GOOD] * 4)
    line = "a.jsonl: no rows at weight 0.1 of 4; raise weight, or set it to 0"
    assert failure(path, "conversations", weight=0.1) == line
    assert len(readers.read([source(path, weight=0.2)], "conversations", seed=0).records) == 1


def test_the_content_digest_follows_contents_not_names(tmp_path):
    for folder, names in (("a", ("1.jsonl", "2.jsonl")), ("b", ("x.jsonl", "y.jsonl"))):
        (tmp_path / folder).mkdir()
        for name, text in zip(names, ("one", "two"), strict=True):
            jsonl(tmp_path / folder / name, {"text": text})
    digest = readers.content_digest(source(tmp_path / "a"))
    assert digest == readers.content_digest(source(tmp_path / "b"))
    assert digest == readers.content_digest(source(tmp_path / "b" / "*.jsonl"))
    jsonl(tmp_path / "b" / "y.jsonl", {"text": "other"})
    assert digest != readers.content_digest(source(tmp_path / "b"))
    assert readers.content_digest(source(tmp_path / "a" / "1.jsonl")) != digest


def test_the_same_bytes_read_as_another_kind_of_file_have_another_digest(tmp_path):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    digests = {readers.content_digest(source(tmp_path / name)) for name in ("a.jsonl", "a.txt")}
    assert len(digests) == 2


def test_parts_of_one_file_are_disjoint_complete_and_the_same_for_every_schema(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def asked(part, reads):
        source = DataSource(
            path=str(path), part=part, heldout_frac=0.25, format=None if reads == "pairs" else "prompt"
        )
        return {split_key(record) for record in read([source], reads, seed=0).records}

    train, heldout = asked("train", "pairs"), asked("heldout", "pairs")
    assert train | heldout == asked("all", "pairs") and not train & heldout
    assert 25 <= len(heldout) <= 75
    assert asked("heldout", "prompts") == heldout
