"""Advice: every line that says what to set or write is followed, on the very input that caused it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
import yaml

from stages.config.data import DataSource
from stages.data.reading import readers
from stages.data.reading.rows import advice
from stages.data.reading.rows.advice import UNKNOWN, Advice
from stages.data.reading.schemas import Kind
from stages.errors import DataError

Row = dict[str, Any]
DATA = Path(advice.__file__).parents[2]


def say(role: str, content: str, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


TALK = [say("user", "Cow?"), say("assistant", "Moo.")]
ANSWERS = [{"answer_id": 1, "pm_score": 3, "text": "Moo."}, {"answer_id": 2, "pm_score": 0, "text": "Woof."}]
SIDES = {"chosen": "Moo.", "rejected": "Woof."}
FLAT = {"message_id": "a", "parent_id": None, "text": "Cow?", "role": "prompter", "rank": None, "lang": "en"}
NESTED = {"prompt": {"text": "Cow?", "role": "prompter", "replies": [{"text": "Moo.", "role": "assistant"}]}}


@dataclass(frozen=True, kw_only=True)
class Followed:
    """An input, the line it gets, and what a person does then."""

    kind: Advice
    reads: Kind
    line: str
    row: Any = None  # the one row of a.jsonl
    text: str = ""  # or what stands in the file
    name: str = "a.jsonl"
    settings: dict[str, Any] = field(default_factory=dict)  # of the source, from the start
    fill: str = ""  # what a person writes where the line says `…`
    then: dict[str, Any] = field(default_factory=dict)  # settings that the line does not spell out
    mended: Any = None  # the row as the line says to write it
    mended_text: str = ""
    mended_name: str = ""
    group_columns: tuple[str, str] | None = None  # reward.group_column, and the one that the line asks for


CASES = [
    Followed(
        kind=Advice.MISSING,
        reads="conversations",
        row={"problem": "2+2?", "level": "Level 1", "type": "Algebra", "solution": "$4$"},
        line="prompt: missing; columns are problem, level, type, solution - set columns: {prompt: problem, "
        "completion: solution}",
    ),
    Followed(
        kind=Advice.MISSING,
        reads="prompts",
        row={"problem": "2+2?", "solution": "$4$"},
        line="prompt: missing; columns are problem, solution - set columns: {prompt: problem}",
    ),
    Followed(
        kind=Advice.MISSING,
        reads="conversations",
        row={"dialog": TALK, "id": 1},
        line="messages: missing; columns are dialog, id - set columns: {messages: dialog}",
    ),
    Followed(
        kind=Advice.MISSING,
        reads="conversations",
        row={"dialog": json.dumps(TALK)},
        line="messages: missing; columns are dialog - set columns: {messages: dialog}",
    ),
    Followed(
        kind=Advice.MISSING,
        reads="conversations",
        row={"Question": "Cow?", "Response": "Moo.", "no": 7},
        line="prompt: missing; columns are Question, Response, no - set columns: {prompt: Question, "
        "completion: Response}",
    ),
    Followed(
        kind=Advice.MISSING,
        reads="conversations",
        row={"prompt": "Cow?", "said by it": "Moo."},
        line='completion: missing; columns are prompt, said by it - set columns: {completion: "said by it"}',
    ),
    Followed(
        kind=Advice.MISSING,
        reads="pairs",
        row={"history": "Cow?", "human_ref_A": "Moo.", "human_ref_B": "Woof.", "labels": 1},
        line="chosen: missing; columns are history, human_ref_A, human_ref_B, labels - set columns: "
        "{prompt: history, chosen: human_ref_A, rejected: human_ref_B}",
    ),
    Followed(
        kind=Advice.MISSING,
        reads="pairs",
        row={"question": "Cow?", "better": "Moo.", "worse": "Woof."},
        line="chosen: missing; columns are question, better, worse - set columns: {chosen: better, "
        "rejected: worse}",
    ),
    Followed(
        kind=Advice.MISSING,
        reads="pairs",
        row={"prompt": "Cow?", "rejected": "Woof.", "x": {"y": "Moo."}},
        line="chosen: missing; columns are prompt, rejected, x - set columns: {chosen: …}",
        fill="x.y",
    ),
    Followed(
        kind=Advice.MISSING,
        reads="conversations",
        row={"ask": "Cow?", "solution": "Moo."},
        settings={"columns": {"prompt": "ask"}},
        line="completion: missing; columns are ask, solution - set columns: {prompt: ask, completion: "
             "solution}",
    ),
    Followed(
        kind=Advice.MISSING,
        reads="documents",
        row={"content": "A cow.", "url": "x"},
        line="text: missing; columns are content, url - set columns: {text: content}",
    ),
    Followed(
        kind=Advice.NOTHING_TO_IMITATE,
        reads="conversations",
        row={"x": {"y": "Cow?", "z": TALK}},
        line="prompt: missing; columns are x - set columns: {prompt: …, completion: …}, or {messages: …}",
        then={"columns": {"messages": "x.z"}},
    ),
    Followed(
        kind=Advice.BROKEN_PATH,
        reads="conversations",
        row={"prompt": "Cow?", "instances": [{"output": "Moo."}]},
        settings={"columns": {"completion": "instances.0.answer"}},
        line="instances.0.answer: instances.0 has no 'answer'; its keys are output - set columns: "
        "{completion: …}",
        fill="instances.0.output",
    ),
    Followed(
        kind=Advice.NO_SUCH_FIELD,
        reads="conversations",
        row={"messages": TALK, "ask": "Cow?", "answer": "Moo."},
        settings={"columns": {"prompt": "ask", "messages": "messages"}},
        line="columns: format messages has no field 'prompt'; fields are messages, system, tools, loss_mask "
        "- or set format",
        then={"format": "prompt_completion", "columns": {"prompt": "ask"}},
    ),
    Followed(
        kind=Advice.PROMPT_NOT_READ,
        reads="pairs",
        row={"problem": "2+2?", "chosen": "The answer is 4.", "rejected": "The answer is 5."},
        line="chosen: no prompt beside rejected, and text that is not read in problem - set columns: "
        "{prompt: problem}, or, where both begin with the prompt, remove problem",
    ),
    Followed(
        kind=Advice.PROMPT_NOT_READ,
        reads="pairs",
        row={"id": "a7", "task": "Cow?", **SIDES},
        line="chosen: no prompt beside rejected, and text that is not read in id, task - set columns: "
        "{prompt: task}, or, where both begin with the prompt, remove id, task",
    ),
    Followed(
        kind=Advice.PROMPT_NOT_READ,
        reads="pairs",
        row={"origin": "web", "chosen": "Cow?\nMoo.", "rejected": "Cow?\nWoof."},
        line="chosen: no prompt beside rejected, and text that is not read in origin - set columns: "
        "{prompt: …}, or, where both begin with the prompt, remove origin",
        mended={"chosen": "Cow?\nMoo.", "rejected": "Cow?\nWoof."},
    ),
    Followed(
        kind=Advice.PROMPT_NOT_READ,
        reads="pairs",
        row={"category": "qa", "dialogue": ["Cow?"], **SIDES},
        line="chosen: no prompt beside rejected, and text that is not read in category, dialogue - set "
        "columns: {prompt: …}, or, where both begin with the prompt, remove category, dialogue",
        fill="dialogue.0",
    ),
    Followed(
        kind=Advice.PROMPT_NOT_READ,
        reads="pairs",
        row={"source": "web", "conv": TALK[:1], **SIDES},
        line="chosen: no prompt beside rejected, and text that is not read in source, conv - set columns: "
        "{prompt: conv}, or, where both begin with the prompt, remove source, conv",
    ),
    Followed(
        kind=Advice.PROMPT_NOT_READ,
        reads="pairs",
        row={"meta": {"question": "Cow?"}, "n": [1, [2]], **SIDES},
        line="chosen: no prompt beside rejected, and text that is not read in meta - set columns: "
        "{prompt: …}, or, where both begin with the prompt, remove meta",
        fill="meta.question",
    ),
    Followed(
        kind=Advice.NO_PROMPT,
        reads="pairs",
        row={"n": 7, **SIDES},
        line="chosen: shares no beginning with rejected, so there is no prompt; write it into a column "
        "prompt, or before both",
        mended={"prompt": "Cow?", **SIDES},
    ),
    Followed(
        kind=Advice.LABELLED_LATER,
        reads="conversations",
        text='{"prompt": "Cow?", "completion": "Moo."}\n'
        '{"prompt": "Cow?", "completion": "Woof.", "label": 0}\n'
        '{"prompt": "Cow?", "completion": "Moo.", "label": 1}\n',
        line="label: false, but by its first row the source is not labelled; set format: labelled, or "
             "format: "
        "prompt_completion to imitate it",
        then={"format": "prompt_completion"},
    ),
    Followed(
        kind=Advice.NO_LABEL,
        reads="conversations",
        text='{"prompt": "Cow?", "completion": "Moo.", "label": 1}\n'
        '{"prompt": "Cow?", "completion": "Moo.", "label": 2}\n',
        line="label: expected true or false, got number 2; set format: prompt_completion where it labels "
        "something else",
    ),
    Followed(
        kind=Advice.NO_SCORES,
        reads="pairs",
        row={"prompt": "Cow?", "responses": ["Moo.", "Woof."], "liked": [2, 1]},
        line="responses[0]: no score or rank for it - set columns: {scores: liked} or {ranks: …}",
    ),
    Followed(
        kind=Advice.NO_SCORES,
        reads="pairs",
        row={"prompt": "Cow?", "responses": ["Moo.", "Woof."], "x": {"place": [1, 2]}},
        line="responses[0]: no score or rank for it - set columns: {scores: …} or {ranks: …}",
        then={"columns": {"ranks": "x.place"}},
    ),
    Followed(
        kind=Advice.SCORE_KEY,
        reads="pairs",
        row={"question": "Cow?", "answers": ANSWERS},
        line="answers[0].score: missing; keys are answer_id, pm_score, text - set columns: "
        "{scores: answers.*.pm_score}",
    ),
    Followed(
        kind=Advice.SCORE_KEY,
        reads="pairs",
        row={"prompt": "Cow?", "responses": [{"text": "Moo.", "ranking": 1}, {"text": "Oh.", "ranking": 2}]},
        line="responses[0].score: missing; keys are text, ranking - set columns: {ranks: "
             "responses.*.ranking}",
    ),
    Followed(
        kind=Advice.SCORE_KEY,
        reads="pairs",
        row={"question": "Cow?", "answers": json.dumps(ANSWERS)},
        line="answers[0].score: missing; keys are answer_id, pm_score, text - set columns: "
        "{scores: answers.*.pm_score}",
    ),
    Followed(
        kind=Advice.RESPONSE_KEY,
        reads="pairs",
        row={"prompt": "Cow?", "responses": [{"body": "Moo.", "score": 2}, {"body": "Woof.", "score": 1}]},
        line="responses[0].response: missing; keys are body, score - set columns: {responses: "
        "responses.*.body, scores: responses.*.score}",
    ),
    Followed(
        kind=Advice.NOT_A_MARK_COLUMN,
        reads="conversations",
        row={"messages": TALK, "train on": [0, 1]},
        line='train on: one mark per message of messages, but not read - set columns: '
        '{loss_mask: "train on"}, '
        "or remove it",
    ),
    *(
        Followed(
            kind=Advice.MARKS_OF_ANOTHER_FORM,
            reads="conversations",
            row={"messages": [*TALK, *TALK], "assistant_masks": marks},
            line=f"assistant_masks: one mark per {what} of messages, but not read; write the list "
            "loss_mask, 0 or 1 per message, or remove assistant_masks",
            mended={"messages": [*TALK, *TALK], "loss_mask": [0, 0, 0, 1]},
        )
        for what, marks in (
            *(("answer", marks) for marks in ([0, 1], [False, True], ["false", "true"], "0 1", "[0, 1]")),
            *(("message", marks) for marks in (list("0001"), "0,0,0,1", "[False, False, False, True]")),
        )
    ),
    Followed(
        kind=Advice.NOT_A_MARK_KEY,
        reads="conversations",
        row={"messages": [TALK[0], {**TALK[1], "train_loss": False}, *TALK]},
        line="messages[1].train_loss: false, like a training mark, but not read; write train: true or false, "
        "or remove train_loss",
        mended={"messages": [TALK[0], {**TALK[1], "train": False}, *TALK]},
    ),
    Followed(
        kind=Advice.TWO_ANSWERS_AND_A_LABEL,
        reads="pairs",
        row={"prompt": "Cow?", "response_a": "Moo.", "response_b": "Woof.", "winner": "b"},
        settings={"columns": {"chosen": "response_a", "rejected": "response_b"}},
        line="winner: says which of response_a and response_b is better, but is not read; write the "
             "better one "
        "into chosen and the other into rejected, without winner",
        then={"columns": {}},
        mended={"prompt": "Cow?", "chosen": "Woof.", "rejected": "Moo."},
    ),
    *(
        Followed(
            kind=Advice.FLAT_TREE,
            reads=reads,
            row=FLAT,
            line="message_id, parent_id: one turn of a tree per row; nest the turns by parent_id, one "
                 "tree per "
            "row: {prompt: {text, role, replies: [{text, role, rank, replies}]}}",
            mended=NESTED,
        )
        for reads in ("conversations", "prompts")
    ),
    *(
        Followed(
            kind=Advice.TABLE_BY_COLUMNS,
            reads="conversations",
            name=name,
            text=json.dumps(table),
            line=f"a table as one object, {shape}, not rows; write it with pandas' "
                 f"to_json(orient=\"records\", "
            "lines=True), as .jsonl",
            mended_name="b.jsonl",
            mended={"prompt": "Cow?", "completion": "Moo."},
        )
        for name in ("a.json", "a.jsonl")
        for shape, table in (
            ("{column: {row: value}}", {"prompt": {"0": "Cow?"}, "completion": {"0": "Moo."}}),
            ("{row: {column: value}}", {"0": {"prompt": "Cow?", "completion": "Moo."}}),
            ("{columns: [names], index: [numbers], data: [[values]]}",
             {"columns": ["prompt", "completion"], "index": [0], "data": [["Cow?", "Moo."]]}),
        )
    ),
    Followed(
        kind=Advice.LISTS_BY_COLUMN,
        reads="conversations",
        name="a.json",
        text='{"prompt": ["Cow?", "Dog?"], "completion": ["Moo.", "Woof."]}',
        line="a dict of lists ({column: [values]}), not rows; write one object {column: value} per row",
        mended={"prompt": "Cow?", "completion": "Moo."},
    ),
    Followed(
        kind=Advice.SEVERAL_LISTS,
        reads="conversations",
        name="a.json",
        text='{"train": [{"prompt": "Cow?", "completion": "Moo."}], "test": [{"prompt": "q", '
             '"completion": "a"}]}',
        line="one object, with rows in the lists under train, test; leave only one list in the file",
        mended_text='{"train": [{"prompt": "Cow?", "completion": "Moo."}]}',
    ),
    Followed(
        kind=Advice.LIST_IN_A_LINE,
        reads="conversations",
        text='{"type": "text2text", "instances": [{"input": "Cow?", "output": "Moo."}]}',
        line="one object, with rows in the list under 'instances'; name the file .json",
        mended_name="a.json",
        mended_text='{"type": "text2text", "instances": [{"input": "Cow?", "output": "Moo."}]}',
    ),
    Followed(
        kind=Advice.LIST_OF_NAMES,
        reads="conversations",
        row={"ask": "Cow?", "completion": "Moo."},
        settings={"columns": ["prompt", "completion"]},
        line="columns: a list names the columns of a csv or tsv file without header line; for a jsonl file "
        "write {field: column}",
        then={"columns": {"prompt": "ask"}},
    ),
    Followed(
        kind=Advice.HAS_HEADER,
        reads="conversations",
        name="a.csv",
        text="prompt,completion\nCow?,Moo.\n",
        settings={"columns": ["prompt", "completion"]},
        line="the file has a header line; remove the list under columns:",
        then={"columns": {}},
    ),
    Followed(
        kind=Advice.TWICE_IN_HEADER,
        reads="documents",
        name="a.csv",
        text="Moo.,Moo.\nCow.,Dog.\n",
        line="column 'Moo.' stands twice in the header; rename one, or set columns: [name, …] if the file "
             "has no "
        "header line",
        then={"columns": ["text", "other"]},
    ),
    Followed(
        kind=Advice.NO_GROUP_COLUMN,
        reads="pairs",
        row={"prompt": "Cow?", **SIDES, "kind": "sound"},
        group_columns=("differs", "kind"),
        line="differs: missing; columns are prompt, chosen, rejected, kind - set reward.group_column",
    ),
    Followed(
        kind=Advice.PYTHON_REPR,
        reads="conversations",
        name="a.csv",
        text=f'id,messages\n1,"{TALK}"\n',
        line="messages: Python's repr of a list, not JSON; write the cell with json.dumps",
        mended_text="id,messages\n1,\"{}\"\n".format(json.dumps(TALK).replace('"', '""')),
    ),
]  # fmt: skip


def read(path: Path, case: Followed, settings: dict[str, Any], group_column: str | None) -> list[Any]:
    source = DataSource(path=str(path), **settings)
    return list(readers.read_source(source, case.reads, group_column).records)


def as_file(path: Path, row: Any, text: str) -> Path:
    path.write_text(text or json.dumps(row) + "\n", encoding="utf-8")
    return path


def spelled_out(case: Followed) -> dict[str, Any]:
    """The settings that the line itself spells out."""
    filled = case.line.replace(UNKNOWN, case.fill or UNKNOWN)
    columns = re.search(r"set columns: (\{.*?\})", filled)
    format = re.search(r"set format: (\w+)", filled)
    return {
        **({"columns": yaml.safe_load(columns[1])} if columns is not None else {}),
        **({"format": format[1]} if format is not None else {}),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind.name} {case.reads} {case.line[:30]}")
def test_a_line_of_advice_works_when_it_is_followed(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    before, after = case.group_columns or (None, None)
    path = as_file(tmp_path / case.name, case.row, case.text)
    with pytest.raises(DataError) as caught:
        read(path, case, case.settings, before)
    line = re.sub(r"^[\w.]+:(\d+:)? ", "", str(caught.value))
    assert line == case.line
    assert words_of(case.kind).fullmatch(line), "of the kind that the table says"
    if case.mended is not None or case.mended_text:
        as_file(tmp_path / (case.mended_name or case.name), case.mended, case.mended_text)
        path = tmp_path / (case.mended_name or case.name)
        assert read(path, case, {**case.settings, **case.then}, after)
    else:
        assert read(path, case, {**case.settings, **spelled_out(case), **case.then}, after)


def words_of(kind: Advice) -> re.Pattern[str]:
    """A kind's words, with anything for the names."""
    parts = Formatter().parse(kind.value)
    return re.compile("".join(re.escape(text) + ("" if name is None else ".+") for text, name, *_ in parts))


def test_every_kind_of_advice_is_followed():
    assert {case.kind for case in CASES} == set(Advice)


def test_advice_stands_in_its_table_alone():
    for path in (path for path in DATA.rglob("*.py") if path.name != "advice.py"):
        strings = re.findall(r"set (?:columns|format|reward)\b[^\n]*", path.read_text(encoding="utf-8"))
        assert not strings, path
