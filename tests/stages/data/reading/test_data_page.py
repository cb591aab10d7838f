"""docs/data.md: every example, table and error line of the page is what the readers do.

An example is an entry under `data:`; the comments below it are its file, what follows `->` in them is its
format and a record.
"""

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hub_server import HubServer
from inline import runtime_in
from test_hub import COMMIT, README
from test_hub import read as read_from_hub

from pipeline import cli
from pipeline import config as configs
from pipeline.experiment import ExperimentConfig
from pipeline.stage_table import STAGES, data_of
from stages import prepare
from stages.config.data import DataSource
from stages.config.ppo import PPOConfig
from stages.config.prepare import PrepareConfig
from stages.config.reward import RewardConfig
from stages.config.sft import SFTConfig
from stages.data.reading import readers
from stages.data.reading.hub import is_hub_id
from stages.data.reading.records import Conversation, Document, Message, Messages, Pair, Tools
from stages.data.reading.schemas import SCHEMAS, Record, Schema
from stages.data.validation import validate
from stages.errors import DataError

PAGE = (Path(__file__).parents[4] / "docs/data.md").read_text(encoding="utf-8")
ARROW = "-> "
READ_BY: dict[str, tuple[Schema, ...]] = {
    name: SCHEMAS[stage.data.reads] for name, stage in STAGES.items() if stage.data is not None
}
"""Stage -> what it can read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An entry of a config with its file and what the page says it becomes."""

    stage: str
    settings: dict[str, Any]
    lines: list[str] = field(default_factory=list)  # of the file
    records: list[str] = field(default_factory=list)  # `format | record`


def fenced(language: str) -> list[str]:
    """The page's blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def examples() -> Iterator[Example]:
    for block in (block for block in fenced("yaml") if ARROW in block):
        entries = [
            Example(stage=stage, settings=settings)
            for stage, section in yaml.safe_load(block).items()
            for settings in section[data_of(stage).field]
        ]
        at = -1
        for line in block.splitlines():
            at += line.startswith("    - ")
            if at >= 0 and line.lstrip().startswith("#"):
                text, arrow, record = line.lstrip().removeprefix("# ").partition(ARROW)
                entries[at].lines.extend([text.rstrip()] if text else [])
                entries[at].records.extend([record] if arrow else [])
        assert at == len(entries) - 1
        yield from entries


def table(title: str) -> list[list[str]]:
    """Cells of the table whose header begins with `title`."""
    rows = PAGE[PAGE.index(f"\n| {title} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [row.strip("| ").split(" | ") for row in rows]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def written(directory: Path, path: str, data: bytes) -> None:
    """`data` as a file that `path` means: below a directory, matched by a glob, compressed, as a table."""
    name = f"{path}one.jsonl" if path.endswith("/") else path.replace("**", "deep/er").replace("*", "one")
    file = directory / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        rows = [json.loads(line) for line in data.splitlines()]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def turns(messages: Messages) -> str:
    return " | ".join(map(turn, messages))


def turn(message: Message) -> str:
    """A turn as the page writes it: whether it is trained, its thoughts, its calls."""
    speaker = " ".join([message.role, *([message.name] if message.name else [])])
    marks = ([] if message.is_trained else ["not trained"]) + (
        [f"thinks: {message.reasoning}"] if message.reasoning else []
    )
    calls = [
        f"calls {call['function']['name']} {json.dumps(call['function']['arguments'])}"
        for call in message.tool_calls
    ]
    shown = f" ({'; '.join(marks)})" if marks else ""
    said = " ".join([*([message.content] if message.content else []), *calls])
    return f"{speaker}{shown}: {said}"


def offered(tools: Tools) -> str:
    names = ", ".join(tool["function"]["name"] for tool in tools)
    return f"tools: {names} | " if tools else ""


def in_words(record: Record) -> str:
    """A record as the page writes it."""
    match record:
        case Document(text=text):
            words = text
        case Conversation(messages=messages, tools=tools):
            words = offered(tools) + turns(messages)
        case Pair(prompt=prompt, chosen=(chosen,), rejected=(rejected,)):
            words = f"{turns(prompt)} | chosen: {chosen.content} | rejected: {rejected.content}"
        case _:
            row = f" | row: {json.dumps(record.row)}" if record.row else ""
            words = offered(record.tools) + turns(record.messages) + row
    return words.replace("\n", "\\n")


LOCAL = [example for example in examples() if not is_hub_id(example.settings["path"])]


def test_the_page_has_an_example_of_every_format_and_stage():
    shown = {(example.stage, line.partition(" | ")[0]) for example in LOCAL for line in example.records}
    assert {name for _, name in shown} == {schema.format for schema in SCHEMAS["conversations"]} | {
        *("text", "preference", "ranked", "prompt")
    }
    assert {stage for stage, _ in shown} == READ_BY.keys()


@pytest.mark.parametrize("example", LOCAL, ids=lambda one: f"{one.stage} {one.settings['path']}")
def test_an_example_is_read_as_the_page_says(tmp_path, monkeypatch, example):
    monkeypatch.chdir(tmp_path)
    assert example.lines and example.records
    written(tmp_path, example.settings["path"], "\n".join([*example.lines, ""]).encode())
    source = DataSource(**{**example.settings, "part": "all"})  # one row is on one side only
    reader = readers.read_whole(source, data_of(example.stage).reads)
    found = [in_words(record) for record in reader]
    assert reader.schema is not None
    assert [f"{reader.schema.format} | {words}" for words in found] == example.records


def test_the_hub_example_is_read_from_a_hub(tmp_path):
    (example,) = (example for example in examples() if is_hub_id(example.settings["path"]))
    (line,) = example.lines
    other = b'{"text": "another split"}'
    files = {"README.md": README, "small.jsonl": other, "large-train.jsonl": other}
    files["large-test.jsonl"] = line.encode()
    with HubServer(files, commit=COMMIT, revisions=("main", "v1")) as hub:
        ((texts, _),) = read_from_hub(tmp_path, example.settings, HF_ENDPOINT=hub.url)
    assert [f"text | {text}" for text in texts] == example.records


def test_the_table_of_formats_is_that_of_the_readers():
    feeds = {
        code(name)[0]: {stage for stage in READ_BY if stage in re.split(r"\W+", stages)}
        for name, _, stages in table("`format`")
    }
    expected: dict[str, set[str]] = {}
    for stage, schemas in READ_BY.items():
        for schema in schemas:
            if (stage, schema.format) != ("reward", "labelled"):  # there to say that it is no pair
                expected.setdefault(schema.format, set()).add(stage)
    assert feeds == expected
    columns = {code(name)[0]: code(columns) for name, columns, _ in table("`format`")}
    for schema in (schema for schemas in SCHEMAS.values() for schema in schemas):
        assert set(schema.required) <= {*columns[schema.format]}, schema.format


def test_the_table_of_columns_is_that_of_the_readers():
    schemas = [schema for schemas in SCHEMAS.values() for schema in schemas]
    for fields, columns in table("field"):
        names = code(fields)
        known = {column for schema in schemas for name in names for column in schema.aliases.get(name, ())}
        assert known == {*code(columns.replace("`[question, answer]`", ""))}, fields
    named = {name for fields, _ in table("field") for name in code(fields)}
    others = {name for schema in schemas for name in schema.aliases} - named
    assert others == {"text", "messages", "instruction", "chosen", "rejected"}  # go by their own name


ODD = {
    "the byte 0xE9": '{"text": "caf\u00e9"}\n'.encode("latin-1"),
    "nothing": b"",
    "anything": b"PK",
    "a quote not closed": b'text\n"One.\n',
    "Python's repr of messages": b"id,messages\n1,\"[{'role': 'user', 'content': '2+2?'}]\"\n",
}
"""What files hold that no code span can show."""
ERRORS = table("stage: file")


def made(directory: Path, path: str, content: str) -> None:
    if content == "half of a file":
        whole = gzip.compress(b'{"text": "one"}\n' * 100)
        (directory / path).write_bytes(whole[: len(whole) // 2])
    else:
        shown = content.removeprefix("`").removesuffix("`")
        written(directory, path, ODD[content] if content in ODD else f"{shown}\n".encode())


SECTIONS = {"prepare": PrepareConfig, "sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
LOCAL_ERRORS = [row for row in ERRORS if row[1] not in ("no network", "no such file")]


@pytest.mark.parametrize(("place", "content", "line"), LOCAL_ERRORS, ids=lambda text: text[:60])
def test_a_bad_file_gets_the_line_of_the_page(tmp_path, monkeypatch, place, content, line):
    monkeypatch.chdir(tmp_path)
    stage, path = place.split(": ")
    made(tmp_path, path, content)
    config = SECTIONS[stage](data=[DataSource(path=path)])
    with pytest.raises(DataError) as caught:
        validate(config.data, data_of(stage).reads, config)
    assert f"`{caught.value}`" == line


def test_a_hub_without_network_gets_the_line_of_the_page(tmp_path):
    ((_, _, line),) = (row for row in ERRORS if row[1] == "no network")
    (found,) = read_from_hub(tmp_path, {"path": "org/name"}, HF_HUB_OFFLINE="1")
    assert f"`{found}`" == line


def test_a_missing_file_gets_the_line_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ((_, _, line),) = (row for row in ERRORS if row[1] == "no such file")
    Path("mine.yaml").write_text("name: mine\nmodel: {path: m}\nsft: {data: [{path: gone.jsonl}]}\n")
    with pytest.raises(DataError) as caught:
        configs.check_paths(configs.load(Path("mine.yaml"), []), {"sft"})
    assert f"`{caught.value}`".replace(str(tmp_path), "/data") == line


def jsonl(path: str, *rows: dict[str, Any]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    """The page's config, with data beside it of which some is left out."""
    monkeypatch.chdir(tmp_path)
    animals = ("cat", "dog", "horse", "bird", "fish", "goat", "sheep", "fox")
    stories = [
        f"Once upon a time there was a {one} that lived with a {other} in an old house by the river."
        for one in animals
        for other in animals
    ]
    german = "Es war einmal eine Katze, die mit einem Hund in einem alten Haus am Fluss wohnte."
    jsonl("web.jsonl", *({"text": text} for text in (*stories[:40], german, stories[0])))
    jsonl("books.jsonl", *({"text": text} for text in stories[40:]))
    chat = [("What lives by the river?", "A cat."), ("And who else?", "A dog, " * 60)]
    jsonl("chat.jsonl", *({"question": question, "answer": answer} for question, answer in chat))
    asked = [("Who?", 1), ("Why?", 90)]  # the first one is held out
    jsonl("pairs.jsonl", *({"prompt": q, "chosen": "A cat.", "rejected": "no " * n} for q, n in asked))
    (block,) = (block for block in fenced("yaml") if block.startswith("name: mine"))
    Path("mine.yaml").write_text(block)
    return configs.load(Path("mine.yaml"), []).config


def test_check_prints_what_the_page_shows(mine, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "mine.yaml"])
    assert not ended.value.code
    shown = capsys.readouterr().out.partition("\nnot stated")[0].replace(str(tmp_path), "/data")
    (block,) = (block for block in fenced("") if "lengths: " in block)
    parts = shown.split("\n\n")
    assert len(parts) == 6, "a line on the lengths, four datasets, and what reward is normalised over"
    lengths, *datasets = block.strip().split("\n\n")
    assert parts[0].endswith(f"\n{lengths}")
    assert datasets and {*datasets} <= {part.strip() for part in parts[1:]}


def test_prepare_records_what_the_page_shows(mine, tmp_path):
    prepare.run(mine.settings_of("prepare"), {}, tmp_path / "out", runtime_in(tmp_path, "prepare"))
    steps = json.loads((tmp_path / "out/statistics.json").read_text())["steps"]
    (block,) = fenced("json")
    assert json.loads(block) in steps
    written_files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"index.json", "heldout.bin", "train-00000.bin", "tokenizer.json"} <= written_files
