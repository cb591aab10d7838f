"""Fitting: what is too long is cut or left out by each stage's own rule, and counted."""

import json
from functools import cache, partial
from pathlib import Path

import pytest

from stages.config.data import DataSource
from stages.data.chat.special import CHATML
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus.vocabulary import train_tokenizer
from stages.data.fitting import (
    check_left,
    data_metrics,
    fit_conversations,
    fit_pairs,
    fit_prompts,
    fit_rows,
    rules_applied,
)
from stages.data.reading.readers import NUM_KEYS, Rows, read_conversations
from stages.data.reading.records import Conversation, Message, Pair, Prompt
from stages.errors import DataError


@cache
def chat() -> ChatTokenizer:
    """Bytes only: a character of these tests is a token."""
    return ChatTokenizer(train_tokenizer([], 300, 1), template=CHATML)


def one(fit, record, *limits):
    """What becomes of one record."""
    (found,) = fit(chat(), [record], *limits)
    return found


def messages(*contents: str) -> tuple[Message, ...]:
    return tuple(
        Message(role="assistant" if index % 2 else "user", content=content)
        for index, content in enumerate(contents)
    )


def test_a_conversation_is_cut_at_the_end_and_left_out_without_a_trained_token():
    conversation = Conversation(messages=messages("question", "answer"))
    whole = one(fit_conversations, conversation, 1000)
    assert whole.rule is None and [len(one.ids) for one in whole.example] == [whole.num_tokens]
    cut = one(fit_conversations, conversation, whole.num_tokens - 3)
    assert cut.rule == "cut to model.context_length" and cut.num_tokens == whole.num_tokens
    assert [one.ids for one in cut.example] == [one.ids[:-3] for one in whole.example]
    none = one(fit_conversations, conversation, 5)
    assert none.example is None and none.rule == "no trained token within model.context_length"


def test_a_pair_that_is_too_long_is_left_out_or_loses_its_prompts_start():
    prompt, chosen, rejected = messages("a long question"), messages("", "yes")[1:], messages("", "no")[1:]
    pair = Pair(prompt=prompt, chosen=chosen, rejected=rejected, row={})
    whole = one(fit_pairs, pair, 1000, "drop")
    assert whole.rule is None and whole.example is not None
    dropped = one(fit_pairs, pair, whole.num_tokens - 1, "drop")
    assert (dropped.example, dropped.rule) == (None, "longer than model.context_length")
    cut = one(fit_pairs, pair, whole.num_tokens - 1, "truncate")
    assert cut.example is not None and cut.example.prompt == whole.example.prompt[1:]
    assert cut.example.chosen == whole.example.chosen and cut.rule == "prompt's start cut"


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_a_pair_without_difference_is_left_out_by_either_policy(too_long):
    side = messages("", "same")[1:]
    fitted = one(fit_pairs, Pair(prompt=messages("q"), chosen=side, rejected=side, row={}), 1000, too_long)
    assert fitted.example is None and "no difference" in str(fitted.rule)


def test_a_prompt_without_room_for_a_response_is_left_out():
    prompt = Prompt(messages=messages("question"), row={})
    whole = one(fit_prompts, prompt, 1000)
    assert one(fit_prompts, prompt, whole.num_tokens) == whole and whole.rule is None
    assert one(fit_prompts, prompt, whole.num_tokens - 1).example is None


def test_rules_are_counted():
    prompts = [Prompt(messages=messages("q" * length), row={}) for length in (1, 2, 30, 40)]
    fitted = [one(fit_prompts, prompt, 25) for prompt in prompts]
    assert rules_applied(fitted) == {"no room left for a response": 2}


def test_a_source_of_which_all_is_left_out_is_named_beside_others():
    fitted = [
        one(fit_prompts, Prompt(messages=messages("q" * n), row={}), 60) for n in (1, 99, 98, 97, 2, 99)
    ]
    lost = fitted[3].num_tokens
    sources = [DataSource(path=name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    check_left(list(zip(sources, (2, 3, 1), strict=True))[:2], fitted[:5])
    with pytest.raises(DataError) as caught:
        check_left(list(zip(sources, (1, 3, 2), strict=True)), fitted)
    line = f"b.jsonl: no rows left of 3 (no room left for a response: 3; the shortest has {lost} tokens); "
    assert str(caught.value) == line + "raise model.context_length, or set weight: 0"


def test_the_metrics_name_the_most_frequent_message_keys_that_nobody_reads():
    def metrics(unread_keys: dict[str, int]) -> set[str]:
        rows: Rows[Prompt] = Rows(
            records=[], num_skipped=1, num_filtered=2, sizes=[], counts=[], unread_keys=unread_keys
        )
        return set(data_metrics(rows, [], "prompts"))

    known = {"prompts_dropped", "prompts_cut", "rows_skipped", "rows_filtered"}
    assert metrics({}) == known
    many = {f"key{number}": number for number in range(NUM_KEYS + 5)}
    assert metrics(many) - known == {f"unread_message_key/key{number}" for number in range(5, NUM_KEYS + 5)}


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML


@cache
def strict_chat() -> ChatTokenizer:
    return ChatTokenizer(train_tokenizer([], 300, 1), template=REFUSING)


def fitted_rows(path: Path, num_good: int, num_refused: int, **settings: object):
    """Of conversations of which the last ones begin with a system message."""
    good = [{"role": "user", "content": "Cow?"}, {"role": "assistant", "content": "Moo."}]
    bad = [{"role": "system", "content": "Be brief."}, *good]
    rows = [good] * num_good + [bad] * num_refused
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found = read_conversations([DataSource(path=str(path), **settings)], seed=0)
    return found, fit_rows(found, partial(fit_conversations, strict_chat(), context_length=99))


def test_a_row_that_the_template_refuses_is_named_in_the_templates_words(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"a\.jsonl:4: the chat template refuses it: no system here; change the row"
    ):
        fitted_rows(tmp_path / "a.jsonl", 3, 1)


def test_refused_rows_are_skipped_up_to_the_cap_and_counted(tmp_path: Path):
    rows, fitted = fitted_rows(tmp_path / "a.jsonl", 199, 1, on_bad_row="skip")
    assert sum(one.example is not None for one in fitted) == 199
    metrics = data_metrics(rows, fitted, "conversations")
    assert (metrics["rows_skipped"], metrics["conversations_dropped"]) == (1, 1)
    with pytest.raises(
        DataError, match=r"a\.jsonl:199: the chat .* 2 of 200 rows are bad, more than max_skipped"
    ):
        fitted_rows(tmp_path / "a.jsonl", 198, 2, on_bad_row="skip", max_skipped_frac=0.005)


def test_a_refused_row_counts_once_however_often_it_is_taken(tmp_path: Path):
    _, fitted = fitted_rows(tmp_path / "a.jsonl", 199, 1, on_bad_row="skip", weight=3)
    assert sum(one.example is None for one in fitted) == 3


def test_a_conversation_of_which_no_turn_is_trained_is_left_out_by_that_name():
    talk = (*messages("q"), Message(role="assistant", content="a", is_trained=False))
    fitted = one(fit_conversations, Conversation(messages=talk), 99)
    assert (fitted.example, fitted.rule) == (None, "no turn is marked to be trained")
