"""Thoughts in answers: the tokens that the template writes, behind prompts that open or close them."""

import pytest
from test_real_conversations import (
    HEAD,
    MARKS,
    TALKS,
    THOUGHT,
    chat_of,
    examples,
    made,
    refused,
    said,
    shown,
    user,
)

from stages.data.chat.messages import Talk
from stages.data.chat.special import CHATML
from stages.data.chat.templates import Refused
from stages.data.reading.records import Message

THINK = ("<think>", "</think>")
PREFILLED = (
    "{%- for m in messages -%}{%- set t = m.content -%}{%- if m.role == 'assistant' and '</think>' in t -%}"
    "{%- set t = t.split('</think>')[-1] -%}{%- endif -%}"
    "{{ '<|im_start|>' + m.role + '\\n' + t + '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"
)


@pytest.mark.parametrize("tokens", [MARKS, (*MARKS, "<think>", "</think>")])
def test_an_answer_that_begins_as_its_prompt_ends_is_trained_behind_it(tokens: tuple[str, ...]):
    chat = made(PREFILLED, tokens, eos="<|im_end|>")
    (example,) = examples(chat, Talk(messages=(user("2+2?"), said(THOUGHT))))
    opened = HEAD.format("2+2?") + "<think>\n"
    assert shown(chat, example) == f"{opened}⟦two twos\n</think>\n\n4<|im_end|>⟧"
    assert chat.tokenizer.decode(chat.prompt_ids([user("2+2?")])) == opened
    turns = examples(chat, TALKS["thoughts in content"])
    assert [shown(chat, one).partition("⟦")[2] for one in turns] == ["two twos\n</think>\n\n4<|im_end|>⟧"] * 2


def test_an_answer_that_does_not_begin_as_its_prompt_ends_is_refused_with_the_fix():
    chat = made(PREFILLED, MARKS, eos="<|im_end|>")
    words = refused(chat, TALKS["plain"])
    assert "ends with <think>, and this answer does not begin with it; write it as <think>…</think>…" in words
    assert chat.decode(chat.response_ids("4")).strip() == "4"  # what evaluate asks for of a base model's text


def test_where_the_template_writes_empty_thoughts_itself_a_plain_answer_is_trained_with_them():
    """As Nemotron's."""
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}").replace(
        "message['content']",
        "('<think></think>' if message.role == 'assistant' and '</think>' not in message.content else '') + "
        "message['content']",
    )
    chat = made(template, (*MARKS, "<think>", "</think>"), eos="<|im_end|>")
    (plain,) = examples(chat, TALKS["plain"])
    opened = HEAD.format("2+2?") + "<think>\n"
    assert shown(chat, plain) == f"{opened}⟦</think>4<|im_end|>⟧"
    (thinking,) = examples(chat, Talk(messages=(user("2+2?"), said(THOUGHT))))
    assert shown(chat, thinking) == f"{opened}⟦two twos\n</think>\n\n4<|im_end|>⟧"


def test_an_untrained_answer_may_begin_otherwise():
    chat = made(PREFILLED, MARKS, eos="<|im_end|>")
    messages = (user("2+2?"), said("4", is_trained=False), user("3+3?"), said(THOUGHT))
    (example,) = examples(chat, Talk(messages=messages))
    assert shown(chat, example).startswith(HEAD.format("2+2?") + "4<|im_end|>")


def with_empty_thoughts(empty: str, content: str = "message['content']") -> str:
    """A template whose prompts open thoughts, and that writes `empty` ahead of a known answer without any."""
    written = (
        f"('{empty}' if message.role == 'assistant' and '</think>' not in {content} else '') + {content}"
    )
    opened = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    return opened.replace("message['content']", written)


EMPTY = ("<think></think>", "<think>\n\n</think>\n\n")
"""Nemotron's, Qwen3.5's."""
COPIED = "('' ~ message['content'])"
"""As a macro returns it: what the message spells can be told from the template's text no more."""


@pytest.mark.parametrize("content", ["message['content']", COPIED])
@pytest.mark.parametrize("empty", EMPTY)
def test_thoughts_in_content_are_tokens_where_earlier_answers_hold_empty_ones(empty: str, content: str):
    """What the template writes around contents there does not make them marks of a turn."""
    chat = made(with_empty_thoughts(empty, content), (*MARKS, *THINK), eos="<|im_end|>")
    for thoughts in (THOUGHT, "<think>\nnever closed"):
        talk = Talk(messages=(user("2+2?"), said("4"), user("3+3?"), said(thoughts)))
        example = examples(chat, talk)[-1]
        written = shown(chat, example)
        assert written.endswith(f"{thoughts[-12:]}<|im_end|>⟧")
        found = [example.ids.count(chat.tokenizer.convert_tokens_to_ids(tag)) for tag in THINK]
        assert found == [written.count(tag) for tag in THINK]


def test_both_sides_of_a_pair_close_their_thoughts_with_the_same_token():
    chat = made(with_empty_thoughts(EMPTY[0]), (*MARKS, *THINK), eos="<|im_end|>")
    (pair,) = chat.pairs([(Talk(messages=(user("2+2?"),)), (said(THOUGHT),), (said("5"),))])
    assert not isinstance(pair, Refused)
    closing = chat.tokenizer.convert_tokens_to_ids("</think>")
    assert [pair.chosen.count(closing), pair.rejected.count(closing)] == [1, 1]


@pytest.mark.parametrize("answer", [said(THOUGHT), said("4", reasoning="two twos")])
def test_thoughts_behind_a_prompt_that_closes_them_are_refused_with_the_cause(answer: Message):
    written = (
        "('<think>\n' ~ (message.reasoning_content or '') ~ '\n</think>\n\n' "
        f"if message.role == 'assistant' and '</think>' not in {COPIED} else '') + {COPIED}"
    )
    template = CHATML.replace("message['content']", written)
    template = template.replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}")
    chat = made(template, (*MARKS, *THINK), eos="<|im_end|>")
    assert "closes its thoughts already (<think></think>)" in refused(
        chat, Talk(messages=(user("2+2?"), answer))
    )
    (plain,) = examples(chat, TALKS["plain"])
    assert shown(chat, plain) == HEAD.format("2+2?") + "<think>\n\n</think>\n\n⟦4<|im_end|>⟧"


SERVED = THOUGHT.removeprefix("<think>\n")


@pytest.mark.parametrize("template", [PREFILLED, with_empty_thoughts(EMPTY[0])])
@pytest.mark.parametrize("tokens", [MARKS, (*MARKS, *THINK)])
def test_an_answer_as_a_server_returns_it_goes_on_behind_its_prompt(template: str, tokens: tuple[str, ...]):
    """The opening is the prompt's; whether the template keeps thoughts in an answer or not."""
    chat = made(template, tokens, eos="<|im_end|>")
    served, spelled = (Talk(messages=(user("2+2?"), said(text))) for text in (SERVED, THOUGHT))
    assert examples(chat, served) == examples(chat, spelled)


def test_what_a_server_returns_is_trained_in_every_turn_of_r1s():
    chat = chat_of("r1_distill")
    talk = Talk(messages=(user("2+2?"), said(SERVED), user("3+3?"), said(SERVED)))
    assert examples(chat, talk) == examples(chat, TALKS["thoughts in content"])


def test_an_answer_that_opens_thoughts_only_later_is_refused():
    chat = made(PREFILLED, MARKS, eos="<|im_end|>")
    words = refused(chat, Talk(messages=(user("2+2?"), said(f"Well. {THOUGHT}"))))
    assert "does not begin with it" in words


def test_thoughts_in_a_key_that_the_template_does_not_read_are_refused_with_where_to_write_them():
    words = refused(chat_of("r1_distill"), TALKS["thoughts"])
    assert "reasoning_content" in words and "write it into content as <think>…</think>…" in words
