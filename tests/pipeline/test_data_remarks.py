"""What `rlhf check` says of datasets beside figures: files and rows, what is left out, and what is odd."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.data_remarks import left_out
from pipeline.identity import datasets
from pipeline.preview import previews

QUESTIONS = [f"Cow {number}?" for number in range(20)]


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(path: str, *rows: Any) -> str:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def checked(**sections: Any) -> dict[str, list[str]]:
    """Key of the dataset -> the lines that `check` shows of it, without those of the example."""
    Path("look.yaml").write_text(json.dumps({"name": "look", "model": {"context_length": 128}, **sections}))
    shown = [
        block.plain.strip() for block in previews(configs.load(Path("look.yaml")).config, model_at_hand=False)
    ]
    lines = {block.partition(":")[0]: block.splitlines()[1:] for block in shown}
    return {key: [line.strip() for line in group if line.startswith("  ")] for key, group in lines.items()}


def data(*paths: str, **settings: Any) -> dict[str, Any]:
    return {"data": [{"path": path, **settings} for path in paths]}


ANSWERED = {"prompt": "Cow?", "completion": "Moo."}


def test_the_files_of_a_directory_are_listed_with_their_rows_and_what_is_left_out():
    written("d/train.jsonl", ANSWERED, ANSWERED)
    written("d/more/train-1.jsonl", ANSWERED)
    written("d/test.jsonl", ANSWERED)
    written("d/README.md")
    lines = checked(sft=data("d"))["sft.data.0"]
    assert lines[0] == "2 files: more/train-1.jsonl (1 row), train.jsonl (2 rows)"
    assert lines[1] == "left out: README.md (no data by its name); test.jsonl (split test)"


def test_files_that_are_read_with_those_of_the_only_split_that_names_tell_are_named():
    for name in ("train", "calibration", "b"):
        written(f"d/{name}.jsonl", ANSWERED)
    assert (
        "only the split train is told by names: b.jsonl, calibration.jsonl tell none, and are read with it; "
        "name the files if not all are meant"
    ) in checked(sft=data("d"))["sft.data.0"]
    written("e/a.jsonl", ANSWERED)
    written("f/train.jsonl", ANSWERED)
    for lines in checked(sft=data("e", "f")).values():
        assert not any("told by names" in line for line in lines)


def test_of_many_files_the_first_are_listed():
    for number in range(30):
        written(f"d/{number:02d}.jsonl", ANSWERED)
    line = checked(sft=data("d/*.jsonl"))["sft.data.0"][0]
    assert line.startswith("30 files: d/00.jsonl (1 row), ") and line.endswith(
        "d/11.jsonl (1 row), 18 more (18 rows)"
    )


def test_a_split_that_picks_nothing_is_said():
    written("a.jsonl", ANSWERED)
    lines = checked(sft=data("a.jsonl", split="test"))["sft.data.0"]
    assert "split: test picks nothing here: a named file or glob is read whole" in lines
    assert not any("split" in line for line in checked(sft=data("a.jsonl"))["sft.data.0"])


def test_the_sign_between_cells_is_said_where_it_is_no_comma():
    Path("a.csv").write_bytes(b"\xef\xbb\xbfprompt;completion\r\nCow?;Moo, moo.\r\n")
    Path("b.csv").write_text("prompt,completion\nCow?;,Moo;\n")
    lines = checked(sft=data("a.csv", "b.csv"))
    assert "a.csv: its cells are separated by a semicolon" in lines["sft.data.0"]
    assert not any("separated" in line for line in lines["sft.data.1"])


def test_the_start_of_a_run_names_what_is_left_out_of_a_directory():
    written("d/train.jsonl", ANSWERED)
    written("d/test.jsonl", ANSWERED)
    Path("look.yaml").write_text(json.dumps({"name": "look", "sft": data("d", "d/train.jsonl")}))
    config = configs.load(Path("look.yaml")).config
    assert [*left_out(datasets(config, ["sft"]))] == ["sft.data.0: of d left out: test.jsonl (split test)"]


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_turns_after_the_last_answer_are_counted():
    ask, answer = say("user", "Hi"), say("assistant", "Hello")
    rows = [
        {"messages": [ask, answer]},
        {"messages": [ask, answer, ask, ask]},
        {"messages": [ask, answer, ask]},
    ]
    lines = checked(sft=data(written("a.jsonl", *rows)))["sft.data.0"]
    assert "3 turns after the last answer left out, in 2 of 3 records: nothing there can be trained" in lines
    assert not any(
        "left out" in line for line in checked(sft=data(written("b.jsonl", rows[0])))["sft.data.0"]
    )


@pytest.mark.parametrize(
    "text",
    ["<|im_start|>user\nCow?<|im_end|>\n<|im_start|>assistant\n", "[INST] Cow? [/INST]", 
     "<s>Cow?", "Cow?</s>",
     "<|start_header_id|>user<|end_header_id|>\n\nCow?<|eot_id|>", "<start_of_turn>user\nCow?<end_of_turn>\n",
     "[|Human|] Cow?\n[|Assistant|] ", "A chat. USER: Cow? ASSISTANT:",
     "<extra_id_1>User\nCow?", "[UNUSED_TOKEN_146]user\nCow?", "<reserved_106>Cow?", "<role>HUMAN</role>Cow?",
     "<\uff5cUser\uff5c>Cow?<\uff5cAssistant\uff5c>",
     "Below is an instruction.\n\n### Instruction:\nCow?\n\n### Response:"],
)  # fmt: skip
def test_prompts_that_are_templated_already_are_said(text):
    path = written("a.jsonl", {"prompt": text}, {"prompt": "Cow?"})
    (line,) = (line for line in checked(ppo=data(path))["ppo.data.0"] if "template" in line)
    assert line.startswith("1 of 2 records hold markers of a chat template (")


@pytest.mark.parametrize(
    "text",
    [
        "a <b> tag",
        "xs <| f |> g",
        "1 < 2 | 3 > 2",
        "<s>struck</s> out",
        "[1] [inst]",
        "# Response: no",
        "<user@mail>",
        "[|x|]",
        "USER: of it",
        "an ASSISTANT: or USER:",
    ],
)
def test_ordinary_text_is_not_taken_for_a_template(text):
    path = written("a.jsonl", {"prompt": f"What is {text} here?"})
    assert not [line for line in checked(ppo=data(path))["ppo.data.0"] if "template" in line]


TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}%%Cow says %%
{{ m.content }}
{% else %}%%Dog says %%
{{ m.content }}{{ eos_token }}
{% endif %}{% endfor %}{% if add_generation_prompt %}%%Dog says %%
{% endif %}"""


@pytest.mark.parametrize("text", ["%%Cow says %%\nHi\n%%Dog says %%", "%%Dog says %%\nHi"])
def test_the_headers_of_the_models_own_template_are_markers(text):
    Path("own.jinja").write_text(TEMPLATE)
    path = written("a.jsonl", {"prompt": text}, {"prompt": "A Cow says what?"})
    model = {"context_length": 128, "chat_template": "own.jinja"}
    (line,) = (line for line in checked(model=model, ppo=data(path))["ppo.data.0"] if "template" in line)
    assert line.startswith("1 of 2 records hold the chat template's own markers (%%")


PAIR = {"prompt": "Cow?", "chosen": "Moo.", "rejected": "Woof."}


@pytest.mark.parametrize(
    ("scores", "is_odd"),
    [
        ({"score_chosen": 1.0, "score_rejected": 9.0}, True),
        ({"score_chosen": 5, "score_rejected": 5}, True),
        ({"chosen-rating": 1, "rejected-rating": 2}, True),
        ({"chosen_avg_rating": 1.5, "rejected_avg_rating": 2}, True),
        ({"chosenReward": "1", "rejectedReward": "2.5"}, True),
        ({"rejected_score": 2, "chosen_score": -2}, True),
        ({"margin": -1.0}, True),
        ({"scores": {"chosen": 1, "rejected": 9}}, True),
        ({"chosen_rank": 3, "rejected_rank": 1}, True),
        ({"winner": "rejected"}, True),
        ({"margin": 0.5}, False),
        ({"scores": {"chosen": 9, "rejected": 1}}, False),
        ({"chosen_rank": 1, "rejected_rank": 3}, False),
        ({"winner": "chosen"}, False),
        ({"rating": [1, 5]}, False),
        ({"score_chosen": 9.0, "score_rejected": 1.0}, False),
        ({"score_chosen": None, "score_rejected": 1.0}, False),
        ({"chosen_length": 1, "rejected_length": 2}, False),
        ({"score_chosen": 1}, False),
        ({"score_chosen": [1], "score_rejected": [2]}, False),
    ],
)  # fmt: skip
def test_scores_that_contradict_their_pair_are_counted(scores, is_odd):
    sound = [{**PAIR, "prompt": f"question {number}"} for number in (*range(1, 6), 11)]
    path = written("a.jsonl", {**PAIR, **scores}, *sound)
    told = [line for line in checked(reward=data(path))["reward.data.0"] if "score of the chosen" in line]
    assert len(told) == is_odd
    if is_odd:
        assert told[0].startswith(
            "in 1 of 7 pairs the score of the chosen answer is not above that of the rejected one ("
        )


def test_scores_under_renamed_columns_are_compared_too():
    columns = {"chosen": "better", "rejected": "worse"}
    rows = [{"prompt": f"question {n}", "better": "a", "worse": "b", "better_score": 1, "worse_score": 2}
            for n in (1, 2, 11)]  # fmt: skip
    lines = checked(reward=data(written("a.jsonl", *rows), columns=columns))["reward.data.0"]
    assert any(
        line.startswith("in 3 of 3 pairs") and "better_score 1, worse_score 2" in line for line in lines
    )


def test_prompts_of_evaluate_that_are_trained_on_are_counted_by_content():
    path = written("asked.jsonl", *({"prompt": question} for question in QUESTIONS))
    system, answer = say("system", "Be brief."), say("assistant", "Moo.")
    trained = [{"messages": [system, say("user", f" {asked}\n"), answer]} for asked in QUESTIONS[:5]]
    later = {
        "messages": [
            say("user", "Hi"),
            say("assistant", "Ho"),
            say("user", QUESTIONS[7]),
            say("assistant", "Moo."),
        ]
    }
    lines = checked(
        sft=data(written("sft.jsonl", *trained, later)),
        ppo=data(path),
        evaluate={"prompts": [{"path": path}]},
    )["evaluate.prompts.0"]
    told = [line for line in lines if "trains on" in line]
    assert told == [
        "5 of 20 prompts are prompts that sft trains on (such as 'Cow 0?'): part: train there and part: "
        "heldout here keep them apart",
        "20 of 20 prompts are prompts that ppo trains on (such as 'Cow 0?'): part: train there and "
        "part: heldout here keep them apart",
    ]


def test_the_parts_of_one_file_share_no_prompt():
    path = written("a.jsonl", *({"prompt": question} for question in QUESTIONS))
    half = {"path": path, "heldout_frac": 0.5}
    lines = checked(
        ppo={"data": [{**half, "part": "train"}]}, evaluate={"prompts": [{**half, "part": "heldout"}]}
    )
    assert not [line for line in lines["evaluate.prompts.0"] if "trains on" in line]


@pytest.mark.parametrize("part", ["train", "all"])
def test_prompts_that_part_cannot_tell_from_each_other_are_said_to_be_written_otherwise(part):
    written("a.jsonl", *({"prompt": question} for question in QUESTIONS))
    written("b.jsonl", *({"prompt": f"{question}\n"} for question in QUESTIONS))
    lines = checked(
        ppo={"data": [{"path": "a.jsonl", "heldout_frac": 0.5, "part": part}]},
        evaluate={"prompts": [{"path": "b.jsonl", "heldout_frac": 0.5, "part": "heldout"}]},
    )
    (line,) = (line for line in lines["evaluate.prompts.0"] if "trains on" in line)
    assert line.endswith("keep them apart") == (part == "all")
    assert ("exact text of the first question, white space too" in line) == (part == "train")


def test_evaluation_texts_too_short_for_decontamination_are_counted():
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    asked = written("asked.jsonl", {"prompt": long}, {"prompt": "Cow?", "answer": "Moo."})
    texts = written("text.jsonl", *({"text": f"A cow in field {number} says moo."} for number in range(30)))
    lines = checked(
        prepare={**data(texts), "vocab_size": 300}, ppo=data(asked), evaluate={"prompts": [{"path": asked}]}
    )
    assert not [line for line in lines["ppo.data.0"] if "decontamination" in line]
    told = [line for line in lines["evaluate.prompts.0"] if "decontamination" in line]
    assert told == [
        "decontamination looks for 1 of 3 texts: 2 have fewer words than prepare.decontaminate_ngram"
    ]


def test_files_that_may_be_copies_of_each_other_are_said():
    written("d/a.jsonl", ANSWERED, ANSWERED)
    Path("d/a.csv").write_text("prompt,completion\nCow?,Moo.\nCow?,Moo.\n")
    written("d/b.jsonl", ANSWERED)
    lines = checked(sft=data("d"))["sft.data.0"]
    assert "a.csv and a.jsonl have 2 rows each: all are read, is one a copy of another?" in lines
