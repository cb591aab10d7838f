"""Stand-ins: a template learns of hidden content what it would learn of the real one, and writes the same."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.chat.stand_ins import PRIVATE_USE, Content, StandIns, any_of, masked, masked_messages

PARTS = ["<", ">", "</x>", "<x>", "a", " ", "\n", "/x", "", "[", "b"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=8).map("".join)
ASKED: dict[str, Callable[[str, str], Any]] = {
    "in": lambda text, part: part in text,
    "equals": lambda text, part: text == part,
    "differs": lambda text, part: part != text,
    "startswith": lambda text, part: text.startswith(part),
    "startswith any": lambda text, part: text.startswith(("b", part)),
    "endswith": lambda text, part: text.endswith(part),
    "find": lambda text, part: (text.find(part), text.rfind(part)),
    "count": lambda text, part: text.count(part),
    "key": lambda text, part: {part: 1}.get(text),
}
CUT: dict[str, Callable[[str, str], Any]] = {
    "itself": lambda text, part: text,
    "slice": lambda text, part: text[1:-1],
    "first": lambda text, part: text[:1] + text[-2:],
    "strip": lambda text, part: text.strip(),
    "strip of signs": lambda text, part: text.strip("<x>"),
    "sides": lambda text, part: text.lstrip("\n") + part + text.rstrip("\n"),
    "before": lambda text, part: part + text,
    "prefix": lambda text, part: text.removeprefix(part) + text.removesuffix(part),
    "split": lambda text, part: text.split(part or "<"),
    "split once": lambda text, part: text.split(part or "<", 1),
    "split from behind": lambda text, part: text.rsplit(part or "<", 1),
    "split at white space": lambda text, part: text.split(),
    "lines": lambda text, part: text.splitlines(),
    "partition": lambda text, part: text.partition(part or "<") + text.rpartition(part or "<"),
    "replace": lambda text, part: text.replace(part, "<y>"),
    "replace once": lambda text, part: text.replace(part, "", 1),
    "case": lambda text, part: text.upper() + text.lower(),
    "twice": lambda text, part: text.split("</x>")[0].split("<x>")[-1].lstrip("\n").strip(),
}


def hidden(text: str) -> tuple[Content, StandIns]:
    stand_ins = StandIns("<>", text)
    return Content(masked(text, stand_ins.plain, any_of(())), text), stand_ins


@pytest.mark.parametrize("name", ASKED)
@given(text=TEXTS, part=st.sampled_from(PARTS))
@settings(max_examples=60, deadline=None)
def test_questions_about_a_hidden_text_are_answered_as_of_the_real_one(name: str, text: str, part: str):
    assert ASKED[name](hidden(text)[0], part) == ASKED[name](text, part)


@pytest.mark.parametrize("name", CUT)
@given(text=TEXTS, part=st.sampled_from(PARTS))
@settings(max_examples=60, deadline=None)
def test_what_is_cut_from_a_hidden_text_is_what_is_cut_from_the_real_one(name: str, text: str, part: str):
    """As it is seen, and as it is written: with stand-ins for every sign of the content."""
    content, stand_ins = hidden(text)
    found, real = CUT[name](content, part), CUT[name](text, part)
    several, all_real = (found, real) if isinstance(found, list | tuple) else ([found], [real])
    assert [stand_ins.real("".join([one])) for one in several] == [*all_real] == [*several]
    if name not in ("sides", "before", "replace"):
        assert not set("".join(several)) & {"<", ">"}


def test_an_assistant_may_spell_the_tokens_that_stand_inside_a_turn_and_nobody_else():
    text = "<think><|im_end|>"
    roles = ("system", "user", "assistant", "tool")
    stand_ins = StandIns("<>", text)
    messages = [{"role": role, "content": text, "name": text} for role in roles]
    found = masked_messages(messages, stand_ins.plain, any_of(["<think>"]))
    assert ["<think>" in "".join([one["content"]]) for one in found] == [False, False, True, False]
    assert not any("<" in "".join([one["name"]]) for one in found)
    assert all("<|im_end|>" not in "".join([one["content"]]) for one in found)
    assert all(one["content"] == text for one in found)


def test_no_character_of_the_conversation_stands_for_another():
    taken = "".join(map(chr, PRIVATE_USE[:-3]))
    stand_ins = StandIns("<>", taken)
    assert not {chr(one) for one in stand_ins.plain} & set(taken)
    assert stand_ins.real(taken) == taken
