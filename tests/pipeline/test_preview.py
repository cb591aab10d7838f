"""`rlhf check` on datasets: what it found, in tokens, and the first example with its loss mask."""

import json
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from pipeline import cli, preview
from pipeline import config as configs
from pipeline.preview import CONTEXT, MARKS, TRAINED, previews
from stages.data import overview
from stages.data.chat.special import CHATML, IM_START
from stages.data.corpus.vocabulary import train_tokenizer
from stages.data.overview import first_texts
from stages.errors import DataError

CONFIG = """
name: look
model: {context_length: 48}
prepare: {data: [{path: text.jsonl}], vocab_size: 300, min_chars: 5}
pretrain: {max_steps: 1}
sft: {data: [{path: sft.jsonl, on_bad_row: skip}]}
reward: {data: [{path: pairs.jsonl}]}
ppo:
  data: [{path: sft.jsonl, on_bad_row: skip, format: prompt, columns: {prompt: question}}]
  max_response_tokens: 10
"""
OPENING, CLOSING = MARKS


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def jsonl(name: str, *rows: object) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    jsonl("text.jsonl", *({"text": text} for text in ("a cat and a dog", "x", "another text")))
    jsonl(
        "sft.jsonl",
        {"question": "Hi", "answer": "Ho"},
        {"question": "Hi", "answer": "o" * 60},
        {"question": 7},
    )
    pairs = (("q", 1), ("c", 50))  # the second one is held out
    jsonl("pairs.jsonl", *({"prompt": q, "chosen": "y" * n, "rejected": "n"} for q, n in pairs))
    (tmp_path / "look.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(*overrides: str) -> dict[str, str]:
    """Key of the dataset -> what is shown of it."""
    loaded = configs.load(Path("look.yaml"), overrides)
    shown = [block.plain.strip() for block in previews(loaded.config, model_at_hand=False)]
    return {block.partition(":")[0]: block for block in shown}


def test_every_dataset_shows_schema_rows_lengths_and_rules(directory: Path):
    shown = blocks()
    assert list(shown) == ["lengths", "prepare.data.0", "sft.data.0", "reward.data.0", "ppo.data.0"]
    assert "tokens like prepare's" in shown["lengths"]
    assert "format text\n  3 rows, 3 records\n" in shown["prepare.data.0"]
    assert "1 is affected: length: too_short" in shown["prepare.data.0"]
    assert "format prompt_completion (prompt from question, completion from answer)" in shown["sft.data.0"]
    assert "3 rows, 2 records; rows malformed and skipped: 1" in shown["sft.data.0"]
    assert "1 is affected: cut to model.context_length" in shown["sft.data.0"]
    assert "1 is affected: longer than model.context_length" in shown["reward.data.0"]
    lengths = next(line for line in shown["sft.data.0"].splitlines() if "median" in line)
    numbers = [int(word.strip(",")) for word in lengths.split() if word.strip(",").isdigit()]
    assert numbers[0] <= numbers[1] <= numbers[2] and numbers[2] > 48


def test_prompts_without_room_for_the_normalisers_responses_are_told(directory: Path):
    """The one pair that fits has a prompt of some ten tokens."""
    said = "0 of 1 prompts leave room for the responses that scores are normalised over"
    assert said in blocks("reward.normaliser_max_response_tokens=45")["reward.data.0"]
    assert said not in blocks()["reward.data.0"]


def test_the_first_example_is_marked_where_it_is_trained(directory: Path):
    shown = blocks()
    assert shown["sft.data.0"].endswith(f"<|im_start|>assistant\n{OPENING}Ho<|im_end|>{CLOSING}")
    assert f"{OPENING}y<|im_end|>{CLOSING}" in shown["reward.data.0"]
    assert f"{OPENING}n<|im_end|>{CLOSING}" in shown["reward.data.0"]
    assert OPENING not in shown["ppo.data.0"]


def test_the_mask_has_colours(directory: Path):
    config = configs.load(Path("look.yaml"), []).config
    block = next(b for b in previews(config, model_at_hand=False) if b.plain.startswith("\nsft.data.0"))
    styled = {block.plain[span.start : span.end]: span.style for span in block.spans}
    assert styled[f"{OPENING}Ho<|im_end|>{CLOSING}"] == TRAINED
    assert all(style == CONTEXT for text, style in styled.items() if OPENING not in text)


def test_the_tokenizer_is_trained_on_what_prepares_lengths_leave(directory: Path):
    texts = ["\r\na cat ", "n\u0303", "x" * 50]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = configs.load(Path("look.yaml"), ["prepare.min_chars=1", "prepare.max_chars=49"]).config.prepare
    assert config is not None
    assert first_texts(config.data[0], config) == ["a cat", "ñ"]


def test_keys_that_nobody_reads_and_prompts_that_no_column_holds_are_told(directory: Path):
    turns = [
        {"role": "user", "content": "Hi", "id\x1b": 7},
        {"role": "assistant", "content": "Ho", "id\x1b": 8},
    ]
    rows = [{"messages": [*turns, {"role": "user", "content": "!", "by": "Ann"}]}, {"messages": turns}]
    (directory / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = ({"chosen": f"{q}\nyes", "rejected": f"{q}\nno"} for q in ("Is\x1bit\nso? " + "a" * 99, "c"))
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sides))
    shown = blocks("ppo=null", "evaluate=null")
    assert "\n  message keys that are not read: id\\x1b (4), by (1)\n" in shown["sft.data.0"]
    assert (
        "\n  no prompt column: of 2 the prompt is what chosen and rejected begin with, such as "
        f"'Is\\x1bit\\nso? {'a' * 66}\u2026'\n"
    ) in shown["reward.data.0"]


@pytest.mark.parametrize("overrides", [(), ("prepare=null",)])
def test_what_would_steer_a_terminal_is_written_out(directory: Path, overrides: tuple[str, ...]):
    emoji = "\U0001f469\u200d\U0001f467\ufe0f"
    signs = {"\x1b[31m": "\\x1b[31m", "\x9b": "\\x9b", "\0": "\\x00", "\a": "\\x07", "\r": "\\r"}
    signs |= {"\u202e": "\\u202e", "\u2066": "\\u2066", "\u2028": "\\u2028"}
    row = {"question": f"a\tb\nc\u3000{emoji}" + "".join(signs), "answer": "Ho"}
    (directory / "sft.jsonl").write_text(json.dumps(row) + "\n")
    shown = blocks(*overrides, "model.context_length=128")["sft.data.0"]
    assert f"a\tb\nc\u3000{emoji}" + "".join(signs.values()) in shown
    assert not set("".join(signs)) - set("[31m") & set(shown)


def test_of_many_rules_the_most_frequent_are_shown(directory: Path, monkeypatch: pytest.MonkeyPatch):
    texts = ["Der Hund und die Katze schlafen im Haus."] * 2 + ["Le chat dort dans la maison."]
    texts += ["The dog and the cat sleep in the house."] * 2
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(preview, "NUM_RULES", 1)
    shown = blocks("prepare.languages=[en]", "prepare.min_language_score=0")["prepare.data.0"]
    assert "2 are affected: language: de\n  1 affected by 1 further rules\n" in shown


def test_without_a_tokenizer_lengths_are_in_characters(directory: Path):
    shown = blocks("prepare=null")
    assert "characters, for the config names no model" in shown["lengths"]
    assert "characters: median 33" in shown["sft.data.0"] and "user: Hi\nassistant: Ho" in shown["sft.data.0"]


def test_a_bad_row_after_the_sample_is_found_too(directory: Path):
    with pytest.raises(DataError, match=r"sft\.jsonl:3: "):
        blocks("sft.data.0.on_bad_row=error")


@pytest.mark.parametrize(
    ("key", "answers", "words"),
    [
        ("sft.data.0", {"completion": "y"}, "no trained token within model.context_length"),
        ("reward.data.0", {"chosen": "y", "rejected": "n"}, "longer than model.context_length"),
        ("ppo.data.0", {}, "no room left for a response"),
    ],
)
def test_a_dataset_of_which_all_is_left_out_is_an_error(directory: Path, key, answers, words):
    rows = [{"question": f"{number}, " * 50, **answers} for number in range(20)]
    (directory / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"long\.jsonl: no rows left of 20 \({words}: 20; the shortest has"):
        blocks(f"{key}.path=long.jsonl")


def test_documents_that_the_rules_all_drop_are_an_error(directory: Path):
    with pytest.raises(
        DataError, match=r"text\.jsonl: no rows left of 3 \(dropped: 1 by length \(too_short\), 2 by q"
    ):
        blocks("prepare.quality=[gopher_quality]")


def test_what_is_certain_to_fail_is_said_before_any_dataset_is_shown(directory: Path):
    found = previews(
        configs.load(Path("look.yaml"), ["reward.group_column=kind"]).config, model_at_hand=False
    )
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: kind: missing"):
        next(found)


def test_a_template_that_sft_would_refuse_is_refused(directory: Path):
    tokenizer = train_tokenizer([], 300, 1)
    tokenizer.bos_token = IM_START
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.save_pretrained("doubled")
    with pytest.raises(DataError, match=r"sft: .* does not render trainable turns: BOS occurs 3 times"):
        blocks("prepare.tokenizer=doubled")


REFUSING = "{% if 'bad' in messages[0].content %}{{ raise_exception('Not so') }}{% endif %}" + CHATML


@pytest.fixture
def refusing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The template refuses the third of four rows of everything, which is behind the sample."""
    (directory / "refusing.jinja").write_text(REFUSING)
    asked = ["Hi", "Ho", "bad", "Hu"]
    rows = [{"question": one, "answer": "Ha", "chosen": "Ha", "rejected": "He"} for one in asked]
    for name in ("sft.jsonl", "pairs.jsonl"):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(overview, "SAMPLE_CHARS", 1)
    return directory


@pytest.mark.parametrize("key", ["sft", "reward", "ppo"])
def test_a_row_that_the_template_refuses_is_found_wherever_it_stands(refusing: Path, key: str):
    settings = [
        f"{one}.data.0.on_bad_row={'error' if one == key else 'skip'}" for one in ("sft", "reward", "ppo")
    ]
    with pytest.raises(
        DataError, match=r"(sft|pairs)\.jsonl:3: the chat template refuses it: Not so; change"
    ):
        blocks("model.chat_template=refusing.jinja", "reward.heldout_frac=0.5", *settings)


def test_check_says_how_many_records_the_template_was_tried_on(refusing: Path):
    settings = (
        "model.chat_template=refusing.jinja",
        "reward.data.0.on_bad_row=skip",
        "reward.heldout_frac=0.5",
    )
    shown = blocks(*settings)
    assert "chat template tried on 4 of 4 records, 1 refused and skipped" in shown["sft.data.0"]
    assert "chat template tried" not in shown["prepare.data.0"]


def test_a_prompt_has_to_leave_room_for_the_end_token_that_scoring_appends(directory: Path):
    longest = int(blocks()["ppo.data.0"].partition("longest ")[2].split()[0].rstrip(","))
    assert "affected" not in blocks(f"ppo.max_response_tokens={48 - longest - 1}")["ppo.data.0"]
    with pytest.raises(
        DataError, match=rf"no room left for a response: 2; the shortest has {longest} tokens"
    ):
        blocks(f"ppo.max_response_tokens={48 - longest}")


def test_the_prompts_of_evaluate_have_to_fit_as_a_base_model_is_asked_too(directory: Path):
    source = "{path: sft.jsonl, on_bad_row: skip, format: prompt, columns: {prompt: question}}"
    asked = f"evaluate={{prompts: [{source}]}}"
    short = "evaluate.max_response_tokens=8"
    assert "affected" not in blocks(asked, short)["evaluate.prompts.0"]
    with pytest.raises(DataError, match="no room left for a response: 2"):
        blocks(asked, short, f"evaluate.base_prompt={'x' * 48} {{prompt}}")


SHORT = "reward: scores are normalised over responses of at most 10 tokens at temperature 1"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            (),
            [f"{SHORT}, as ppo's; changing ppo.max_response_tokens or ppo.temperature re-runs reward"],
        ),
        (
            ("reward.normaliser_max_response_tokens=20", "ppo.temperature=0.7"),
            [
                "reward: scores are normalised over responses of at most 20 tokens at temperature 0.7, the "
                "temperature as ppo's; changing ppo.temperature re-runs reward",
                "reward.normaliser_max_response_tokens: 20 is not ppo.max_response_tokens 10, and the scores "
                "of responses of another length have another mean and spread; remove it to follow ppo",
            ],
        ),
        (
            ("reward.normaliser_max_response_tokens=10",),
            [f"{SHORT}, the temperature as ppo's; changing ppo.temperature re-runs reward"],
        ),
        (
            ("ppo=null",),
            [
                "reward: scores are normalised over responses of at most 32 tokens at temperature 1; no ppo "
                "section says how they will be sampled"
            ],
        ),
        (
            ("reward.init_from=pretrain",),
            [
                "reward.init_from: pretrain: scores are normalised over the held-out pairs' own responses; "
                "none are sampled, and reward.normaliser_prompts is not read"
            ],
        ),
        (("reward=null", "ppo=null"), []),
    ],
)
def test_check_says_what_scores_are_normalised_over(
    directory: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], said: list[str]
):
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "look.yaml", *overrides])
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("note: ") for line in lines if line.startswith("note: reward")] == said


def test_a_tokenizer_whose_ids_cannot_be_met_is_refused_in_one_line(
    directory: Path, capsys: pytest.CaptureFixture[str]
):
    """It splits at white space and puts a space before each word: an answer's first word has one too."""
    tokenizer = train_tokenizer([], 300, 1)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained("spaced")
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "look.yaml", "prepare.tokenizer=spaced"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "spaced: the tokenizer's ids" in line and "model.chat_template" in line


def test_check_prints_it_all(directory: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "look.yaml"])
    assert not ended.value.code
    assert f"{OPENING}Ho<|im_end|>{CLOSING}" in capsys.readouterr().out
