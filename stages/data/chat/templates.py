"""Rendering chat templates at a distance: a template may loop for ever or ask for all the memory there is.

    template, conversations --JSON line--> template_process (limits, no secrets) --JSON line--> texts

Owns: that process's life: started when needed, gone a second after the last request or with this process.
Does not own: what a template may do there (template_process), what its text means (chat).
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.ground.errors import EnvironmentProblem
from stages.data.chat.template_process import MAX_CPU_S
from stages.errors import ModelError

MODULE = "stages.data.chat.template_process"
"""Never imported for its work: it runs as a program of its own."""
ANSWER_TIMEOUT_S = 300.0
"""Wall-clock; what ends a template that runs on is its process's limit of CPU time."""
INHERITED = ("PYTHONHOME", "LD_LIBRARY_PATH")
"""All that the process gets of our environment: what Python itself may need to start."""
NUM_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation to render, and which beginnings of it."""

    messages: Sequence[Mapping[str, Any]]  # as the template takes them; plain JSON types
    tools: Sequence[Mapping[str, Any]] | None
    cuts: Sequence[tuple[int, bool]]  # (number of messages, with a generation prompt?) of each text, in order

    @property
    def num_chars(self) -> int:
        """Of its content: about what it costs to send."""
        return sum(len(message["content"] or "") for message in self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a template wrote."""

    texts: tuple[str, ...]  # one per cut; stand-ins for what of content could spell a special token
    plain: Mapping[int, int]  # stand-in -> sign, for `str.translate`


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Why there is no text: words for one line about the row."""

    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spellings:
    """How special tokens are spelled: what of content is hidden from whoever reads the template's text."""

    signs: str  # each of them begins with one of these signs, and ends with one
    inside: tuple[str, ...] = ()  # tokens that the assistant may spell


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that the Jinja source `template` makes of `variables` (plain JSON types).

    Raises ModelError, without the template's name, when the template fails or exceeds the limits.
    """
    answer = _renderer.ask({"template": template, "variables": variables})
    if "error" in answer:
        raise ModelError(answer["error"])
    text: str = answer["text"]
    return text


def render_chats(
    template: str, variables: Mapping[str, Any], chats: Sequence[Chat], spellings: Spellings
) -> list[Written | Refused]:
    """What the template makes of each conversation, in one exchange with its process.

    `variables`: what it sees besides messages, tools and add_generation_prompt. One that ends the process
    spoils no other: they are asked for one by one then.
    """
    request = {
        "template": template,
        "variables": variables,
        "signs": spellings.signs,
        "inside": spellings.inside,
        "chats": [{"messages": chat.messages, "tools": chat.tools, "cuts": chat.cuts} for chat in chats],
    }
    try:
        answers = _renderer.ask(request)["chats"]
    except ModelError as error:
        if len(chats) == 1:
            return [Refused(words=str(error))]
        return [one for chat in chats for one in render_chats(template, variables, [chat], spellings)]
    return [_read(answer) for answer in answers]


def _read(answer: Mapping[str, Any]) -> Written | Refused:
    if "error" in answer:
        return Refused(words=answer.get("refused") or answer["error"])
    last = answer["texts"][-1]
    return Written(
        texts=tuple(last[:text] if isinstance(text, int) else text for text in answer["texts"]),
        plain={int(one): sign for one, sign in answer["plain"].items()},
    )


class _Renderer:
    """The one template process of this process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer. A process that ended by itself, being idle, is replaced."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            for _ in range(NUM_ATTEMPTS):
                process = self._running()
                if answered := _exchange(process, line):
                    answer: dict[str, Any] = json.loads(answered)
                    return answer
                self._process = None
                if process.wait():
                    raise ModelError(_why_ended(process.returncode))
        raise EnvironmentProblem("the process that renders chat templates does not stay; see `rlhf doctor`")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            environment = {key: os.environ[key] for key in INHERITED if key in os.environ}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        return self._process


def _exchange(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """The answer to a request; empty when the process ended instead."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    if not select.select([process.stdout], [], [], ANSWER_TIMEOUT_S)[0]:
        process.kill()
        process.wait()
        raise EnvironmentProblem(f"a chat template was not rendered within {ANSWER_TIMEOUT_S:g} s")
    return process.stdout.readline()


def _why_ended(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"it takes more than {MAX_CPU_S} s of CPU time; is there a loop without end in it?"
    return f"the process that rendered it ended with code {code}; it may need more memory than it gets"


_renderer = _Renderer()
