"""Schemas: hand-written rows of every format give exact records in every reads; bad ones one exact line."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.config.data import DataFormat, DataSource
from stages.data.reading import readers
from stages.data.reading.records import Conversation, Document, Message, Pair, Prompt, split_key
from stages.data.reading.schemas import SCHEMAS, Kind, Record, RowError, detect, fields_of, named
from stages.errors import DataError

Row = dict[str, Any]


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def system(text: str) -> Message:
    return Message(role="system", content=text)


def say(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


def told(sender: str, value: Any) -> Row:
    return {"from": sender, "value": value}


def parsed(reads: Kind, row: Row, min_margin: float = 0.0, **columns: str) -> tuple[Record, ...]:
    schema = detect(reads, row, columns)
    cells = schema.cells(row, columns, min_margin)
    return schema.read(cells, is_stated=False)


def talk(*messages: Message) -> tuple[Conversation, ...]:
    return (Conversation(messages=messages),)


def problem(reads: Kind, row: Row, **columns: str) -> str:
    with pytest.raises(RowError) as caught:
        parsed(reads, row, **columns)
    return str(caught.value)


def preferred(row: Row, **columns: str) -> list[tuple[Any, Any, Any]]:
    pairs = parsed("pairs", row, **columns)
    assert all(isinstance(pair, Pair) and pair.row is row for pair in pairs)
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs if isinstance(pair, Pair)]


GOOD_OR_BAD = [((user("q"),), (assistant("good"),), (assistant("bad"),))]


# Conversations


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [say("user", "q"), say("assistant", "a")]}, "messages"),
        ({"messages": [told("human", "q"), told("gpt", "a")]}, "messages"),
        ({"messages": [{**say("user", "q"), "weight": 0}, {**say("assistant", "a"), "weight": 1}]},
         "messages"),
        ({"messages": [say("user", [{"type": "text", "text": "q"}]), say("assistant", "a")]}, "messages"),
        ({"messages": [{**say("user", "q"), **told(None, None)}, {**say(None, None), **told("gpt", "a")}]},
         "messages"),
        ({"messages": [say("user", "q"), {**say("assistant", "a"), "tool_calls": None}], "tools": []},
         "messages"),
        ({"conversations": [told("human", "q"), told("gpt", "a")]}, "sharegpt"),
        ({"conversations": [told("user", "q"), told("chatgpt", "a")], "system": "", "tools": "[]"},
         "sharegpt"),
        ({"conversations": [say("user", "q"), say("assistant", "a")]}, "sharegpt"),
        ({"conversation": [say("user", "q"), say("assistant", "a")]}, "sharegpt"),
        ({"conversations": [told("human", "q")], "chosen": told("gpt", "a"), "rejected": told("gpt", "b")},
         "sharegpt"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"question": "q", "answer": "a"}, "prompt_completion"),
        ({"question": "q", "response": "a", "system_prompt": None}, "prompt_completion"),
        ({"prompt": [say("user", "q")], "completion": [say("assistant", "a")]}, "prompt_completion"),
        ({"prompt": "q", "completion": say("assistant", "a")}, "prompt_completion"),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "response": "a"}, "prompt_completion"),
        ({"prompt": "q", "output": "a"}, "prompt_completion"),
        ({"question": "q", "output": "a"}, "prompt_completion"),
        ({"query": "q", "response": "a"}, "prompt_completion"),
        ({"instruction": "q", "completion": "a"}, "prompt_completion"),
        ({"instruction": "q", "input": "", "answer": "a"}, "prompt_completion"),
        ({"instruction": "", "input": "q", "output": "a"}, "instruction"),
        ({"instruction": "q", "output": "a", "prompt": "Below is … q a"}, "instruction"),
        ({"instruction": "q", "output": "a"}, "instruction"),
        ({"instruction": "q", "input": " ", "output": "a", "history": [], "system": None}, "instruction"),
        ({"instruction": "q", "context": "", "response": "a", "category": "qa"}, "instruction"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
         "hh_transcript"),
        ({"messages": [say("user", "q"), say("assistant", "a")], "label": True}, "labelled"),
        ({"prompt": "q", "completion": "a", "label": True}, "labelled"),
        ({"instruction": "q", "output": "a", "kto_tag": True}, "labelled"),
        ({"prompt": {"text": "q", "role": "prompter", "replies": [{"text": "a", "role": "assistant"}]}},
         "tree"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_every_sft_schema_is_detected_and_gives_the_same_conversation(row, format):
    assert detect("conversations", row, {}).format == format
    assert parsed("conversations", row) == talk(user("q"), assistant("a"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("human", user), ("user", user), ("prompter", user)]
    + [(name, assistant) for name in ("gpt", "assistant", "chatgpt", "bing", "bard", "model", "chat")]
    + [("system", system), ("developer", system)]
    + [
        (name, lambda text: Message(role="tool", content=text))
        for name in ("tool", "observation", "function", "function_response", "tool_response", "ipython")
    ],
)
def test_every_name_of_a_role_is_that_role(name, message):
    turns = [told("human", "q"), told(name, "x"), told("gpt", "a")]
    ordered = turns[1:2] + turns[:1] + turns[2:] if message is system else turns
    (conversation,) = parsed("conversations", {"conversations": ordered})
    assert message("x") in conversation.messages


def test_content_parts_are_joined_as_they_are():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    row = {"messages": [say("user", parts), say("assistant", "a")]}
    assert parsed("conversations", row) == talk(user("one two"), assistant("a"))


def test_two_turns_of_one_role_in_a_row_stay_apart():
    row = {"messages": [say("user", "q"), say("user", "q2"), say("assistant", "a")]}
    assert parsed("conversations", row) == talk(user("q"), user("q2"), assistant("a"))


def test_alpaca_takes_system_history_and_input_in_their_order():
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["q1", "a1"], ["q2", "a2"]],
    }
    before = (
        system("Be brief."),
        *(user("q1"), assistant("a1"), user("q2"), assistant("a2")),
        user("Add.\n\n1 2"),
    )
    assert parsed("conversations", row) == talk(*before, assistant("3"))
    assert parsed("prompts", row) == (Prompt(messages=before, row={"output": "3"}),)
    pair = {**row, "chosen": "3", "rejected": "4"}
    assert preferred(pair) == [(before, (assistant("3"),), (assistant("4"),))]


@pytest.mark.parametrize("column", ["prompt", "question", "query"])
@pytest.mark.parametrize("below", ["input", "context"])
def test_text_beside_a_prompt_is_joined_with_it_in_every_stage(column, below):
    row = {column: "q", below: "x"}
    asked = (user("q\n\nx"),)
    assert parsed("conversations", {**row, "completion": "a"}) == talk(*asked, assistant("a"))
    assert parsed("prompts", row) == (Prompt(messages=asked, row={}),)
    assert preferred({**row, "chosen": "good", "rejected": "bad"}) == [(asked, *GOOD_OR_BAD[0][1:])]
    rated = {**row, "responses": ["good", "bad"], "scores": [2, 1]}
    assert preferred(rated) == [(asked, *GOOD_OR_BAD[0][1:])]


@pytest.mark.parametrize(
    "further",
    [{"context": {"title": ["t"]}}, {"input": 3}, {"input": " "}, {"context": None}, {"input": "of q"},
     {"input": "x", "instruction": "i"}],
    ids=str,
)  # fmt: skip
def test_another_thing_of_that_name_or_one_the_prompt_holds_is_a_further_column(further):
    prompt = "of q: q"
    schema = detect("prompts", {"prompt": prompt, **further}, {})
    cells = schema.cells({"prompt": prompt, **further}, {})
    assert schema.parse(cells) == (Prompt(messages=(user(prompt),), row=further),)
    assert schema.columns_read(cells) == {"prompt": "prompt"}


def test_the_columns_of_a_labelled_row_are_those_of_its_schema():
    row = {"question": "q", "answer": "a", "label": True}
    schema = detect("conversations", row, {})
    assert schema.columns_read(schema.cells(row, {})) == {
        "label": "label",
        "prompt": "question",
        "completion": "answer",
    }


def test_an_instruction_and_its_input_may_be_blank_but_not_both():
    row = {"instruction": " ", "input": "x", "output": "a"}
    assert parsed("conversations", row) == talk(user("x"), assistant("a"))
    assert problem("conversations", {**row, "input": ""}) == f"instruction: empty prompt{EMPTY}"


def test_a_history_that_is_no_list_is_a_column_like_any_other():
    assert parsed("prompts", {"prompt": "q", "history": "of Rome"}) == (
        Prompt(messages=(user("q"),), row={"history": "of Rome"}),
    )
    row = {"history": "q", "answer": "a"}
    assert parsed("conversations", row, prompt="history") == talk(user("q"), assistant("a"))


def test_lists_in_a_table_of_text_are_read_as_the_lists_they_are():
    asked, turns = [say("user", "q")], [say("user", "q"), say("assistant", "a")]
    for column in ("messages", "conversations"):
        assert parsed("conversations", {column: json.dumps(turns)}) == talk(user("q"), assistant("a"))
        assert parsed("prompts", {column: f" {json.dumps(turns)}"}) == (
            Prompt(messages=(user("q"),), row={}),
        )
        pair = {column: json.dumps(asked), "chosen": say("assistant", "good")}
        assert preferred({**pair, "rejected": say("assistant", "bad")}) == GOOD_OR_BAD
    rated = {"prompt": "q", "responses": '["bad", "good"]', "scores": "[1, 2]"}
    assert preferred(rated) == GOOD_OR_BAD
    assert preferred({"prompt": "q", "responses": '["good", "bad"]', "ranks": "[1, 2]"}) == GOOD_OR_BAD
    row = {"instruction": "q", "output": "a", "history": '[["h", "b"]]'}
    assert parsed("conversations", row) == talk(user("h"), assistant("b"), user("q"), assistant("a"))
    repr = "Python's repr of a list, not JSON; write the cell with json.dumps"
    assert problem("conversations", {**row, "history": "[['h', 'b']]"}) == f"history: {repr}"
    assert problem("conversations", {"messages": "[{'role': 'user'}]"}) == f"messages: {repr}"
    assert parsed("conversations", {"prompt": "[1, 2]", "completion": "[3]"}) == talk(
        user("[1, 2]"), assistant("[3]")
    )


def test_a_system_column_goes_first_unless_the_messages_bring_their_own():
    row = {"conversations": [told("human", "q"), told("gpt", "a")], "system": "S"}
    assert parsed("conversations", row) == talk(system("S"), user("q"), assistant("a"))
    own = {**row, "conversations": [told("system", "own"), *row["conversations"]]}
    assert parsed("conversations", own) == talk(system("own"), user("q"), assistant("a"))
    orca = {"system": "S", "question": "q", "chosen": "good", "rejected": "bad"}
    assert preferred(orca)[0][0] == (system("S"), user("q"))
    implicit = {"system": "S", "chosen": "q\ngood", "rejected": "q\nbad"}
    assert preferred(implicit)[0][0] == (system("S"), user("q"))


def test_a_false_label_filters_the_row_whatever_word_it_is():
    row = {"prompt": "q", "completion": "a", "label": False}
    assert parsed("conversations", row) == ()
    assert detect("conversations", {**row, "label": 0}, {}).format == "labelled"
    assert detect("conversations", {**row, "label": 2}, {}).format == "prompt_completion"
    for label, kept in [("False", 0), (" true", 1), (1, 1), ("0", 0)]:
        schema = named("conversations", "labelled")
        assert schema is not None
        assert len(schema.parse(schema.cells({**row, "label": label}, {}))) == kept
    assert [parsed("conversations", {**row, "label": label}) for label in ("False", "false", "TRUE")] == [
        *((), ()),
        talk(user("q"), assistant("a")),
    ]
    renamed = {"prompt": "q", "completion": "a", "is_good": True}
    assert parsed("conversations", renamed, label="is_good") == talk(user("q"), assistant("a"))


def test_a_null_column_decides_no_schema():
    row = {"messages": None, "label": None, "prompt": "q", "completion": "a"}
    assert parsed("conversations", row) == talk(user("q"), assistant("a"))
    assert parsed("conversations", {**row, "label": False}) == ()
    assert (
        problem("conversations", {"prompt": "q", "completion": None}) == "completion: expected text, got null"
    )


def test_documents_are_the_text_as_it_stands():
    assert parsed("documents", {"text": " x\n", "id": 1}) == (Document(text=" x\n"),)
    assert parsed("documents", {"meta": {"body": "x"}}, text="meta.body") == (Document(text="x"),)


# Preferences


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference"),
        ({"question": "q", "chosen": "good", "rejected": "bad"}, "preference"),
        ({"input": "q", "chosen": "good", "rejected": "bad"}, "preference"),
        ({"query": "q", "input": {}, "chosen": "good", "rejected": "bad"}, "preference"),
        ({"instruction": "q", "input": "", "output": "x", "chosen": "good", "rejected": "bad"}, "preference"),
        ({"prompt": "q", "chosen": [say("assistant", "good")], "rejected": [say("assistant", "bad")]},
         "preference"),
        ({"prompt": "q", "chosen": told("gpt", "good"), "rejected": told("gpt", "bad")}, "preference"),
        ({"prompt": None, "chosen": [say("user", "q"), say("assistant", "good")],
          "rejected": [say("user", "q"), say("assistant", "bad")]}, "preference"),
        ({"prompt": "q", "chosen": [say("user", "q"), say("assistant", "good")],
          "rejected": [say("user", "q"), say("assistant", "bad")], "messages": "unread"}, "preference"),
        ({"messages": [say("user", "q")], "chosen": say("assistant", "good"),
          "rejected": say("assistant", "bad")}, "preference"),
        ({"chosen": "q\ngood", "rejected": "q\nbad"}, "preference"),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "good", "rejected": "bad"}, "preference"),
        ({"conversations": [told("human", "q")], "chosen": told("gpt", "good"),
          "rejected": told("gpt", "bad")}, "sharegpt"),
        ({"conversations": [say("user", "q")], "chosen": "good", "rejected": "bad"}, "sharegpt"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
         "hh_transcript"),
        ({"prompt": "q", "responses": ["bad", "good"], "scores": [1, 2.5]}, "ranked"),
        ({"prompt": "q", "responses": ["good", "bad"], "ranks": [0, 1]}, "ranked"),
        ({"prompt": "q", "responses": ["bad", "good"], "scores": [1, 2], "ranks": [0, 1]}, "ranked"),
        ({"prompt": "q", "generations": ["bad", "good"], "ratings": [1, 2]}, "ranked"),
        ({"instruction": "q", "completions": [{"response": "bad", "overall_score": 3.0},
                                              {"response": "good", "overall_score": 7.5}]}, "ranked"),
        ({"question": "q", "responses": [{"text": "good", "rating": 5}, {"text": "bad", "rating": 1}]},
         "ranked"),
        ({"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [{"answer": "bad", "rank": 2.0},
                                                             {"answer": "good", "rank": 1.0}]}, "ranked"),
        ({"prompt": [say("user", "q")], "scores": [2, 1],
          "responses": [[say("assistant", "good")], say("assistant", "bad")]}, "ranked"),
        ({"prompt": {"text": "q", "role": "prompter", "replies": [
            {"text": "bad", "role": "assistant", "rank": 1}, {"text": "good", "role": "assistant", "rank": 0}
        ]}}, "tree"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_every_preference_schema_is_detected_and_gives_the_same_pair(row, format):
    assert detect("pairs", row, {}).format == format
    assert preferred(row) == GOOD_OR_BAD


def whole_talks(*before: Message) -> Row:
    """chosen and rejected as conversations that both begin with `before`."""
    turns = [say(message.role, message.content) for message in before]
    return {
        side: [*turns, say("assistant", text)] for side, text in (("chosen", "good"), ("rejected", "bad"))
    }


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q2", **whole_talks(user("q"), assistant("a"), user("q2"))},
         (user("q"), assistant("a"), user("q2"))),
        ({"prompt": [say("user", "q2")], **whole_talks(user("q"), assistant("a"), user("q2"))},
         (user("q"), assistant("a"), user("q2"))),
        ({"prompt": "topic", **whole_talks(user("q"))}, (user("q"),)),
        ({"system": "S", "prompt": "q", **whole_talks(user("q"))}, (system("S"), user("q"))),
        ({"system": "S", "prompt": "q", **whole_talks(system("own"), user("q"))}, (system("own"), user("q"))),
        ({"prompt": "q ", **whole_talks(user("q"))}, (user("q "),)),
        ({"prompt": [say("system", "S"), say("user", "q")], **whole_talks(user("q"))},
         (system("S"), user("q"))),
        ({"prompt": "q", "history": [["h", "a"]], **whole_talks(user("q"))},
         (user("h"), assistant("a"), user("q"))),
        ({"prompt": "q", **whole_talks(user("q"), assistant("a"), user("q2"))},
         (user("q"), assistant("a"), user("q2"))),
        ({"prompt": "q", **whole_talks(assistant("a"), user("q2"))},
         (user("q"), assistant("a"), user("q2"))),
        ({"prompt": "q", **whole_talks(system("S"))}, (system("S"), user("q"))),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_both_sides_repeat_of_the_prompt_is_taken_once(row, prompt):
    assert preferred(row) == [(prompt, *GOOD_OR_BAD[0][1:])]


def test_transcripts_with_crlf_are_transcripts_in_every_stage():
    text = "\r\n\r\nHuman: q\r\nr\r\n\r\nAssistant: {}"
    row = {"chosen": text.format("good"), "rejected": text.format("bad")}
    assert preferred(row) == [((user("q\nr"),), *GOOD_OR_BAD[0][1:])]
    assert parsed("conversations", row) == talk(user("q\nr"), assistant("good"))
    assert parsed("prompts", row) == (Prompt(messages=(user("q\nr"),), row={}),)
    assert parsed("conversations", {"prompt": text.format(""), "completion": "a"}) == talk(
        user("q\nr"), assistant("a")
    )


def test_transcripts_are_never_taken_for_two_texts_with_one_beginning():
    row = {side: f"\n\nHuman: q\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    schema = named("pairs", "preference")
    assert schema is not None
    (pair,) = schema.parse(schema.cells(row, {}))
    assert isinstance(pair, Pair)
    assert (pair.prompt, pair.chosen) == ((user("q"),), (assistant("chosen"),))


def test_a_repeated_prompt_is_found_behind_a_system_message():
    sides = {
        side: [say("system", "S"), say("user", "q"), say("assistant", text)]
        for side, text in (("chosen", "good"), ("rejected", "bad"))
    }
    assert preferred({"prompt": "q", **sides}) == [((system("S"), user("q")), *GOOD_OR_BAD[0][1:])]


def test_k_responses_give_every_pair_whose_margin_is_large_enough():
    row = {"prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 3, 6]}

    def order(min_margin: float) -> list[str]:
        pairs = parsed("pairs", row, min_margin)
        return [f"{pair.chosen[0].content}>{pair.rejected[0].content}" for pair in pairs]

    assert order(0) == ["b>a", "c>a", "d>a", "d>b", "d>c"]  # b and c are tied
    assert order(2) == ["d>a", "d>b", "d>c"]  # a margin of 2 does not exceed 2
    assert order(5) == []
    ranks = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]}
    assert len(parsed("pairs", ranks, 1)) == 1


def test_equal_and_unrated_responses_are_in_no_pair():
    row = {"prompt": "q", "responses": ["a", "a", "b"], "scores": [1, 2, None]}
    assert parsed("pairs", row) == ()


# Prompts


@pytest.mark.parametrize("reads", ["prompts", "prompts"])
@pytest.mark.parametrize(
    ("row", "further"),
    [
        ({"prompt": "q", "answer": "4", "level": 2}, {"answer": "4", "level": 2}),
        ({"question": "q", "answer": "#### 4"}, {"answer": "#### 4"}),
        ({"instruction": "q", "input": None, "output": "y"}, {"output": "y"}),
        ({"messages": [say("user", "q"), say("assistant", "a")], "label": True}, {"label": True}),
        ({"conversations": [told("human", "q"), told("gpt", "a")], "system": None, "id": 1}, {"id": 1}),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: z\n\nAssistant: b", "rejected": "", "id": 1},
         {"id": 1}),
        ({"prompt": {"text": "q", "role": "prompter", "replies": []}, "tree_state": "ready"},
         {"tree_state": "ready"}),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
         {"responses": ["a", "b"], "scores": [1, 2]}),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_every_schema_gives_a_policy_the_same_prompt_and_the_further_columns(reads, row, further):
    assert parsed(reads, row) == (Prompt(messages=(user("q"),), row=further),)


def test_labelled_can_be_stated_for_ppo_and_keeps_its_label():
    schema = named("prompts", "labelled")
    assert schema is not None
    row = {"messages": [say("user", "q"), say("assistant", "a")], "label": False}
    assert schema.parse(schema.cells(row, {})) == (Prompt(messages=(user("q"),), row={"label": False}),)


# Trees


def turn(text: str, *replies: Row, **fields: Any) -> Row:
    role = "prompter" if text.startswith("q") else "assistant"
    return {"text": text, "role": role, "replies": list(replies), **fields}


TREE = {
    "message_tree_id": "t",
    "prompt": turn(
        "q1",
        turn("a-second", turn("q-unread", turn("a-below second")), rank=1),
        turn(
            "a-best",
            turn("q-unanswered"),
            turn("q2", turn("a3-unranked"), turn("a3-low", rank=5), turn("a3-high", rank=2)),
            rank=0,
        ),
        turn("a-unranked"),
        turn("a-deleted", rank=-1, deleted=True),
        turn("a-failed", rank=-1, review_result=False),
        turn("a-unreviewed", rank=3, review_result=None, deleted=None),
    ),
}


def test_sft_follows_the_best_ranked_replies_of_a_tree_to_the_last_answer():
    assert parsed("conversations", TREE) == talk(
        user("q1"), assistant("a-best"), user("q2"), assistant("a3-high")
    )
    assert parsed("conversations", {"prompt": turn("q1", turn("q2"))}) == ()
    assert parsed("conversations", {"prompt": turn("q1", turn("a"), deleted=True)}) == ()


def test_reward_pairs_ranked_siblings_with_the_conversation_so_far():
    pairs = [
        (*(message.content for message in prompt), chosen[0].content, rejected[0].content)
        for prompt, chosen, rejected in preferred(TREE)
    ]
    assert pairs == [
        ("q1", "a-best", "a-second"),
        ("q1", "a-second", "a-unreviewed"),
        ("q1", "a-best", "a-unreviewed"),
        ("q1", "a-best", "q2", "a3-high", "a3-low"),
    ]
    assert len(parsed("pairs", TREE, 2)) == 2  # best over unreviewed, high over low: margins of 3
    assert parsed("pairs", {"prompt": turn("q1", turn("a"))}) == ()


def test_a_tree_of_five_thousand_turns_is_read():
    tree = turn("a")
    for depth in range(5000):
        tree = turn("a" if depth % 2 else "q", tree)
    (conversation,) = parsed("conversations", {"prompt": turn("q", tree)})
    assert len(conversation.messages) == 5002


# One row, one side of the split


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "c", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "x", "output": "o", "chosen": "a", "rejected": "b", "system": "S",
         "history": [["first", "answer"]]},
        {"conversations": [told("system", "S"), told("human", "q"), told("gpt", "a"), told("human", "r")],
         "chosen": told("gpt", "a"), "rejected": told("gpt", "b")},
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: s",
         "rejected": "\n\nHuman: q\n\nAssistant: b"},
        TREE,
    ],
    ids=lambda row: "+".join(row),
)  # fmt: skip
def test_conversation_pair_and_prompt_of_one_row_share_their_split_key(row):
    keys = {
        split_key(record) for reads in ("conversations", "pairs", "prompts") for record in parsed(reads, row)
    }
    assert len(keys) == 1


# Detection, renaming, paths


def test_the_same_columns_are_another_schema_for_another_stage():
    polite = {"instruction": "q", "input": "", "output": "o", "chosen": "c", "rejected": "r"}
    stages: tuple[Kind, ...] = ("conversations", "pairs", "prompts")
    assert [detect(s, polite, {}).format for s in stages] == ["instruction", "preference", "prompt"]
    sharegpt = {"conversations": [], "chosen": {}, "rejected": {}}
    assert [detect(s, sharegpt, {}).format for s in stages] == ["sharegpt"] * 3
    gsm8k = {"question": "q", "answer": "a"}
    assert [detect(s, gsm8k, {}).format for s in stages] == ["prompt_completion", "preference", "prompt"]


def test_a_configured_field_decides_between_schemas_that_both_fit():
    row = {"messages": [say("user", "q"), say("assistant", "a")], "ask": "p", "gold": "c"}
    assert parsed("conversations", row, prompt="ask", completion="gold") == talk(user("p"), assistant("c"))
    assert problem("conversations", row, prompt="ask", messages="messages") == (
        "columns: format messages has no field 'prompt'; fields are messages, system, tools, loss_mask - "
        "or set format"
    )


def test_a_path_reaches_into_objects_and_lists():
    row = {"instruction": "q", "instances": [{"input": "x", "output": "a"}, {"output": "last"}]}
    columns = {"input": "instances.0.input", "output": "instances.0.output"}
    assert parsed("conversations", row, **columns) == talk(user("q\n\nx"), assistant("a"))
    assert parsed("conversations", row, output="instances.-1.output") == talk(user("q"), assistant("last"))
    (prompt,) = parsed("prompts", row, input="instances.0.input")
    assert prompt.messages == (user("q\n\nx"),)
    assert prompt.row == {"instances": row["instances"]}


def test_a_column_whose_own_name_has_a_dot_wins_over_the_path():
    row = {"prompt": "q", "a.b": "column", "a": {"b": "path"}}
    assert parsed("conversations", row, completion="a.b") == talk(user("q"), assistant("column"))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("instances.0.answer", "instances.0 has no 'answer'; its keys are output"),
        ("instances.2.output", "instances has 1 items, none at 2"),
        ("instances.output", "instances is a list: 'output' is no index, such as instances.0"),
        ("instances.0.output.text", "instances.0.output is text, so it has no 'text'"),
        ("cases.0.output", "missing; columns are prompt, instances"),
        ("completion", "missing; columns are prompt, instances"),
    ],
)
def test_a_path_that_breaks_is_named_with_the_part_that_is_missing(path, line):
    row = {"prompt": "q", "instances": [{"output": "a"}]}
    assert (
        problem("conversations", row, completion=path) == f"{path}: {line} - set columns: {{completion: …}}"
    )


def test_an_optional_field_that_the_config_names_must_be_there():
    row = {"instruction": "q", "output": "a"}
    assert problem("conversations", row, input="contxt") == (
        "contxt: missing; columns are instruction, output - set columns: {input: …}"
    )
    assert parsed("conversations", {**row, "contxt": None}, input="contxt") == talk(user("q"), assistant("a"))


# Errors, with file and line


def failure(tmp_path, reads: Kind, row: Row, **fields: Any) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        readers.read([DataSource(path=str(path), **fields)], reads, seed=0)
    return str(caught.value).replace(f"{tmp_path}/", "")


EMPTY = "; remove the row, or set on_bad_row: skip"
SAME = "the same as chosen" + EMPTY
TWO = {"prompt": "q", "responses": ["a", "b"]}


@pytest.mark.parametrize(
    ("reads", "row", "line"),
    [
        # missing columns: the nearest schema's
        ("conversations", {"text": "x"},
         "prompt: missing; columns are text - set columns: {prompt: …, completion: …}, or {messages: …}"),
        ("conversations", {"prompt": "x"},
         "completion: missing; columns are prompt - set columns: {completion: …}"),
        ("conversations", {"instruction": "x"},
         "output: missing; columns are instruction - set columns: {output: …}"),
        ("pairs", {"prompt": "x", "rejected": "y"},
         "chosen: missing; columns are prompt, rejected - set columns: {chosen: …}"),
        ("pairs", {"a": 1}, "chosen: missing; columns are a - set columns: {chosen: …, rejected: …}"),
        ("pairs", {"conversations": [], "rejected": {}},
         "chosen: missing; columns are conversations, rejected - set columns: {chosen: …}"),
        ("pairs", {"conversations": [told("human", "q")], "rejected": "x"},
         "chosen: missing; columns are conversations, rejected - set columns: {chosen: …}"),
        ("prompts", {}, "prompt: missing; columns are none - set columns: {prompt: …}"),
        ("prompts", {"a\nb": 1}, "prompt: missing; columns are a\\nb - set columns: {prompt: …}"),
        ("prompts", {str(n): n for n in range(22)},
         "prompt: missing; columns are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, "
         "… 2 more - set columns: {prompt: …}"),
        # wrong types and empty texts
        ("conversations", {"prompt": "x", "completion": 7}, "completion: expected text, got number 7"),
        ("conversations", {"prompt": True, "completion": "x"}, "prompt: expected text, got true"),
        ("conversations", {"messages": "x"}, "messages: expected a list of messages, got text"),
        ("conversations", {"conversations": {}}, "conversations: expected a list of messages, got object"),
        ("conversations", {"prompt": "", "completion": "x"}, f"prompt: empty prompt{EMPTY}"),
        ("conversations", {"prompt": "x", "completion": "\n"}, f"completion: empty response{EMPTY}"),
        ("conversations", {"prompt": "x\udc00", "completion": "y"},
         "prompt: half a surrogate pair (\\udc00) at character 2; it is no text"),
        ("conversations", {"instruction": "x", "input": 3, "output": "y"},
         "input: expected text, got number 3"),
        ("conversations", {"instruction": "x", "system": 3, "output": "y"},
         "system: expected text, got number 3"),
        ("conversations", {"instruction": "x", "history": [["q"]], "output": "y"},
         "history[0]: expected [question, answer], got list"),
        ("conversations", {"instruction": "x", "history": [["q", "a"], ["q", ""]], "output": "y"},
         f"history[1][1]: empty response{EMPTY}"),
        ("conversations", {"instruction": "x", "history": [["q", None]], "output": "y"},
         "history[0][1]: expected text, got null"),
        # turns
        ("conversations", {"conversations": [told("human", "q"), told("gpt", "")]},
         f"conversations[1].value: empty response{EMPTY}"),
        ("conversations", {"conversations": [told("human", " "), told("gpt", "a")]},
         f"conversations[0].value: empty prompt{EMPTY}"),
        ("conversations", {"conversations": [told("gpt", "a"), told("human", "q")]},
         "conversations[0]: starts with the assistant: no prompt"),
        ("prompts", {"conversations": [told("gpt", "a"), told("human", "q")]},
         "conversations[0]: starts with the assistant: no prompt"),
        ("conversations", {"conversations": [told("narrator", "q")]},
         "conversations[0].from: unknown role 'narrator'; use system, user, assistant, tool"),
        ("conversations", {"messages": [say("x\n" * 20, "q")]},
         "messages[0].role: unknown role 'x\\nx\\nx\\nx\\nx\\nx\\nx\\nx\\nx\\nx\\n…'; "
         "use system, user, assistant, tool"),
        ("conversations", {"conversations": [{"from": "human"}]},
         "conversations[0].value: missing; keys are from"),
        ("conversations", {"conversations": [{"role": "user"}]},
         "conversations[0].content: missing; keys are role"),
        ("conversations", {"conversations": [{}]}, "conversations[0].role: missing; keys are none"),
        ("conversations", {"conversations": ["hello"]},
         "conversations[0]: expected a message {role, content}, got text"),
        ("conversations", {"messages": [say("user", "q"), say("system", "S"), say("assistant", "a")]},
         "messages[1]: a system message after the first message; templates take it first only"),
        ("conversations", {"prompt": "q", "completion": [say("system", "S"), say("assistant", "a")]},
         "completion[0]: a system message after the first message; templates take it first only"),
        ("conversations", {"messages": [say("user", "q"), say("assistant", None)]},
         "messages[1].content: expected text, got null"),
        ("conversations", {"messages": [say("user", [{"type": "text", "text": "q"}, {"type": "image"}])]},
         "messages[0].content[1].type: only text parts are read, not image"),
        ("conversations", {"messages": [say("user", [{"type": "text"}])]},
         "messages[0].content[0].text: missing; keys are type"),
        ("conversations", {"messages": [say("user", ["q"])]},
         "messages[0].content[0]: expected a part {type: text, text: …}, got text"),
        ("conversations", {"messages": [say("user", [])]}, f"messages[0].content: empty prompt{EMPTY}"),
        ("conversations", {"messages": [say("user", "q")]},
         "messages: no assistant message, so nothing to train on"),
        ("conversations", {"prompt": "q", "completion": [say("user", "r")]},
         "completion: does not end with the assistant"),
        ("conversations", {"conversations": [told("human", "q"), told("gpt", "a")], "chosen": "b"},
         "conversations: ends with the assistant, so nothing is asked that an answer could follow"),
        ("prompts", {"prompt": "<image>What?", "images": ["a.png"]}, f"images: images are not read{EMPTY}"),
        ("prompts", {"prompt": [say("system", "S")]}, "prompt: empty prompt: no message to answer"),
        ("prompts", {"messages": []}, "messages: no messages"),
        # preferences
        ("pairs", {"prompt": "q", "chosen": "a", "rejected": "a"}, f"rejected: {SAME}"),
        ("pairs", {"chosen": "q a", "rejected": "q a"}, f"rejected: {SAME}"),
        ("pairs", {"conversations": [told("human", "q")], "chosen": told("gpt", "a"),
                    "rejected": say("assistant", [{"type": "text", "text": "a"}])}, f"rejected: {SAME}"),
        ("pairs", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant:  a "},
         f"rejected: {SAME}"),
        ("pairs", {"prompt": "q", "chosen": "", "rejected": "a"}, f"chosen: empty response{EMPTY}"),
        ("pairs", {"chosen": "q", "rejected": " "}, f"rejected: empty response{EMPTY}"),
        ("pairs", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant:"},
         f"rejected: empty response{EMPTY}"),
        ("pairs", {"prompt": "q", "chosen": "a", "rejected": say("assistant", "b")},
         "rejected: one of chosen and rejected is text, the other messages"),
        ("pairs", {"prompt": "q", "chosen": 7, "rejected": "b"}, "chosen: expected text, got number 7"),
        ("pairs", {"prompt": "q", "chosen": None, "rejected": "b"}, "chosen: expected text, got null"),
        ("pairs", {"prompt": "q", "chosen": "a", "rejected": 7}, "rejected: expected text, got number 7"),
        ("pairs", {"chosen": "a", "rejected": None}, "rejected: expected text, got null"),
        ("pairs", {"chosen": "abc", "rejected": "xyz"},
         "chosen: shares no beginning with rejected, so there is no prompt; write it into a column "
         "prompt, or before both"),
        ("pairs", {"chosen": [say("assistant", "a")], "rejected": [say("assistant", "b")]},
         "chosen: shares no beginning with rejected, so there is no prompt; write it into a column "
         "prompt, or before both"),
        ("pairs", {"chosen": [say("assistant", "h"), say("user", "q"), say("assistant", "a")],
                    "rejected": [say("assistant", "h"), say("user", "q"), say("assistant", "b")]},
         "chosen: starts with the assistant: no prompt"),
        ("pairs", {"prompt": [say("user", "q"), say("assistant", "a")], "chosen": "b", "rejected": "c"},
         "prompt: ends with the assistant, so nothing is asked that an answer could follow"),
        ("pairs", {"chosen": [say("user", "q"), say("assistant", "a")], "rejected": [say("user", "q")]},
         "rejected: empty response: it is a beginning of the other one"),
        ("pairs", {"chosen": [say("user", "q"), say("assistant", "a")],
                    "rejected": [say("user", "q"), say("user", "r")]},
         "rejected: after the shared prompt comes no answer of the assistant, up to the end"),
        ("pairs", {"messages": [say("user", "q"), say("assistant", "a")], "label": True},
         "label: one labelled answer is no pair of answers; use this source for sft or ppo"),
        # ranked
        ("pairs", {**TWO, "scores": [1]}, "scores: 1 numbers for 2 responses in responses"),
        ("pairs", {**TWO, "scores": 1}, "scores: expected a list of numbers, got number 1"),
        ("pairs", {**TWO, "ranks": [1, "2"]}, "ranks[1]: expected a number, got text"),
        ("pairs", {**TWO, "scores": [1, float("nan")]},
         "scores[1]: expected a number that is finite, got number nan"),
        ("pairs", {**TWO, "scores": [1, 10**400]},
         "scores[1]: expected a number that is finite, got number too long to show"),
        ("pairs", TWO, "responses[0]: no score or rank for it - set columns: {scores: …} or {ranks: …}"),
        ("pairs", {"prompt": "q", "responses": [{"text": "a", "rank": 1}, {"text": "b"}]},
         "responses[1].score: missing; keys are text - set columns: {scores: …}"),
        ("pairs", {"prompt": "q", "responses": [{"rank": 1}, {"rank": 2}]},
         "responses[0].response: missing; keys are rank - set columns: {responses: …, scores: "
         "responses.*.rank}"),
        ("pairs", {"prompt": "q", "completions": [{"response": "", "rank": 1}, {"text": "b", "rank": 2}]},
         f"completions[0].response: empty response{EMPTY}"),
        ("pairs", {"prompt": "q", "responses": ["a"], "scores": [1]},
         "responses: 1 responses; a pair needs two"),
        ("pairs", {"prompt": "q", "responses": "a", "scores": [1]},
         "responses: expected a list of responses, got text"),
        # trees
        ("conversations", {"prompt": turn("q", {"role": "assistant"})},
         "prompt.replies[0].text: missing; keys are role"),
        ("conversations", {"prompt": turn("q", turn("a", 7))},
         "prompt.replies[0].replies[0]: expected a turn {text, role, replies}, got number 7"),
        ("conversations", {"prompt": turn("a")}, "prompt.role: starts with the assistant: no prompt"),
        ("conversations", {"prompt": {**turn("q"), "replies": 1}},
         "prompt.replies: expected a list of turns, got number 1"),
        ("pairs", {"prompt": turn("q", turn("a", rank="best"))},
         "prompt.replies[0].rank: expected a whole number, got text"),
        ("pairs", {"prompt": turn("q", turn("a", deleted="no"))},
         "prompt.replies[0].deleted: expected true or false, got text"),
        ("prompts", {"prompt": turn("q", {**turn("a"), "text": " "})},
         f"prompt.replies[0].text: empty response{EMPTY}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_every_bad_row_is_named_in_one_line(tmp_path, reads, row, line):
    assert failure(tmp_path, reads, row) == f"a.jsonl:1: {line}"


def test_a_stated_format_is_not_guessed_around(tmp_path):
    row = {"prompt": "q", "completion": "a", "label": 2}
    assert failure(tmp_path, "conversations", row, format="labelled") == (
        "a.jsonl:1: label: expected true or false, got number 2; set format: prompt_completion where it "
        "labels "
        "something else"
    )
    assert failure(tmp_path, "conversations", row, format="tree") == (
        "a.jsonl:1: prompt: expected a turn {text, role, replies}, got text"
    )
    assert failure(tmp_path, "conversations", row, columns={"label": "label"}) == (
        "a.jsonl:1: label: expected true or false, got number 2; set format: prompt_completion where it "
        "labels "
        "something else"
    )


# Through the readers


def test_filtered_rows_are_counted_beside_skipped_ones_and_the_margin_comes_from_the_source(tmp_path):
    path = tmp_path / "a.jsonl"
    rated = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2, 9]}
    tied = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}
    empty = {"prompt": "", "responses": ["a", "b"], "scores": [1, 2]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (rated, tied, empty)))
    source = DataSource(path=str(path), on_bad_row="skip")
    rows = readers.read_pairs([source], seed=0)
    assert (len(rows.records), rows.num_filtered, rows.num_skipped) == (3, 1, 1)
    rows = readers.read_pairs([source.model_copy(update={"min_margin": 1.0})], seed=0)
    assert [pair.chosen for pair in rows.records] == [(assistant("c"),)] * 2
    with pytest.raises(DataError, match=r"a\.jsonl: no rows$"):
        readers.read_pairs([source.model_copy(update={"min_margin": 8.0})], seed=0)


# Anything at all

EVERY_SCHEMA = [schema for schemas in SCHEMAS.values() for schema in schemas]
NAMES = sorted({alias for schema in EVERY_SCHEMA for names in schema.aliases.values() for alias in names})
KEYS = ["role", "content", "from", "value", "type", "text", "replies", "rank", "score", "response", "deleted",
        "tool_calls", "name", "arguments", "function", "train", "weight", "reasoning"]  # fmt: skip
TEXTS = ["q", "q a", "q b", "\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b",
         "\n\nHuman: q\n\nAssistant:", "", " ", "\ud800", "a\nb", "human", "gpt", "system"]  # fmt: skip
LEAVES = st.sampled_from(TEXTS) | st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400)
ROLES = st.sampled_from(["user", "assistant"] * 3 + ["system", "tool", "narrator"])
SAID = st.sampled_from(["q", "a", "b"]) | LEAVES
TURNS = st.builds(told, ROLES, SAID) | st.builds(say, ROLES, SAID)
TALKS = st.lists(TURNS, max_size=4).map(lambda turns: [say("user", "q"), *turns, say("assistant", "a")])
SCORES = st.integers(0, 3) | st.floats() | st.none()
RATED = st.lists(st.builds(lambda text, rank: {"text": text, "rank": rank}, SAID, SCORES), max_size=3)
TREES = st.recursive(
    st.builds(turn, st.sampled_from(["q", "a", "a2"])),
    lambda below: st.builds(
        lambda text, replies, rank: turn(text, *replies, rank=rank),
        st.sampled_from(["q", "a", "a2"]), st.lists(below, max_size=3), st.integers(0, 2) | st.none(),
    ),
    max_leaves=6,
)  # fmt: skip
VALUES = st.recursive(
    LEAVES | TURNS | TALKS | RATED | TREES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
TEXT = st.text(max_size=9)
SIDES = TEXT.map("q {}".format) | TEXT.map("\n\nHuman: q\n\nAssistant: {}.".format) | TALKS
PLAUSIBLE = {
    "messages": TALKS,
    "conversations": TALKS | st.just([say("user", "q")]),
    "responses": RATED,
    "chosen": SIDES,
    "rejected": SIDES,
    "label": st.booleans(),
}
OTHERWISE_PLAUSIBLE = TEXT | st.sampled_from(TEXTS[:5]) | TREES
PATHS = st.sampled_from([*NAMES, "prompt.text", "messages.0.content", "responses.-1", "a..b"])


@st.composite
def rows(draw: st.DrawFn, reads: Kind) -> Row:
    """Any columns beside those that one schema of the reads requires."""
    schema = draw(st.sampled_from(SCHEMAS[reads]))
    anything = draw(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUES, max_size=2))
    for field in schema.required:
        is_odd = draw(st.integers(0, 5)) == 5
        likely = {**dict.fromkeys(schema.required, OTHERWISE_PLAUSIBLE), **PLAUSIBLE}[field]
        anything[draw(st.sampled_from(schema.aliases[field]))] = draw(VALUES if is_odd else likely)
    return anything


@settings(max_examples=300, deadline=None)
@given(data=st.data(), columns=st.just({}) | st.dictionaries(st.sampled_from(NAMES), PATHS, max_size=2))
@pytest.mark.parametrize("reads", get_args(Kind))
def test_any_row_gives_sound_records_or_one_line(reads: Kind, data: st.DataObject, columns: dict[str, str]):
    row = data.draw(rows(reads))
    usable = {field: column for field, column in columns.items() if field in fields_of(SCHEMAS[reads])}
    schema = data.draw(st.sampled_from([detect(reads, row, usable), *SCHEMAS[reads]]))
    try:
        found = schema.parse(schema.cells(row, usable))
    except RowError as error:
        line = str(error)
        assert line and all(sign.isprintable() for sign in line)
        return
    for record in found:
        assert_sound(record)


def assert_sound(record: Record) -> None:
    split_key(record).encode()
    match record:
        case Document():
            return
        case Conversation(messages=messages):
            assert messages[-1].role == "assistant" != messages[0].role
        case Prompt(messages=messages):
            assert messages[-1].role != "assistant"
        case Pair(prompt=prompt, chosen=chosen, rejected=rejected):
            assert chosen != rejected and prompt[0].role != "assistant"
            assert {side[at].role for side in (chosen, rejected) for at in (0, -1)} == {"assistant"}
            messages = (*prompt, *chosen, *rejected)
    assert all(
        message.content.encode() or message.tool_calls or message.role in ("system", "tool")
        for message in messages
    )
    assert "system" not in {message.role for message in messages[1:]}


def test_every_format_of_the_config_feeds_a_stage():
    assert {schema.format for schema in EVERY_SCHEMA} == set(get_args(DataFormat))
