"""What stands beside role and content: tools, calls, thoughts, training marks, and keys that nobody reads."""

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from stages.config.data import DataSource
from stages.data.reading import readers
from stages.data.reading.records import Conversation, Message, Pair, Prompt
from stages.data.reading.schemas import Kind
from stages.errors import DataError

Row = dict[str, Any]


def say(role: str, content: Any = None, **more: Any) -> Row:
    return {"role": role, **({} if content is None else {"content": content}), **more}


def function(name: str, **more: Any) -> Row:
    return {"type": "function", "function": {"name": name, **more}}


def jsonl(path: Path, *rows: Row) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, reads: Kind = "conversations", **settings: Any) -> readers.Rows[Any]:
    return readers.read_source(DataSource(path=str(path), **settings), reads)


def one(tmp_path: Path, row: Row, reads: Kind = "conversations") -> Any:
    (record,) = read(jsonl(tmp_path / "a.jsonl", row), reads).records
    return record


def failure(tmp_path: Path, row: Row, reads: Kind = "conversations") -> str:
    with pytest.raises(DataError) as caught:
        read(jsonl(tmp_path / "a.jsonl", row), reads)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/a.jsonl:1: ") or line.startswith("a.jsonl:1: ")
    return line.partition("a.jsonl:1: ")[2]


ADD = function(
    "add", parameters={"type": "object", "properties": {"a": {"type": "integer", "default": None}}}
)
ASKED = [say("user", "1+2?")]
CALL = function("add", arguments={"a": 1, "b": None})


# Tools


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [ADD]},
        {"tools": ADD},
        {"tools": json.dumps([ADD])},
        {"tools": json.dumps(ADD)},
        {"tools": [json.dumps(ADD)]},
        {"tools": [ADD["function"]]},
        {"tools": ADD["function"]},
        {"tools": [{"type": "function", **ADD["function"]}]},
        {"tools": [function("add", parameters=json.dumps(ADD["function"]["parameters"]))]},
        {"functions": [ADD["function"]]},
        {"functions": json.dumps([ADD["function"]]), "tools": None},
    ],
    ids=lambda tools: json.dumps(tools)[:60],
)
@pytest.mark.parametrize("beside", ["messages", "conversations", "prompt"])
def test_tools_in_every_form_are_openai_functions_in_every_stage(tmp_path, tools, beside):
    answered = [*ASKED, say("assistant", "3")]
    row = {"prompt": "1+2?", "completion": "3"} if beside == "prompt" else {beside: answered}
    assert one(tmp_path, {**row, **tools}).tools == (ADD,)
    prompt = one(tmp_path, {**row, **tools}, "prompts")
    assert prompt.tools == (ADD,)
    assert not {"tools", "functions"} & {key for key, value in prompt.row.items() if value is not None}
    pair = {beside: "1+2?" if beside == "prompt" else ASKED, "chosen": "3", "rejected": "4"}
    sides = {"chosen": [say("assistant", "3")], "rejected": [say("assistant", "4")]}
    pair = {**pair, **(sides if beside == "messages" else {})}
    assert one(tmp_path, {**pair, **tools}, "pairs").tools == (ADD,)


@pytest.mark.parametrize("tools", [None, [], {}, "", "[]", "null", " "], ids=repr)
def test_no_tools_are_no_tools(tmp_path, tools):
    assert one(tmp_path, {"messages": [*ASKED, say("assistant", "3")], "tools": tools}).tools == ()


def test_a_column_of_code_named_functions_is_no_list_of_tools(tmp_path):
    row = {"prompt": "Explain.", "functions": "def add(a, b): ..."}
    assert one(tmp_path, row, "prompts") == Prompt(
        messages=(Message(role="user", content="Explain."),), row={"functions": row["functions"]}
    )


@pytest.mark.parametrize(
    ("tools", "line"),
    [
        ({"tools": "weather"},
         "tools: expected tools as a list of JSON Schema functions, or its JSON text, got text"),
        ({"tools": 7}, "tools: expected tools as a list of JSON Schema functions, or its JSON text, got "
                       "number 7"),
        ({"tools": "[{'name': 'add'}]"}, "tools: Python's repr of a list, not JSON; write the cell with "
                                         "json.dumps"),
        ({"tools": ["weather"]},
         "tools[0]: expected a tool {type: function, function: {name, description, parameters}}, got text"),
        ({"tools": [{"add": {}}]}, "tools[0].name: missing; keys are add"),
        ({"tools": [{"type": "function", "function": "add"}]},
         "tools[0].function: expected a function {name, description, parameters}, got text"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: only functions are read, not web_search"),
        ({"tools": [{"name": " "}]}, "tools[0].name: empty"),
        ({"tools": [{"name": "add", "parameters": [1]}]},
         "tools[0].parameters: expected a JSON Schema, or its JSON text, got list"),
        ({"tools": [{"name": "add", "input_schema": {}}]},
         "tools[0].input_schema: not read; rename it parameters"),
        ({"tools": [ADD], "functions": [ADD]}, "functions: beside tools; keep one of them"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("reads", ["conversations", "prompts"])
def test_tools_that_cannot_be_read_are_named(tmp_path, reads, tools, line):
    row = {"messages": [*ASKED, say("assistant", "3")], **tools}
    assert failure(tmp_path, row, reads) == line


# Calls


@pytest.mark.parametrize(
    "turn",
    [
        say("assistant", "", tool_calls=[CALL]),
        say("assistant", tool_calls=[CALL]),
        say("assistant", tool_calls=CALL),
        say("assistant", tool_calls=json.dumps([CALL])),
        say("assistant", tool_calls=[{"name": "add", "arguments": {"a": 1, "b": None}}]),
        say("assistant", tool_calls=[function("add", arguments='{"a": 1, "b": null}')]),
        say("assistant", function_call={"name": "add", "arguments": '{"a": 1, "b": null}'}, tool_calls=None),
        say("function_call", '{"name": "add", "arguments": {"a": 1, "b": null}}'),
        say("tool_call", '[{"name": "add", "arguments": {"a": 1, "b": null}}]'),
        {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": null}"}'},
    ],
    ids=lambda turn: json.dumps(turn)[:80],
)
def test_calls_in_every_form_are_openai_calls_with_their_arguments_parsed(tmp_path, turn):
    result = {"from": "observation", "value": "3"} if "from" in turn else say("tool", "3")
    asked = {"from": "human", "value": "1+2?"} if "from" in turn else ASKED[0]
    (_, called, answer) = one(tmp_path, {"messages": [asked, turn, result, turn]}).messages[:3]
    assert called == Message(role="assistant", content="", tool_calls=(CALL,))
    assert answer == Message(role="tool", content="3")


def test_ids_names_and_a_call_without_arguments_are_kept(tmp_path):
    turns = [
        *ASKED,
        say("assistant", "Let me see.", tool_calls=[{"id": "c1", **function("now", arguments=None)}]),
        say("tool", "noon", tool_call_id="c1", name="now"),
        say("function", "noon", name="now"),
        say("assistant", "3"),
    ]
    conversation = one(tmp_path, {"messages": turns})
    assert conversation.messages[1:4] == (
        Message(
            role="assistant",
            content="Let me see.",
            tool_calls=({"id": "c1", **function("now", arguments={})},),
        ),
        Message(role="tool", content="noon", tool_call_id="c1", name="now"),
        Message(role="tool", content="noon", name="now"),
    )
    prompt = one(tmp_path, {"prompt": turns[:4]}, "prompts")
    assert prompt.messages == conversation.messages[:4]


@pytest.mark.parametrize(
    ("turn", "line"),
    [
        (say("assistant", tool_calls=[{}]), "messages[1].tool_calls[0].name: missing; keys are none"),
        (say("assistant", tool_calls=["add"]),
         "messages[1].tool_calls[0]: expected a call {name, arguments}, got text"),
        (say("assistant", tool_calls="add(1)"),
         "messages[1].tool_calls: expected a call {name, arguments}, or a list of them, got text"),
        (say("assistant", tool_calls=[{"name": "add", "parameters": {"a": 1}}]),
         "messages[1].tool_calls[0].arguments: missing; keys are name, parameters"),
        (say("assistant", tool_calls=[function("add", arguments="a=1")]),
         "messages[1].tool_calls[0].function.arguments: expected an object, or its JSON text, got text"),
        (say("assistant", tool_calls=[function("add", arguments="[1]")]),
         "messages[1].tool_calls[0].function.arguments: expected an object, or its JSON text, got list"),
        (say("assistant", tool_calls=[function("add", arguments="{'a': 1}")]),
         "messages[1].tool_calls[0].function.arguments: Python's repr of a list, not JSON; write the cell "
         "with "
         "json.dumps"),
        (say("assistant", tool_calls=[{"type": "mcp", "name": "add"}]),
         "messages[1].tool_calls[0].type: only functions are read, not mcp"),
        (say("assistant", tool_calls=[CALL], function_call=CALL["function"]),
         "messages[1].function_call: beside tool_calls; keep one of them"),
        (say("user", "q", tool_calls=[CALL]), "messages[1]: a call on a user turn; only the assistant "
                                              "calls tools"),
        (say("function_call", "add(1)"),
         "messages[1].content: expected a call {name, arguments}, or a list of them, got text"),
        (say("assistant", tool_calls=[]), "messages[1].content: missing; keys are role, tool_calls"),
        (say("assistant", "", tool_calls=[]),
         "messages[1].content: empty response; remove the row, or set on_bad_row: skip"),
        (say("tool", {"sum": 3}), "messages[1].content: expected text, got object"),
        (say("tool", "3", tool_call_id=7), "messages[1].tool_call_id: expected text, got number 7"),
        (say("assistant", tool_calls=[function("add", arguments={"a": "\ud800"})]),
         "messages[1].tool_calls[0].function.arguments: half a surrogate pair in it; it is no text"),
        (say("user", "q", tools=[ADD]),
         "messages[1].tools: tools are read beside the messages; move them to a column tools"),
        (say("user", "q", images=["a.png"]),
         "messages[1].images: images are not read; remove the row, or set on_bad_row: skip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_calls_that_cannot_be_read_are_named(tmp_path, turn, line):
    assert failure(tmp_path, {"messages": [*ASKED, turn, say("assistant", "a")]}) == line


def test_what_an_arrow_table_pads_is_no_part_of_tools_or_calls(tmp_path):
    other = function("now", parameters={"properties": {"zone": {"type": "string"}}})
    turns = [
        *ASKED,
        say("assistant", "", tool_calls=[function("add", arguments={"a": 1})]),
        say("tool", "3"),
        say("assistant", "", tool_calls=[function("now", arguments={"zone": "UTC"})]),
    ]
    table = pyarrow.Table.from_pylist([{"messages": turns, "tools": [ADD, other]}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (conversation,) = read(tmp_path / "a.parquet").records
    _, called, answer, again = conversation.messages
    assert called.tool_calls == (function("add", arguments={"a": 1}),)
    assert again.tool_calls == (function("now", arguments={"zone": "UTC"}),)
    assert answer == Message(role="tool", content="3")
    add = function("add", parameters={"type": "object", "properties": {"a": {"type": "integer"}}})
    assert conversation.tools == (add, other)


def test_calls_tell_two_turns_without_text_apart(tmp_path):
    calls = {
        side: [*ASKED, say("assistant", tool_calls=[function("add", arguments={"a": number})])]
        for side, number in (("chosen", 1), ("rejected", 2))
    }
    pair = one(tmp_path, {"prompt": ASKED, **calls}, "pairs")
    assert isinstance(pair, Pair)
    assert [side[0].tool_calls[0]["function"]["arguments"]["a"] for side in (pair.chosen, pair.rejected)] == [
        1,
        2,
    ]


# Thoughts


@pytest.mark.parametrize(
    ("keys", "reasoning"),
    [
        ({"reasoning_content": "Two twos."}, "Two twos."),
        ({"reasoning": "Two twos."}, "Two twos."),
        ({"thinking": "Two twos."}, "Two twos."),
        ({"thinking": "Two twos.", "reasoning": "Two twos.", "reasoning_content": None}, "Two twos."),
        ({"reasoning": " "}, None),
    ],
    ids=str,
)
def test_thoughts_under_every_name_are_the_turns_reasoning(tmp_path, keys, reasoning):
    row = {"messages": [say("user", "2+2?"), say("assistant", "4", **keys)]}
    assert one(tmp_path, row).messages[1] == Message(role="assistant", content="4", reasoning=reasoning)
    pair = {"prompt": "2+2?", "chosen": [say("assistant", "4", **keys)], "rejected": [say("assistant", "5")]}
    assert one(tmp_path, pair, "pairs").chosen[0].reasoning == reasoning


@pytest.mark.parametrize(
    ("turn", "line"),
    [
        (say("assistant", "4", reasoning="a", thinking="b"),
         "messages[1].thinking: differs from reasoning; keep one of them"),
        (say("assistant", "4", thinking=["a"]), "messages[1].thinking: expected text, got list"),
        (say("assistant", "", text="4"), "messages[1].text: not read, and the content is empty; write it "
                                         "as content"),
        (say("assistant", "", thought="4", tool_calls=[CALL]),
         "messages[1].thought: not read, and the content is empty; write it as reasoning_content"),
        (say("model", parts=[{"text": "4"}]),
         "messages[1].parts: not read, and the content is empty; write it as content, a text or a list of "
         "{type: text, text: …}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_thoughts_and_contents_that_cannot_be_read_are_named(tmp_path, turn, line):
    assert failure(tmp_path, {"messages": [say("user", "2+2?"), turn]}) == line


ASKED_TWO = {"prompt": "2+2?", "completion": "4"}


@pytest.mark.parametrize("column", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    "row",
    [
        ASKED_TWO,
        {**ASKED_TWO, "label": True},
        {"instruction": "2+2?", "output": "4"},
        {"prompt": [say("user", "2+2?")], "completion": [say("assistant", "4")]},
    ],
    ids=str,
)
def test_thoughts_in_a_column_of_their_own_are_the_answers_reasoning(tmp_path, row, column):
    path = jsonl(tmp_path / "a.jsonl", {**row, column: "Two twos."})
    reader = readers.read_whole(DataSource(path=str(path)), "conversations")
    (record,) = reader
    assert record.messages[1] == Message(role="assistant", content="4", reasoning="Two twos.")
    assert reader.columns_seen["reasoning"] == column, "check says so"
    (renamed,) = read(jsonl(path, {**row, "cot": "Two twos."}), columns={"reasoning": "cot"}).records
    assert renamed.messages == record.messages


@pytest.mark.parametrize(
    "further",
    [
        {"reasoning": "on"},
        {"thinking": True},
        {"reasoning": {"effort": "high"}},
        {"reasoning": " "},
        {"reasoning_content": None},
        {"thinking": 3.5},
    ],
    ids=str,
)
def test_a_column_that_says_how_much_to_think_holds_no_thoughts(tmp_path, further):
    path = jsonl(tmp_path / "a.jsonl", {**ASKED_TWO, **further})
    reader = readers.read_whole(DataSource(path=str(path)), "conversations")
    assert [record.messages[1].reasoning for record in reader] == [None]
    assert "reasoning" not in reader.columns_seen


@pytest.mark.parametrize("said", ["<think>\nTwo twos.\n</think>\n\n4", "Two twos.\n</think>4"])
def test_thoughts_that_stand_in_the_answer_too_are_said_once(tmp_path, said):
    row = {"prompt": "2+2?", "completion": said, "reasoning": "Two twos."}
    assert one(tmp_path, row).messages[1] == Message(role="assistant", content=said)
    turns = [say("user", "2+2?"), say("assistant", said)]
    assert one(tmp_path, {"messages": turns, "reasoning": "Two twos."}).messages[1].content == said


UNREAD = "are not read; write them into the assistant's message there, as reasoning_content, or remove"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({**ASKED_TWO, "reasoning": "a", "thinking": "b"},
         "thinking: differs from reasoning; keep one of them"),
        ({**ASKED_TWO, "thinking": ["a"]}, "thinking: expected text, got list"),
        ({**ASKED_TWO, "completion": [say("assistant", "4", reasoning="a")], "thinking": "b"},
         f"thinking: thoughts beside completion {UNREAD} thinking"),
        ({"messages": [say("user", "2+2?"), say("assistant", "4")], "reasoning": "a"},
         f"reasoning: thoughts beside messages {UNREAD} reasoning"),
        ({"conversations": [say("user", "2+2?"), say("assistant", "4")], "thinking": "a"},
         f"thinking: thoughts beside conversations {UNREAD} thinking"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_thoughts_of_a_row_that_are_not_its_answers_are_named(tmp_path, row, line):
    assert failure(tmp_path, row) == line


# Training marks


def trained(record: Conversation) -> list[str]:
    return [
        message.content for message in record.messages if message.role == "assistant" and message.is_trained
    ]


TURNS = [say("user", "x?"), say("assistant", "WRONG"), say("user", "no, y"), say("assistant", "y")]


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "loss", "loss_mask"])
@pytest.mark.parametrize("no", [0, False, 0.0], ids=repr)
def test_a_turn_that_is_marked_out_is_context(tmp_path, key, no):
    turns = [{**TURNS[0], key: no}, {**TURNS[1], key: no}, TURNS[2], {**TURNS[3], key: not no}]
    record = one(tmp_path, {"messages": turns})
    assert [message.content for message in record.messages] == ["x?", "WRONG", "no, y", "y"]
    assert trained(record) == ["y"]
    assert record.messages[0].is_trained, "of no account where nothing is said by the assistant"


@pytest.mark.parametrize(
    "column", ["loss_mask", "loss_masks", "train", "trainable", "weight", "weights", "loss"]
)
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_list_of_marks_has_one_for_each_message(tmp_path, column, field):
    row = {field: TURNS, "system": "S", column: [0, 0, False, 1.0]}
    assert trained(one(tmp_path, row)) == ["y"]
    assert trained(one(tmp_path, {**row, column: "[0, null, 0, 0]"})) == ["WRONG"]


def test_a_list_of_marks_may_have_any_name_that_the_config_says(tmp_path):
    row = {"messages": TURNS, "mine": {"marks": [0, 0, 0, 1]}}
    rows = read(jsonl(tmp_path / "a.jsonl", row), columns={"loss_mask": "mine.marks"})
    assert trained(rows.records[0]) == ["y"]


def test_marks_of_a_turn_and_of_the_row_that_agree_are_one(tmp_path):
    turns = [TURNS[0], {**TURNS[1], "train": False, "weight": 0}, *TURNS[2:]]
    assert trained(
        one(tmp_path, {"messages": turns, "loss_mask": [0, 0, 0, 1], "weights": [0, 0, 0, 1]})
    ) == ["y"]


def test_a_row_of_which_nothing_is_trained_gives_no_record_and_is_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"messages": TURNS}, {"messages": TURNS, "loss_mask": [0, 0, 0, 0]})
    rows = read(path)
    assert (len(rows.records), rows.num_filtered) == (1, 1)


@pytest.mark.parametrize(
    ("mark", "line"),
    [
        ({"weight": 0.5}, "messages[1].weight: expected 0 or 1, true or false, got number 0.5: a turn is "
                          "trained or "
         "not; round it, or weigh whole rows by the weight of their source"),
        ({"loss": "no"}, "messages[1].loss: expected 0 or 1, true or false, got text: a turn is trained or "
         "not; round it, or weigh whole rows by the weight of their source"),
        ({"train": True, "weight": 0}, "messages[1].train: contradicts messages[1].weight; keep one of them"),
        ({"loss_weight": 0}, "messages[1].loss_weight: number 0, like a training mark, but not read; "
                             "write train: "
         "true or false, or remove loss_weight"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
         "messages[1].train_detail: list, like a training mark, but not read; write train: true or false, or "
         "remove train_detail"),
        *(({key: text}, f"messages[1].{key}: text '{text}', like a training mark, but not read; write train: "
                        f"true or false, or remove {key}")
          for key, text in (("train_mask", "false"), ("masked", "true"), ("label", "0"))),
        ({"Label": False}, "messages[1].Label: false, like a training mark, but not read; write train: "
                           "true or "
         "false, or remove Label"),
    ],
    ids=str,
)  # fmt: skip
def test_marks_of_a_turn_that_cannot_be_read_are_named(tmp_path, mark, line):
    assert failure(tmp_path, {"messages": [TURNS[0], {**TURNS[1], **mark}]}) == line


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"messages": [{**TURNS[0], "train": True}, TURNS[1]]},
         "messages[0].train: true on a user turn, but only assistant turns are trained; write 0, or "
         "remove it"),
        ({"messages": TURNS, "loss_mask": [1, 1, 0, 1]},
         "loss_mask[0]: number 1 on a user turn, but only assistant turns are trained; write 0, or remove "
         "it"),
        ({"conversations": TURNS, "loss_mask": [0, 1]},
         "loss_mask: 2 marks for 4 messages in conversations; write one per message"),
        ({"messages": TURNS, "weights": [0, 0.5, 0, 1]},
         "weights[1]: expected 0 or 1, true or false, got number 0.5: a turn is trained or not; round it, "
         "or weigh "
         "whole rows by the weight of their source"),
        ({"messages": TURNS, "loss_mask": [0, 0, 0, 1], "weights": [0, 1, 0, 1]},
         "weights[1]: contradicts loss_mask[1]; keep one of them"),
        ({"messages": [TURNS[0], {**TURNS[1], "train": True}, *TURNS[2:]], "loss_mask": [0, 0, 0, 1]},
         "loss_mask[1]: contradicts messages[1]; keep one of them"),
        *(({"messages": TURNS, column: no},
           f"{column}: text '{no}' for a whole row; remove the row, or write one mark per message")
          for column in ("train", "weight", "loss_mask") for no in ("0", "0.0", "False")),
        *(({**answered, "loss_mask": value},
           f"loss_mask: expected a list of marks, one per message, or its JSON text, got {shape}")
          for answered in ({"messages": TURNS}, {"prompt": "x?", "completion": "y"})
          for value, shape in (("0,0,0,1", "text"), ("0001", "text"), ("[False, True]", "text"),
                               (7, "number 7"), ({"a": 1}, "object"),
                               ([[0, 1]], "a list of lists or objects"))),
        ({"messages": TURNS, "weights": "0 0 0 1"},
         "weights: expected a list of marks, one per message, or its JSON text, got text"),
        ({"messages": TURNS, "train": False},
         "train: false for a whole row; remove the row, or write one mark per message"),
        ({"prompt": "x?", "completion": "y", "loss_mask": [0, 1]},
         "loss_mask: marks are read beside messages or conversations, one per message; write the row so, or "
         "remove loss_mask"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_marks_of_a_row_that_cannot_be_read_are_named(tmp_path, row, line):
    assert failure(tmp_path, row) == line


@pytest.mark.parametrize(
    "further",
    [
        *(
            {"weight": 0.5},
            {"train": True},
            {"loss": 1.25},
            {"labels": [3, 7]},
            {"weight": "0.5"},
            {"train": "1"},
        ),
        *({"loss_mask": ""}, {"loss_mask": 1}, {"label_ids": [1, 0, 1]}, {"masks": "1, 0, a"}),
    ],
    ids=str,
)
def test_a_column_that_only_sounds_like_a_mark_is_a_column_like_any_other(tmp_path, further):
    assert trained(one(tmp_path, {"messages": TURNS, **further})) == ["WRONG", "y"]


# Keys that nobody reads


def test_keys_that_nobody_reads_are_counted_by_name_and_marks_where_nothing_is_imitated(tmp_path):
    turns = [
        say("user", "q", id=7, name="Ann"),
        say("assistant", "a", id="m2", weight=0, train=None, tags=[]),
    ]
    path = jsonl(tmp_path / "a.jsonl", {"messages": turns}, {"messages": [*turns[:1], say("assistant", "b")]})
    assert read(path).unread_keys == {"id": 3, "name": 2}
    assert read(path, "prompts").unread_keys == {"id": 3, "name": 2, "weight": 1}
    source = DataSource(path=str(path))
    found = readers.read([source, source], "conversations", seed=0)
    assert found.unread_keys == {"id": 6, "name": 4}


def test_keys_of_rows_that_are_left_out_are_not_counted(tmp_path):
    good = {"messages": [say("user", "q", id=1), say("assistant", "a")]}
    bad = {"messages": [say("user", "q", other=1), say("assistant", " ")]}
    assert read(jsonl(tmp_path / "a.jsonl", good, bad), on_bad_row="skip").unread_keys == {"id": 1}


def test_a_rated_message_is_read_with_its_score(tmp_path):
    row = {"prompt": "q", "responses": [say("assistant", "a", score=1), say("assistant", "b", score=2)]}
    rows = read(jsonl(tmp_path / "a.jsonl", row), "pairs")
    assert rows.records[0].chosen[0].content == "b" and not rows.unread_keys


# Text that is JSON, and places


MESSAGES = json.dumps(ASKED)
ANSWERS = {text: json.dumps([say("assistant", text)]) for text in ("good", "bad")}
WHOLE = {text: json.dumps([*ASKED, say("assistant", text)]) for text in ("good", "bad")}


def as_table(path: Path, rows: Iterable[Row]) -> Path:
    """The rows as csv, jsonl or parquet, by the name of the file."""
    rows = list(rows)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        jsonl(path, *rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("reads", "row"),
    [
        ("conversations", {"prompt": MESSAGES, "completion": "good"}),
        ("conversations", {"prompt": "1+2?", "completion": ANSWERS["good"]}),
        ("conversations", {"prompt": MESSAGES, "completion": json.dumps(say("assistant", "good"))}),
        ("conversations", {"messages": WHOLE["good"]}),
        ("conversations", {"conversations": WHOLE["good"]}),
        ("conversations", {"instruction": MESSAGES, "output": ANSWERS["good"]}),
        ("pairs", {"prompt": "1+2?", "chosen": WHOLE["good"], "rejected": WHOLE["bad"]}),
        ("pairs", {"prompt": MESSAGES, "chosen": ANSWERS["good"], "rejected": ANSWERS["bad"]}),
        ("pairs", {"prompt": MESSAGES, "chosen": "good", "rejected": "bad"}),
        ("pairs", {"chosen": WHOLE["good"], "rejected": WHOLE["bad"]}),
        ("pairs", {"prompt": MESSAGES, "responses": json.dumps(["bad", "good"]), "scores": "[1, 2]"}),
        ("prompts", {"prompt": MESSAGES}),
        ("prompts", {"messages": WHOLE["good"]}),
        ("prompts", {"question": MESSAGES}),
    ],
    ids=str,
)
def test_json_text_of_messages_is_read_as_messages_in_every_cell(tmp_path, kind, reads, row):
    (record,) = read(as_table(tmp_path / f"a.{kind}", [row]), reads).records
    good, bad = (Message(role="assistant", content=text) for text in ("good", "bad"))
    asked = (Message(role="user", content="1+2?"),)
    match record:
        case Conversation(messages=messages):
            assert messages == (*asked, good)
        case Pair(prompt=prompt, chosen=chosen, rejected=rejected):
            assert (prompt, chosen, rejected) == (asked, (good,), (bad,))
        case Prompt(messages=messages):
            assert messages == asked


@pytest.mark.parametrize(
    "text",
    [
        *("[1, 2]", "[]", '{"role": "admin", "content": "x"}', '[{"name": "x"}]', "[x](y)", "array"),
        *('[{"from": "Oslo", "to": "Rome"}]', '[{"from": 1, "value": 2}]', "[{x: role}]"),
        *('{"role": "user", "content": "q"} - what is it?', "{'a': 1}", '{"a": "role"'),
    ],
)
def test_other_json_is_a_text_like_any_other(tmp_path, text):
    record = one(tmp_path, {"prompt": "q", "completion": text})
    assert record.messages[1] == Message(role="assistant", content=text)


@pytest.mark.parametrize(
    ("reads", "row", "field"),
    [
        ("conversations", {"messages": str(ASKED)}, "messages"),
        ("conversations", {"prompt": str(ASKED), "completion": "a"}, "prompt"),
        ("conversations", {"prompt": "q", "completion": f"{[say('assistant', 'a')]}"}, "completion"),
        ("conversations", {"conversations": f"array({[{'from': 'human', 'value': 'q'}]})"}, "conversations"),
        ("pairs", {"prompt": "q", "chosen": str([say("assistant", "a")]), "rejected": "b"}, "chosen"),
        ("prompts", {"prompt": str(ASKED[0])}, "prompt"),
        ("prompts", {"prompt": str([{"id": 1, "name": None, **ASKED[0]}])}, "prompt"),
        ("prompts", {"prompt": str({"id": 1, "from": "Human", "value": "q"})}, "prompt"),
        ("prompts", {"prompt": "[{\"role\": 'user', \"content\": \"it's\"}]"}, "prompt"),
        ("conversations", {"messages": "[{\"role\": 'user', \"content\": \"it's\"}]"}, "messages"),
        ("prompts", {"prompt": f"array({MESSAGES}, dtype=object)"}, "prompt"),
    ],
)  # fmt: skip
def test_pythons_repr_of_messages_is_named_as_such(tmp_path, reads, row, field):
    line = failure(tmp_path, row, reads)
    assert line == f"{field}: Python's repr of a list, not JSON; write the cell with json.dumps"


@pytest.mark.parametrize(
    ("text", "at"),
    [
        (MESSAGES[:-3], 30),
        (json.dumps([{"content": "q", "role": "user"}])[:20], 19),
        (json.dumps({"content": "q", "role": "user"})[:20], 18),
        (json.dumps([{"id": 1, "role": "user", "content": "q"}])[:-1], 43),
        ('{"role": "user", "content": "q"', 32),
        ('{"role": "user", "content": "q"}\n{"role": "assistant", "content": "r"}', 34),
    ],
)
def test_messages_cut_short_or_in_a_row_in_a_cell_are_no_text(tmp_path, text, at):
    line = f"begins like the JSON of messages, but is not valid JSON (character {at})"
    assert failure(tmp_path, {"prompt": text, "completion": "a"}) == f"prompt: {line}"
    assert failure(tmp_path, {"messages": text}) == f"messages: {line}"


@pytest.mark.parametrize(
    "talk",
    [
        [{"role": "User", "content": "q"}],
        {"role": "User", "content": "q"},
        [{"role": "User", "content": "q", "id": 1}],
        [{"from": "narrator", "value": "q"}, {"from": "narrator", "value": "r"}],
    ],
    ids=json.dumps,
)
def test_a_role_that_is_not_known_is_named_in_json_text_too(tmp_path, talk):
    line = failure(tmp_path, {"prompt": json.dumps(talk), "completion": "a"})
    assert re.fullmatch(r"prompt(\[0\])?\.(role|from): unknown role '(User|narrator)'; use .*", line)
    assert line == failure(tmp_path, {"prompt": talk, "completion": "a"})


def test_every_record_says_where_its_row_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(
        '\n{"prompt": "q", "completion": "a"}\n\n{"prompt": "r", "completion": "b"}\n'
    )
    assert [record.place for record in read(Path("a.jsonl")).records] == ["a.jsonl:2", "a.jsonl:4"]
    assert [record.place for record in read(Path("a.jsonl"), "prompts").records] == ["a.jsonl:2", "a.jsonl:4"]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    as_table(tmp_path / "b.parquet", [pair, pair])
    assert [record.place for record in read(Path("b.parquet"), "pairs").records] == [
        "b.parquet:1",
        "b.parquet:2",
    ]


# Which answer is better


@pytest.mark.parametrize(
    ("names", "label", "values"),
    [
        (("human_ref_A", "human_ref_B"), "labels", (1, 0)),
        (("response_0", "response_1"), "better_response_id", (0, 1)),
    ],
)
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_label_beside_two_answers_says_which_is_chosen(tmp_path, names, label, values, is_turned):
    rows = [{"history": "q", names[0]: "one", names[1]: "two", label: value} for value in values]
    mapped = names[::-1] if is_turned else names
    columns = {"prompt": "history", "chosen": mapped[0], "rejected": mapped[1]}
    found = read(jsonl(tmp_path / "a.jsonl", *rows), "pairs", columns=columns).records
    assert [pair.chosen[0].content for pair in found] == ["one", "two"]
    assert [pair.rejected[0].content for pair in found] == ["two", "one"]
    reader = readers.read_whole(DataSource(path=str(tmp_path / "a.jsonl"), columns=columns), "pairs")
    next(reader)
    assert reader.columns_seen == {**columns, "label": label}, "check says so"
    with pytest.raises(DataError, match=rf"{label}: expected {values[0]} or {values[1]}, got number 2"):
        read(jsonl(tmp_path / "a.jsonl", {**rows[0], label: 2}), "pairs", columns=columns)


def test_the_beginning_of_two_texts_is_their_prompt_only_where_all_text_is_read(tmp_path):
    sides = {"chosen": "Q: 2+2?\nIt is 4.", "rejected": "Q: 2+2?\nIt is 5."}
    path = jsonl(
        tmp_path / "a.jsonl", {**sides, "group": "sums", "score": 3, "note": None}, {**sides, "group": "x"}
    )
    reader = readers.read_whole(DataSource(path=str(path)), "pairs", "group")
    assert [pair.prompt[0].content for pair in reader] == ["Q: 2+2?"] * 2
    assert (reader.counts.num_shared_prompts, reader.counts.shared_prompt) == (2, "Q: 2+2?")
    with pytest.raises(DataError, match="text that is not read in group"):
        read(path, "pairs")


@pytest.mark.parametrize("labels", [(1, 0), (1.0, 0.0), ("1", "0"), ("1.0", "0.0"), (True, False)], ids=str)
def test_a_label_is_true_or_false_also_as_a_number(tmp_path, labels):
    rows = [
        {"prompt": "q", "completion": text, "label": label} for text, label in zip("ab", labels, strict=True)
    ]
    found = read(jsonl(tmp_path / "a.jsonl", *rows))
    assert ([record.messages[1].content for record in found.records], found.num_filtered) == (["a"], 1)


@pytest.mark.parametrize(
    ("verdict", "shown"),
    [(-1, "number -1"), *((word, f"text '{word}'") for word in ("-1", "no", "Rejected", "thumbs_down"))],
)
@pytest.mark.parametrize("beside", [ASKED_TWO, {"messages": TURNS}], ids=str)
def test_a_label_in_other_words_is_never_imitated_whichever_row_is_first(tmp_path, beside, verdict, shown):
    format = "messages" if "messages" in beside else "prompt_completion"
    line = f"label: expected true or false, got {shown}; set format: {format} where it labels something else"
    for first in ((), ({**beside, "label": 1},)):
        path = jsonl(tmp_path / "a.jsonl", *first, {**beside, "label": verdict})
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value).endswith(f"a.jsonl:{1 + len(first)}: {line}")
    assert read(jsonl(tmp_path / "a.jsonl", {**beside, "label": verdict}), format=format).records


@pytest.mark.parametrize("label", [2, "algebra", None, ""], ids=repr)
def test_a_label_that_judges_nothing_is_a_column_like_any_other(tmp_path, label):
    assert one(tmp_path, {**ASKED_TWO, "label": label}).messages[1].content == "4"


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("response_a", "response_b"), "winner"),
        (("model_a_answer", "model_b_answer"), "winner"),
        (("answer_1", "answer_2"), "preferred_answer"),
        (("response", "response_2"), "overall_preference"),
        (("first_answer", "second_answer"), "better"),
        (("answer_left", "answer_right"), "human-choice"),
        (("modelA", "modelB"), "winner_model_a"),
    ],
)
def test_a_column_that_says_which_of_two_answers_is_better_is_never_left_unread(tmp_path, names, label):
    row = {"prompt": "q", names[0]: "x", names[1]: "y"}
    columns = {"chosen": names[0], "rejected": names[1]}
    with pytest.raises(DataError, match=f"a.jsonl:1: {label}: says which of {names[0]} and {names[1]} is"):
        read(jsonl(tmp_path / "a.jsonl", {**row, label: "b"}), "pairs", columns=columns)
    assert read(jsonl(tmp_path / "a.jsonl", {**row, label: None}), "pairs", columns=columns).records


@pytest.mark.parametrize(
    "names", [("chosen", "rejected"), ("good_answer", "bad_answer"), ("better", "worse")]
)
def test_names_that_say_which_answer_is_better_say_so_beside_a_label(tmp_path, names):
    row = {"prompt": "q", names[0]: "x", names[1]: "y", "label": 0}
    columns = {"chosen": names[0], "rejected": names[1]}
    assert (
        read(jsonl(tmp_path / "a.jsonl", row), "pairs", columns=columns).records[0].chosen[0].content == "x"
    )


@pytest.mark.parametrize(
    "further",
    [{"dialogue": ["do you agree?"]}, {"meta": {"a": [{"b": "q"}]}}, {"prompts": ["q"]}, {"x": [[], ["q"]]}],
    ids=str,
)
def test_text_at_any_depth_beside_two_texts_may_be_their_prompt(tmp_path, further):
    sides = {"chosen": "Yes 0 I think so", "rejected": "Yes 0 I do not"}
    assert "text that is not read in" in failure(tmp_path, {**sides, **further}, "pairs")
    assert one(tmp_path, {**sides, "scores": [1, [2]], "meta": {"n": 1, "m": " "}}, "pairs")
