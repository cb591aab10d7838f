"""The process that runs chat templates: a program out of a model directory, and so somebody else's.

    stdin: one JSON request per line --> sandboxed jinja2 under limits --> stdout: one JSON answer per line

Owns: the environment that templates know, as transformers defines it but without a clock or chance, and the
limits. Ends by itself when nobody asks, or when whoever asked is gone. `templates` starts it, with an empty
environment. Imports jinja2 and the standard library only.
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
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 512 * 2**20
MAX_CPU_S = 2
"""Of one rendering; a real template takes a thousandth of it."""
MAX_TEXT_CHARS = 2**20
MAX_ERROR_CHARS = 300
IDLE_S = 1.0
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
        allowed = math.ceil(time.process_time()) + MAX_CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))  # SIGXCPU ends the process
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    """{"text": ...}, or {"error": ...} when the template raises: it is a program, and may raise anything."""
    random.seed(0)  # of jinja's filter `random`
    try:
        text = _renderer(request["template"])(**request["variables"])
        (request["template"] + text).encode()  # half of a surrogate pair is no text
    except MemoryError:
        return {"error": f"it takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # the one boundary to code that is not ours
        return {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]}
    if len(text) > MAX_TEXT_CHARS:
        return {"error": f"it writes {len(text)} characters"}
    return {"text": text}


@lru_cache(maxsize=8)
def _renderer(template: str) -> Callable[..., str]:
    """As transformers compiles chat templates (transformers.utils.chat_template_utils, 5.19)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(template).render


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
