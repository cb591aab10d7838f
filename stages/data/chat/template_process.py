"""The process that runs chat templates: a program out of a model directory, and so somebody else's.

    stdin: one JSON request per line --> sandboxed jinja2 under limits --> stdout: one JSON answer per line

Owns: the environment that templates know, as transformers defines it but without a clock or chance, and the
limits. Ends by itself when nobody asks, or when whoever asked is gone. `templates` starts it, with an empty
environment. Imports jinja2, the standard library and stand_ins only.
"""

import json
import math
import random
import resource
import select
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import new_context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stages.data.chat.stand_ins import (
    NOTHING,
    StandIns,
    any_of,
    holds_any,
    holds_content,
    masked_messages,
    with_content,
)

MAX_MEMORY_BYTES = 512 * 2**20
MAX_CPU_S = 2
"""Of one rendering; a real template takes a thousandth of it."""
MAX_TEXT_CHARS = 2**20
MAX_GROWTH = 8
"""A longer text may be as many times as long as all that the template is given."""
MAX_ERROR_CHARS = 300
IDLE_S = 1.0
NO_TEXT = "\0"
"""Of no messages, where the template needs one."""
ENTANGLED = (
    "it looks for signs of special tokens in a message in a way that cannot be followed, so what the message "
    "spells cannot be told from what the template writes; take the tokens out of the message"
)
TODAY = datetime(2024, 7, 26)
"""What `strftime_now` tells on every day: the same inputs are the same tokens. It is the date that Llama 3's
templates write where there is no clock.
"""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, transformers' mark of assistant text: marks nothing here."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


def serve() -> None:
    """Answer requests until there are none for IDLE_S."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while select.select([sys.stdin], [], [], IDLE_S)[0] and (line := sys.stdin.readline()):
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """{"text": ...} of `variables`, or {"chats": [...]} of as many; {"error": ...} where one raises."""
    if "chats" not in request:
        return _guarded(lambda: {"text": _text(request["template"], request["variables"])})
    return {"chats": [_guarded(partial(_chat, request, chat)) for chat in request["chats"]]}


def _chat(request: Mapping[str, Any], chat: Mapping[str, Any]) -> dict[str, Any]:
    """{"texts": ..., "plain": ...}: one text per cut, content with the stand-ins of `plain` where it could
    spell a special token. A text that the last one begins with is given as its length; of no message at all
    it may be NO_TEXT.
    """
    messages, tools = chat["messages"], chat["tools"]

    def text(messages: list[dict[str, Any]], tools: Any, is_prompt: bool) -> str:
        variables = {"messages": messages, "tools": tools, "add_generation_prompt": is_prompt}
        return _text(request["template"], request["variables"] | variables)

    def texts(messages: list[dict[str, Any]], tools: Any) -> list[str]:
        return [
            text(messages[:end], tools, is_prompt) if end else of_nothing(tools)
            for end, is_prompt in chat["cuts"]
        ]

    def of_nothing(tools: Any) -> str:
        written = _guarded(lambda: {"text": text([], tools, True)})
        return str(written["text"]) if "text" in written else NO_TEXT

    found, plain = texts(messages, tools), {}
    if holds_any([messages, tools], request["signs"]):
        stand_ins = StandIns(request["signs"], json.dumps([messages, tools], ensure_ascii=False))
        hidden = masked_messages(messages, stand_ins.plain, any_of(request["inside"]))
        hidden_tools = with_content(tools, stand_ins.plain, NOTHING)
        if holds_content([hidden, hidden_tools]):
            real, found, plain = found, texts(hidden, hidden_tools), stand_ins.plain
            if [stand_ins.real(one) for one in found] != real:
                raise jinja2.TemplateError(ENTANGLED)
    last = found[-1]
    return {
        "texts": [len(one) if last.startswith(one) else one for one in found[:-1]] + [last],
        "plain": plain,
    }


def _guarded(write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `write` returns, or {"error": ...}: a template is a program, and may raise anything. "refused" is
    there where these are the template's own words, or those for whoever wrote the messages.
    """
    try:
        return write()
    except MemoryError:
        return {"error": f"it takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # the one boundary to code that is not ours
        if type(error) is jinja2.TemplateError:
            return {
                "error": f"TemplateError: {error}"[:MAX_ERROR_CHARS],
                "refused": str(error)[:MAX_ERROR_CHARS],
            }
        return {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]}


def _text(template: str, variables: Mapping[str, Any]) -> str:
    """One rendering, within its share of CPU time."""
    allowed = math.ceil(time.process_time()) + MAX_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))  # SIGXCPU ends the process
    if "random" in template or "lipsum" in template:
        random.seed(0)  # what jinja draws by
    text = _renderer(template)(**variables)
    text.encode()  # half of a surrogate pair is no text
    if len(text) > MAX_TEXT_CHARS and len(text) > MAX_GROWTH * _num_chars(variables):
        raise ValueError(f"it writes {len(text)} characters")
    return text


def _num_chars(value: Any) -> int:
    """Of all texts in a JSON value."""
    if isinstance(value, dict):
        return sum(map(_num_chars, value.values()))
    if isinstance(value, list):
        return sum(map(_num_chars, value))
    return len(value) if isinstance(value, str) else 0


@lru_cache(maxsize=8)
def _renderer(template: str) -> Callable[..., str]:
    """As transformers compiles chat templates (transformers.utils.chat_template_utils, 5.19)."""
    template.encode()  # half of a surrogate pair is no source
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    compiled = environment.from_string(template)
    known = dict(compiled.globals)

    def render(**variables: Any) -> str:
        """As `Template.render`, which looks all globals up again each time: half of its time."""
        context = new_context(
            environment, None, compiled.blocks, {**known, **variables}, shared=True, globals=known
        )
        return "".join(compiled.root_render_func(context))

    return render


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML of jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    serve()
