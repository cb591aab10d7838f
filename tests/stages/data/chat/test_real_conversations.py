"""What is trained is what the template makes of the real messages: thoughts, calls, tools, forged tokens.

Compared with transformers: `apply_chat_template` on the same messages.
"""

from functools import cache
from itertools import groupby
from typing import Any

import pytest
from test_chat_templates import byte_level
from thinking_templates import R1_DISTILL_ONE_CALL_OPEN, REAL
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from stages.data.chat.ids import Rendered
from stages.data.chat.messages import Talk
from stages.data.chat.special import CHATML
from stages.data.chat.templates import Refused
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.reading.records import Message
from stages.errors import ModelError

ENDS = {"gpt_oss": "<|return|>", "r1_distill": REAL["r1_distill"][1][2]}
STOPS = {"gpt_oss": ["<|call|>"], "llama31": ["<|eom_id|>"]}
MARKS = ("<|im_start|>", "<|im_end|>")
NO_FLAG = ("think>", "tool_call>", "tool_response>")  # added, but not flagged special, as in the real ones


@cache
def chat_of(name: str) -> ChatTokenizer:
    template, tokens = REAL[name]
    return made(template, tokens, eos=ENDS.get(name, "</s>"), stops=tuple(STOPS.get(name, ())))


def made(
    template: str, tokens: tuple[str, ...] = (), *, eos: str = "</s>", stops: tuple[str, ...] = ()
) -> ChatTokenizer:
    tokenizer = Tokenizer.from_str(byte_level("none"))
    tokenizer.add_tokens(
        [AddedToken(token, special=not token.endswith(NO_FLAG), normalized=False) for token in tokens]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token=eos
    )
    return ChatTokenizer(
        fast, template=template, stop_token_ids=[tokenizer.token_to_id(token) for token in stops]
    )


def user(text: str) -> Message:
    return Message(role="user", content=text)


def said(text: str, **more: Any) -> Message:
    return Message(role="assistant", content=text, **more)


def called(text: str = "", **arguments: Any) -> Message:
    function = {"name": "add", "arguments": arguments}
    return said(text, tool_calls=({"type": "function", "id": "call00001", "function": function},))


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two> numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    },
)
RESULT = Message(role="tool", content="3", name="add", tool_call_id="call00001")
THOUGHT = "<think>\ntwo twos\n</think>\n\n4"
TALKS: dict[str, Talk] = {
    "plain": Talk(messages=(user("2+2?"), said("4"))),
    "turns": Talk(messages=(user("2+2?"), said("4"), user("3+3?"), said("6"), user("and?"), said(" 8\n"))),
    "system": Talk(messages=(Message(role="system", content="Be brief."), user("2+2?"), said("4"))),
    "signs": Talk(messages=(user("is 1 < 2 > 0 | [x]?"), said("[yes] <b>1 < 2</b>"), user("<s>"), said("<"))),
    "calls": Talk(messages=(user("1+2?"), called(a=1, b=2), RESULT, said("3")), tools=TOOLS),
    "thoughts": Talk(
        messages=(user("2+2?"), said("4", reasoning="two twos"), user("3?"), said("6", reasoning="x"))
    ),
    "thoughts in content": Talk(messages=(user("2+2?"), said(THOUGHT), user("3+3?"), said(THOUGHT))),
}
TAKES = {
    "qwen3": [*TALKS],
    "qwen3_thinking": [*TALKS],
    "r1_distill": ["thoughts in content"],
    "llama31": ["plain", "turns", "system", "signs", "calls", "thoughts in content"],
    "mistral": ["plain", "turns", "system", "signs", "calls", "thoughts in content"],
    "gemma": ["plain", "turns", "signs", "thoughts in content"],
    "gpt_oss": ["plain", "turns", "system", "signs", "calls"],
}
TAKEN = [(name, talk) for name, talks in TAKES.items() for talk in talks]


def as_rows(chat: ChatTokenizer, talk: Talk, end: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for message in talk.messages[:end]:
        rows.append({"role": message.role, "content": message.content})
        if message.reasoning:
            rows[-1]["reasoning_content"] = rows[-1]["thinking"] = message.reasoning
        if message.tool_calls:
            rows[-1]["tool_calls"] = list(message.tool_calls)
        if message.tool_call_id:
            rows[-1] |= {"tool_call_id": message.tool_call_id, "name": message.name}
    return rows


def own_ids(chat: ChatTokenizer, talk: Talk, end: int, *, prompt: bool) -> list[int]:
    """transformers'."""
    text = chat.tokenizer.apply_chat_template(
        as_rows(chat, talk, end), tools=list(talk.tools) or None, tokenize=False, add_generation_prompt=prompt
    )
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def examples(chat: ChatTokenizer, talk: Talk) -> tuple[Rendered, ...]:
    (found,) = chat.examples([talk])
    assert not isinstance(found, Refused), found.words
    return found


def refused(chat: ChatTokenizer, talk: Talk) -> str:
    (found,) = chat.examples([talk])
    assert isinstance(found, Refused)
    assert "\n" not in found.words
    return found.words


def shown(chat: ChatTokenizer, example: Rendered) -> str:
    """The example, what is trained in brackets."""
    parts = []
    for trained, run in groupby(zip(example.ids, example.mask, strict=True), key=lambda pair: pair[1]):
        text = chat.tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        parts.append(f"⟦{text}⟧" if trained else text)
    return "".join(parts)


@pytest.mark.parametrize(("name", "talk"), TAKEN)
def test_every_answer_is_trained_behind_the_prompt_that_transformers_writes(name: str, talk: str):
    """And behind it stands what transformers adds, if it opens a known answer as it opens a new one."""
    chat, asked = chat_of(name), TALKS[talk]
    last = examples(chat, asked)[-1]
    prompt = own_ids(chat, asked, len(asked.messages) - 1, prompt=True)
    if talk != "signs":  # whose user spells a special token
        assert list(last.ids[: len(prompt)]) == prompt
        assert list(chat.prompt_ids(asked.messages[:-1], asked.tools)) == prompt
        whole = own_ids(chat, asked, len(asked.messages), prompt=False)
        if whole[: len(prompt)] == prompt:
            assert list(last.ids) == whole[: len(last.ids)]
    answers = sum(message.role == "assistant" for message in asked.messages)
    ends = [
        sum(example.mask[at] and example.ids[at] in chat.stop_token_ids for at in range(len(example.ids)))
        for example in examples(chat, asked)
    ]
    assert sum(ends) == answers + (2 if (name, talk) == ("gpt_oss", "thoughts") else 0)
    assert all(chat.lint(example) == [] for example in examples(chat, asked))


HEAD = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_thoughts_that_a_later_turn_takes_out_make_one_example_per_answer():
    """Each as it is served: with its own thoughts, and without those before it."""
    chat = chat_of("qwen3")
    for talk in ("thoughts in content", "thoughts"):
        first, second = examples(chat, TALKS[talk])
        assert shown(chat, first) == HEAD.format("2+2?") + "⟦<think>\ntwo twos\n</think>\n\n4<|im_end|>⟧"
        assert shown(chat, second).startswith(HEAD.format("2+2?") + "4<|im_end|>\n<|im_start|>user\n3")
        assert shown(chat, second).count("⟦") == 1 and shown(chat, second).count("<think>") == 1


def test_without_thoughts_earlier_answers_lose_their_empty_ones_too():
    examples_ = examples(chat_of("qwen3"), TALKS["turns"])
    assert [shown(chat_of("qwen3"), one).count("<think>\n\n</think>") for one in examples_] == [1, 1, 1]


def test_calls_are_trained_and_their_results_are_not():
    """Two examples: once there is a result, the call before it has no empty thoughts any more."""
    chat = chat_of("qwen3")
    call, answer = (shown(chat, one) for one in examples(chat, TALKS["calls"]))
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
    assert (
        call.endswith(f"⟦<think>\n\n</think>\n\n{written}⟧")
        and "Adds <two> numbers." in call.partition("⟦")[0]
    )
    result = "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert answer.endswith(f"{written}\n{result}⟦<think>\n\n</think>\n\n3<|im_end|>⟧")
    (both,) = examples(chat_of("llama31"), TALKS["calls"])
    assert [run.partition("⟧")[0] for run in shown(chat_of("llama31"), both).split("⟦")[1:]] == [
        '{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>',
        "3<|eot_id|>",
    ]


def test_calls_that_an_answer_spells_are_the_tokens_that_the_template_writes():
    """Also those that one call alone leaves open, and that it ends with."""
    tokens = REAL["r1_distill"][1]
    chat = made(R1_DISTILL_ONE_CALL_OPEN, tokens, eos=ENDS["r1_distill"])
    spelled = [token for token in tokens if "▁call" in token or "▁sep" in token]
    (example,) = examples(chat, Talk(messages=(user("?"), said(f"{THOUGHT}{'a'.join(spelled)}"))))
    assert len(spelled) == 5
    assert [example.ids.count(chat.tokenizer.convert_tokens_to_ids(token)) for token in spelled] == [1] * 5


@pytest.mark.parametrize("name", TAKES)
def test_an_answer_left_out_of_training_stands_in_the_text_untrained(name: str):
    chat = chat_of(name)
    if "turns" not in TAKES[name]:
        return
    talk = Talk(messages=(user("a"), said("b", is_trained=False), user("c"), said("d")))
    found = examples(chat, talk)
    assert len(found) == 1
    runs = [part.partition("⟧")[0] for part in shown(chat, found[0]).split("⟦")[1:]]
    assert len(runs) == 1 and "d" in runs[0] and "b" in shown(chat, found[0]).partition("⟦")[0]


def test_a_conversation_without_a_trained_turn_gives_no_example():
    assert examples(chat_of("gemma"), Talk(messages=(user("a"), said("b", is_trained=False)))) == ()


def test_what_follows_the_last_trained_turn_is_left_out():
    chat = chat_of("gemma")
    talk = Talk(messages=(user("a"), said("b"), user("c"), said("d", is_trained=False)))
    assert examples(chat, talk) == examples(chat, Talk(messages=talk.messages[:2]))


def test_pairs_are_what_is_served_behind_one_prompt():
    chat = chat_of("qwen3")
    prompt = Talk(messages=(user("2+2?"), said(THOUGHT), user("3+3?")))
    sides = (said(THOUGHT),), (said("five"),)
    (pair,) = chat.pairs([(prompt, *sides)])
    assert not isinstance(pair, Refused) and pair.prompt == chat.prompt_ids(prompt.messages)
    for side, ids in zip(sides, (pair.chosen, pair.rejected), strict=True):
        assert pair.prompt + ids == chat.render((*prompt.messages, *side)).ids
    twice = (said(THOUGHT), user("?"), said("4"))
    (longer,) = chat.pairs([(Talk(messages=prompt.messages[:1]), twice, (said("five"),))])
    assert not isinstance(longer, Refused)  # what follows changes the side, not the prompt
    assert longer.prompt == chat.prompt_ids(prompt.messages[:1])


def test_prompts_hold_tools_and_earlier_calls_as_they_are_served():
    chat, talk = chat_of("qwen3"), TALKS["calls"]
    assert list(chat.prompt_ids(talk.messages[:3], talk.tools)) == own_ids(chat, talk, 3, prompt=True)
    assert list(chat.prompt_ids(talk.messages[:1], talk.tools)) == own_ids(chat, talk, 1, prompt=True)
    (words,) = made(CHATML, MARKS, eos="<|im_end|>").prompts(
        [Talk(messages=talk.messages[:1], tools=talk.tools)]
    )
    assert isinstance(words, Refused) and "leaves out the row's tools" in words.words


# Forged tokens.


def forged_talk(text: str, answer: str) -> Talk:
    """`text` in all that is not the assistant's, and in what it passes on; `answer` as its own words."""
    tool = {
        "type": "function",
        "function": {"name": "add", "description": text, "parameters": {"x": {"description": text}}},
    }
    call = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": text}}}
    return Talk(
        messages=(
            user(f"a{text}b"),
            said("", tool_calls=(call,)),
            Message(role="tool", content=f"a{text}b", name="add", tool_call_id="call00001"),
            said(f"a{answer}b"),
        ),
        tools=(tool,),
    )


@pytest.mark.parametrize("name", ["qwen3", "qwen3_thinking", "llama31", "mistral", "gpt_oss"])
def test_pin_11_nothing_but_an_answers_own_words_becomes_a_token(name: str):
    """And of those none that opens or ends a turn."""
    chat = chat_of(name)
    added = chat.tokenizer.added_tokens_decoder
    everything = "a".join(token.content for token in added.values())
    around = "a".join(
        token
        for token in REAL[name][1]
        if not token.endswith(NO_FLAG)
        and token != "<|channel|>"
        and token not in ("[TOOL_CALLS]", "<|python_tag|>")
    )
    plain, forged = (
        examples(chat, forged_talk(*texts)) for texts in (("x", "x"), (everything, f"<s>{around}</s>"))
    )
    for one, other in zip(plain, forged, strict=True):
        assert [token for token in one.ids if token in added] == [
            token for token in other.ids if token in added
        ]
    written = shown(chat, forged[-1])
    assert everything in written or everything.replace("/", "\\/") in written


def test_pin_11_a_system_prompt_cannot_forge_a_token_either():
    chat = chat_of("qwen3")
    talk = Talk(messages=(Message(role="system", content="<|im_end|></think>"), user("<think>"), said("4")))
    (example,) = examples(chat, talk)
    ids = {
        token: chat.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<think>", "</think>")
    }
    assert [example.ids.count(one) for one in ids.values()] == [3, 1, 1]  # the template's own


def test_a_template_that_looks_at_a_users_text_sees_it_and_no_token_comes_of_it():
    """As Qwen's: what begins with <tool_response> asks nothing, so the thoughts before it stay."""
    chat = chat_of("qwen3")
    result = user("<tool_response>\n3\n</tool_response>")
    talk = Talk(messages=(user("1+2?"), said("<think>\nadd\n</think>\n\ncall"), result, said("3")))
    text = chat.tokenizer.apply_chat_template(as_rows(chat, talk, 4), tokenize=False)
    assert "add" in text
    (example,) = examples(chat, talk)
    assert shown(chat, example).replace("⟦", "").replace("⟧", "") == text.rstrip("\n")
    assert chat.tokenizer.convert_tokens_to_ids("<tool_response>") not in example.ids


@pytest.mark.parametrize(
    "content",
    ["<think>x</think>y", "a</think>b</think>c", "<think>", "</think>", "<|im_end|><think></think>"],
)
def test_thoughts_in_an_answer_are_the_tokens_that_the_template_writes(content: str):
    chat = chat_of("qwen3")
    talk = Talk(messages=(user("?"), said(content)))
    text = chat.tokenizer.apply_chat_template(as_rows(chat, talk, 2), tokenize=False)
    (example,) = examples(chat, talk)
    assert shown(chat, example).replace("⟦", "").replace("⟧", "") == text.rstrip("\n")
    assert example.ids.count(chat.end_of_turn_id) == 2
    opened = chat.tokenizer.convert_tokens_to_ids("<think>")
    assert example.ids.count(opened) == text.count("<think>")


def test_a_template_that_rebuilds_content_so_that_it_cannot_be_followed_is_refused():
    """Joined with `~`, then looked through: whether it is content can no longer be told."""
    template = CHATML.replace("message['content']", "('' ~ message['content']).replace('<x>', '')")
    chat = made(template, ("<|im_start|>", "<|im_end|>", "<x>"), eos="<|im_end|>")
    assert "cannot be told from what the template writes" in refused(
        chat, Talk(messages=(user("<|im_<x>end|>"), said("a")))
    )
    assert examples(chat, Talk(messages=(user("1 < 2"), said("a"))))


# Templates that leave things out, or that nothing can be trained with.


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        (TALKS["calls"], "leaves out tool_calls of message 1"),
        (Talk(messages=TALKS["plain"].messages, tools=TOOLS), "leaves out the row's tools"),
        (TALKS["thoughts"], "leaves out the assistant's thoughts (reasoning_content)"),
    ],
)
def test_what_a_template_does_not_write_is_refused(talk: Talk, words: str):
    chat = made(CHATML, MARKS, eos="<|im_end|>")
    assert words in refused(chat, talk) and "set model.chat_template" in refused(chat, talk)


def test_what_is_left_out_is_told_of_the_form_that_leaves_out_least():
    """R1's writes calls where there is no content, and never tools."""
    assert "leaves out the row's tools" in refused(chat_of("r1_distill"), TALKS["calls"])


def test_thoughts_are_given_under_the_key_that_the_template_reads():
    """Whatever other keys its text speaks of."""
    template = "{# not '.reasoning_content' #}" + CHATML.replace(
        "message['content']", "(message.thinking ~ '|' if message.thinking else '') + message['content']"
    )
    chat = made(template, MARKS, eos="<|im_end|>")
    (example,) = examples(chat, Talk(messages=TALKS["thoughts"].messages[:2]))
    assert shown(chat, example).endswith("⟦two twos|4<|im_end|>⟧")


def test_content_that_a_template_drops_beside_a_call_is_refused():
    talk = Talk(messages=(user("1+2?"), called("I add.", a=1), RESULT, said("3")), tools=TOOLS)
    assert "leaves out message 1, of role assistant" in refused(chat_of("llama31"), talk)
    assert "I add." in shown(chat_of("qwen3"), examples(chat_of("qwen3"), talk)[0])


def test_arguments_and_empty_content_are_given_in_the_form_that_the_template_writes():
    """R1's takes arguments as text, and writes calls where there is no content."""
    chat = chat_of("r1_distill")
    talk = Talk(messages=(*TALKS["calls"].messages[:2],))
    words = refused(chat, talk)  # its prompts open a block that a call does not close
    assert "ends with <think>" in words and "write it" not in words
    (prompt,) = chat.prompts([Talk(messages=TALKS["calls"].messages[:3])])
    assert '{"a": 1, "b": 2}' in chat.tokenizer.decode(prompt)


def test_a_refusal_is_in_the_templates_own_words():
    system = Talk(messages=(Message(role="system", content="x"), *TALKS["plain"].messages))
    words = refused(chat_of("gemma"), system)
    assert words.startswith("the chat template refuses it: System role not supported; change the row, or")
    two = Talk(messages=(user("?"), said("", tool_calls=2 * called(a=1).tool_calls)), tools=TOOLS)
    assert "single tool-calls at once" in refused(chat_of("llama31"), two)


def test_a_conversation_may_begin_with_the_assistant_where_the_template_writes_a_prompt_of_nothing():
    greeted = Talk(messages=(said("Hi!"), user("2+2?"), said("4")))
    chat = made(CHATML, MARKS, eos="<|im_end|>")
    assert shown(chat, examples(chat, greeted)[0]).startswith("<|im_start|>assistant\n⟦Hi!<|im_end|>⟧")
    needy = "{% if messages[0].role == 'system' %}{% endif %}" + CHATML
    chat = made(needy, MARKS, eos="<|im_end|>")
    assert "begins with the assistant, and the chat template writes no prompt" in refused(chat, greeted)
    untrained = Talk(messages=(said("Hi!", is_trained=False), *greeted.messages[1:]))
    (example,) = examples(chat, untrained)
    assert shown(chat, example).partition("⟦")[2] == "4<|im_end|>⟧"
    assert chat.prompt_ids(greeted.messages[:2]) == example.ids[: example.mask.index(True)]


def test_of_many_only_those_are_refused_that_the_template_refuses():
    system = Talk(messages=(Message(role="system", content="x"), *TALKS["plain"].messages))
    found = list(chat_of("gemma").examples([TALKS["plain"], system] * 200))
    assert [isinstance(one, Refused) for one in found] == [False, True] * 200
    assert len({one for one in found if not isinstance(one, Refused)}) == 1


def test_one_that_ends_the_process_spoils_no_other():
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if messages[0].content == 'loop' %}" + loop + "{% endif %}" + CHATML
    chat = made(template, MARKS, eos="<|im_end|>")
    good, bad = TALKS["plain"], Talk(messages=(user("loop"), said("x")))
    found = list(chat.examples([good, bad, good]))
    assert isinstance(found[1], Refused) and "CPU time" in found[1].words
    assert found[0] == found[2] and not isinstance(found[0], Refused)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            CHATML.partition("{% if add")[0],
            r"writes no generation prompt, so what it writes before every answer \('<\|im_start\|>assist",
        ),
        (
            CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>model\n' }}"),
            "opens a known answer with other text than its generation prompt",
        ),
    ],
)
def test_a_template_that_nothing_can_be_trained_with_is_refused_with_the_fix(template: str, words: str):
    with pytest.raises(ModelError, match=words) as caught:
        made(template, MARKS, eos="<|im_end|>")
    assert "set model.chat_template" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_with_named_templates_only_is_refused_with_their_names():
    tokenizer = chat_of.__wrapped__("gemma").tokenizer
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(ModelError, match=r"only chat templates with names \(rag, tool_use\) and no default"):
        ChatTokenizer(tokenizer)


def test_generation_blocks_are_rendered():
    template = CHATML.replace("message['content'] + '<|im_end|>'", "''").replace(
        "{% endfor %}",
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\n{% endfor %}",
    )
    template = template.replace("'' + '\n' }}", "'' }}")
    chat = made(template, MARKS, eos="<|im_end|>")
    assert shown(chat, examples(chat, TALKS["plain"])[0]).endswith("⟦4<|im_end|>⟧")


def test_the_templates_words_for_tokens_do_not_make_them_marks_of_a_turn():
    """A default system prompt may speak of <think>, as SmolLM3's."""
    template = "{{ '<|im_start|>system\nThink in <think></think>.<|im_end|>\n' }}" + CHATML.replace(
        "message['content']",
        "(message['content'].split('</think>')[-1] if not loop.last else message['content'])",
    )
    chat = made(template, (*MARKS, "<think>", "</think>"), eos="<|im_end|>")
    (example,) = examples(chat, Talk(messages=(user("2+2?"), said(THOUGHT))))
    assert example.ids.count(chat.tokenizer.convert_tokens_to_ids("</think>")) == 2
