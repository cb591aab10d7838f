"""Messages as a chat template takes them, and whether it writes all that they hold.

Templates differ in what they read: thoughts under one key or another, a call's arguments as an object or as
JSON text, no content or an empty one beside calls. Of every shape of conversation (roles, calls, thoughts)
that turns up, a rendering with words of its own for every text shows which way nothing is left out. Owns:
that choice. Does not own: tokens.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.data.chat.frame import Template
from stages.data.chat.templates import Chat, Refused, Spellings
from stages.data.reading.records import Message

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """Messages, and the tools that their assistant may call."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()

    @property
    def answers(self) -> list[int]:
        """Where the assistant speaks: indices of messages."""
        return [index for index, message in enumerate(self.messages) if message.role == "assistant"]

    @property
    def is_answered(self) -> bool:
        """Whether the assistant has the last word."""
        return bool(self.messages) and self.messages[-1].role == "assistant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How thoughts and calls are given to a template."""

    reasoning_key: str = ""
    arguments_as_text: bool = False
    no_content_is_null: bool = False  # beside calls; else it is empty


FORMS = (
    Form(),
    Form(arguments_as_text=True),
    Form(no_content_is_null=True),
    Form(arguments_as_text=True, no_content_is_null=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What a rendering with placeholders has shown of a shape."""

    form: Form
    problem: str = ""  # the first thing that is left out
    num_problems: int = 0


class Forms:
    """The messages of conversations for one template."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._keys = [key for key in REASONING_KEYS if re.search(rf"[.'\"]{key}\b", template.source)]
        self._known: dict[Any, _Known] = {}

    def of(self, talk: Talk, cuts: Sequence[tuple[int, bool]]) -> Chat | Refused:
        """The conversation as the template takes it, or what it would leave out. `cuts`: see Chat."""
        if not self._keys and any(message.reasoning for message in talk.messages):
            return Refused(words=self._no_thoughts())
        shape = _shape(talk)
        if shape not in self._known:
            self._known[shape] = self._look(talk)
        known = self._known[shape]
        return (
            Refused(words=_left_out(known.problem)) if known.problem else self._chat(talk, known.form, cuts)
        )

    def _no_thoughts(self) -> str:
        """Words for thoughts where the template reads none of their keys."""
        what = "the assistant's thoughts (reasoning_content)"
        if "</think>" in self._template.source:  # in content it knows them
            return _left_out(what, "write it into content as <think>…</think>… ahead of the answer")
        return _left_out(what)

    def _look(self, talk: Talk) -> _Known:
        """Try the forms on a copy of the conversation in which every text is a word of its own; of those, the
        first that leaves out least.
        """
        has_calls = any(message.tool_calls for message in talk.messages)
        has_thoughts = any(message.reasoning for message in talk.messages)
        forms = [
            replace(form, reasoning_key=key)
            for key in (self._keys if has_thoughts else [""])
            for form in (FORMS if has_calls else FORMS[:1])
        ]
        tried = [self._try(talk, form) for form in forms]
        looked = [known for known in tried if known is not None]
        return min(looked, key=lambda known: known.num_problems, default=_Known(form=Form()))

    def _try(self, talk: Talk, form: Form) -> _Known | None:
        """None where the template refuses the copy, which says nothing of the conversation itself."""
        words = _Words()
        copy, parts = _in_words(talk, words)
        cuts = [(index + 1, False) for index in copy.answers]
        asked = (len(copy.messages) - copy.is_answered, True)  # what the last answer is given
        (written,) = self._template.written([self._chat(copy, form, [*cuts, asked])], Spellings(signs=""))
        if isinstance(written, Refused):
            return None
        of_message = dict(zip(copy.answers, written.texts, strict=False))
        missing = [
            what for what, index, word in parts if word not in of_message.get(index, written.texts[-1])
        ]
        return _Known(form=form, problem=missing[0] if missing else "", num_problems=len(missing))

    def _chat(self, talk: Talk, form: Form, cuts: Sequence[tuple[int, bool]]) -> Chat:
        return Chat(
            messages=[self._message(message, form) for message in talk.messages],
            tools=list(talk.tools) or None,
            cuts=cuts,
        )

    def _message(self, message: Message, form: Form) -> dict[str, Any]:
        made: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            made[form.reasoning_key] = message.reasoning
        if message.tool_calls:
            made["tool_calls"] = [_call(call, form) for call in message.tool_calls]
            if form.no_content_is_null and not message.content:
                made["content"] = None
        named = {"tool_call_id": message.tool_call_id, "name": message.name}
        return made | {key: value for key, value in named.items() if value is not None}


def _call(call: Mapping[str, Any], form: Form) -> dict[str, Any]:
    function = call["function"]
    if form.arguments_as_text and not isinstance(function["arguments"], str):
        function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": function}


def _shape(talk: Talk) -> Any:
    """What decides how a template goes about a conversation, whatever its words are."""
    return (
        len(talk.tools),
        tuple(
            message.role
            if message.reasoning is None and not message.tool_calls
            else (message.role, bool(message.content), bool(message.reasoning), len(message.tool_calls))
            for message in talk.messages
        ),
    )


class _Words:
    """Words that no template writes."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, _: str = "") -> str:
        self._number += 1
        return f"zqWord{self._number}Xqz"


Part = tuple[str, int, str]
"""(what it is, index of its message, its word)."""


def _in_words(talk: Talk, words: _Words) -> tuple[Talk, list[Part]]:
    """A copy with a word for every text that has to show, and those words."""
    parts: list[Part] = []

    def word(what: str, index: int) -> str:
        parts.append((what, index, words()))
        return parts[-1][2]

    def call(call: Mapping[str, Any], index: int) -> dict[str, Any]:
        what = f"tool_calls of message {index}"
        arguments = {word(what, index): word(what, index)}
        return {**call, "function": {**call["function"], "name": word(what, index), "arguments": arguments}}

    messages = [
        Message(
            role=message.role,
            content=word(f"message {index}, of role {message.role}", index)
            if message.content or not message.tool_calls
            else "",
            reasoning=word(f"the thoughts of message {index}", index) if message.reasoning else None,
            tool_calls=tuple(call(one, index) for one in message.tool_calls),
            tool_call_id=message.tool_call_id,
            name=message.name,
        )
        for index, message in enumerate(talk.messages)
    ]
    tools = [
        {**tool, "function": {**tool["function"], "name": word("the row's tools", -1)}} for tool in talk.tools
    ]
    return Talk(messages=messages, tools=tools), parts


def _left_out(what: str, instead: str = "take it out of the row") -> str:
    return f"the chat template leaves out {what}; set model.chat_template to one that writes it, or {instead}"
