"""The frame: what a chat template writes around a plain conversation, found with placeholders for contents.

    user | x | header | opened by the prompt, or lead | answer | tail, with the end-of-turn token

Found once per template. Owns: how answers begin and end, and which tokens an assistant may spell.
Does not own: what real content makes of it (turns).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from stages.data.chat.stand_ins import any_of
from stages.data.chat.templates import Chat, Spellings, Written, render, render_chats
from stages.data.reading.records import Role
from stages.errors import ModelError

CONVERSATIONS: tuple[tuple[Role, ...], ...] = (
    ("user", "assistant", "user"),
    ("system", "user"),
    ("user", "assistant", "tool"),
)
"""In which every role occurs that a message may have."""
OPENING = re.compile(r"<\w+>\s*$")
CLOSED = re.compile(r"</[^<>]*>\s*$")
EMPTY_BLOCK = re.compile(r"<(\w+)>\s*</\1>\s*$")
_HALF = re.compile(r"(.*[▁_])(begin|start|end)(\W*)")
_OTHER_HALVES = {"begin": ("end",), "start": ("end",), "end": ("begin", "start")}
_PAD = "\x0c"  # white space that no template writes: where it is gone, the template trimmed the content
_PLACEHOLDER = re.compile(rf"({_PAD}?)zqContent([0-9]{{1,9}})Xqz({_PAD}?)")


def placeholder(index: int) -> str:
    """Stands for a message's content. Letters and digits: survives escaping and JSON filters."""
    return f"{_PAD}zqContent{index}Xqz{_PAD}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a rendered conversation: template text, or the place of a message's content."""

    text: str = ""
    message: int | None = None  # index of the message whose content stands here
    trim_left: bool = False
    trim_right: bool = False

    @property
    def shown(self) -> str:
        """Its text, content under the placeholder's name."""
        return self.text if self.message is None else placeholder(self.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A Jinja source, and what it sees beside messages and tools: the tokenizer's special tokens."""

    source: str
    variables: Mapping[str, Any]

    def pieces(self, roles: Sequence[str], *, is_prompt: bool) -> list[Piece]:
        """What it writes of messages of these roles, cut at their contents. Raises ModelError."""
        variables = {
            "messages": [{"role": role, "content": placeholder(index)} for index, role in enumerate(roles)],
            "tools": None,
            "add_generation_prompt": is_prompt,
            **self.variables,
        }
        try:
            text = render(self.source, variables)
        except ModelError as error:
            raise ModelError(f"the chat template fails on the roles {_in_short(roles)}: {error}") from error
        pieces = list(_pieces(text, len(roles)))
        left_out = set(range(len(roles))) - {piece.message for piece in pieces}
        if left_out:
            raise ModelError(
                f"the chat template leaves out message {min(left_out)}, of role {roles[min(left_out)]}"
            )
        return pieces

    def written(self, chats: Sequence[Chat], spellings: Spellings) -> list[Any]:
        """What it writes of each: Written or Refused."""
        return render_chats(self.source, self.variables, chats, spellings)


def _pieces(text: str, num_messages: int) -> Iterator[Piece]:
    at = 0
    for found in _PLACEHOLDER.finditer(text):
        left, digits, right = found.groups()
        index = int(digits)
        if index >= num_messages:  # no placeholder: the template's own text
            continue
        if at < found.start():
            yield Piece(text=text[at : found.start()])
        yield Piece(message=index, trim_left=not left, trim_right=not right)
        at = found.end()
    if at < len(text):
        yield Piece(text=text[at:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """How answers begin and end where nothing special is said."""

    end: str  # the end-of-turn token: the first added token behind an answer
    end_id: int
    tail: str  # between an answer and whatever follows it, `end` included
    lead: str  # between the end of a prompt and an answer (Llama 2: a space)
    opened: str  # what a prompt ends with and the header of a known answer does not (`<think>`)
    block: frozenset[str]  # both tags of what a prompt opens, or the template leaves empty before an answer
    trims_left: bool  # white space that an answer begins with is left out
    trims_right: bool

    @property
    def opens_a_block(self) -> bool:
        """Whether what a prompt ends with is still to be closed by the answer."""
        return bool(self.opened.strip()) and not CLOSED.search(self.opened)


def find_frame(template: Template, added: Mapping[str, int]) -> Frame:
    """`added`: text -> id of the tokenizer's added tokens. Raises ModelError for a template that cannot be
    trained with.
    """
    answered = template.pieces(("user", "assistant"), is_prompt=False)
    at = max(index for index, piece in enumerate(answered) if piece.message == 1)
    behind = _shown(answered[at + 1 :])
    found = any_of(added).search(behind)
    if found is None or behind[: found.start()].strip():
        raise ModelError(
            "the chat template writes no end-of-turn token after the assistant; set model.chat_template"
        )
    before, prompt = _shown(answered[:at]), _shown(template.pieces(("user",), is_prompt=True))
    if not before.startswith(prompt):
        before = _header(before, prompt)
    lead = before[len(prompt) :]
    if lead.strip() and prompt == _shown(template.pieces(("user",), is_prompt=False)):
        raise ModelError(
            f"the chat template writes no generation prompt, so what it writes before every answer "
            f"({lead!r}) would be trained as part of it; set model.chat_template to a copy that ends with "
            f"{{% if add_generation_prompt %}}{{{{ {lead!r} }}}}{{% endif %}}"
        )
    opened = prompt[len(before) :]
    return Frame(
        end=found[0],
        end_id=added[found[0]],
        tail=behind[: found.end()],
        lead=lead,
        opened=opened,
        block=_block(opened, prompt + lead),
        trims_left=answered[at].trim_left,
        trims_right=answered[at].trim_right,
    )


def _block(opened: str, before_answer: str) -> frozenset[str]:
    """Both tags of the block that an answer begins in, or behind (`<think></think>`).

    A header that is a tag (`<assistant>`) is none: it is neither opened by the prompt alone nor closed.
    """
    found = OPENING.search(opened) or EMPTY_BLOCK.search(before_answer)
    if found is None:
        return frozenset()
    tag = found[0].partition(">")[0] + ">"
    return frozenset({tag, other_tag(tag)})


def _header(before: str, prompt: str) -> str:
    """What an answer and its prompt both begin with, where the prompt goes on with an opening (`<think>`).
    A known answer may have the same, with no thoughts in it. Raises ModelError.
    """
    if prompt.startswith(before):
        return before
    signs = enumerate(zip(before, prompt, strict=False))
    shared = prompt[: next((at for at, (one, other) in signs if one != other), len(before))]
    tag = OPENING.search(shared)
    if tag is None or prompt[len(shared) :].strip():
        raise ModelError(
            "the chat template opens a known answer with other text than its generation prompt; set "
            "model.chat_template to one that does not"
        )
    return shared[: tag.start()]


def spelled_inside(
    template: Template, frame: Frame, added: Mapping[str, int], meant: frozenset[int]
) -> frozenset[str]:
    """The added tokens that the template itself writes or strips inside an assistant's turn: `<think>`.

    `meant`: ids that no content may become: BOS, EOS, padding, stop tokens. Nor may what stands around the
    contents of a plain conversation, or around a tool's answer, but for the frame's block.
    """
    possible = {
        text
        for text, index in added.items()
        if index not in meant
        and text.strip()
        and any(one in template.source for one in (text, *_partners(text)))
    }
    if not possible:
        return frozenset()
    spelled = any_of(possible)
    calls = list(_calls(template, frame))
    around = {*spelled.findall(_around_contents(template, frame))} - frame.block
    possible -= around | {_end_of_call(text, spelled) for text in calls}
    written = frame.block | set(spelled.findall("\0".join([frame.lead, frame.opened, *calls])))
    inside = {text for text in possible if text in written or _is_stripped(template, text)}
    return frozenset(inside | {text for text in possible if not inside.isdisjoint(_partners(text))})


def other_tag(text: str) -> str:
    """`</x>` of `<x>`, and the other way round."""
    if text[:2] in ("</", "[/"):
        return text[0] + text[2:]
    return f"{text[0]}/{text[1:]}" if text[:1] in ("<", "[") else "\0"


def _partners(token: str) -> set[str]:
    """What may open or close a block together with it: `</x>` with `<x>`, `<x_end>` with `<x_start>`."""
    partners = {other_tag(token)}
    if half := _HALF.fullmatch(token):
        start, which, signs = half.groups()
        partners |= {f"{start}{other}{signs}" for other in _OTHER_HALVES[which]}
    return partners


def _end_of_call(text: str, spelled: re.Pattern[str]) -> str:
    """The token that a turn with calls ends with in place of the end-of-turn token, or nothing.

    One that closes what the turn has opened ends no more than that.
    """
    found: list[str] = spelled.findall(text)
    if not found or not text.rstrip().endswith(found[-1]):
        return ""
    return found[-1] if _partners(found[-1]).isdisjoint(found) else ""


def _around_contents(template: Template, frame: Frame) -> str:
    """What the template writes between contents and outside of assistants' answers, in conversations without
    tools. What stands before all of them may speak of tokens (`use <think> for thoughts`).
    """
    texts: list[str] = []
    for roles in CONVERSATIONS:
        with suppress(ModelError):  # no template takes all roles
            pieces = template.pieces(roles, is_prompt=True)
            answers = [index for index, piece in enumerate(pieces) if _is_answer(piece, roles)]
            for index, piece in enumerate(pieces[1:], start=1):
                text = piece.text
                if index + 1 in answers:
                    text = text.removesuffix(frame.lead)
                if index - 1 in answers:
                    text = text.removeprefix(frame.tail)
                if index == len(pieces) - 1:
                    text = text.removesuffix(frame.opened)
                texts.append(text)
    return "\0".join([*texts, frame.tail])


def _is_answer(piece: Piece, roles: Sequence[str]) -> bool:
    return piece.message is not None and roles[piece.message] == "assistant"


def _calls(template: Template, frame: Frame) -> Iterator[str]:
    """What the template writes in a turn with one call, or two, and in one with thoughts of its own."""
    question = {"role": "user", "content": "x"}
    function = {"name": "x", "arguments": {"x": "x"}}
    tool = {"type": "function", "function": {"name": "x", "description": "x", "parameters": {}}}
    call = {"type": "function", "id": "x" * 9, "function": function}
    as_text = {**call, "function": {**function, "arguments": "{}"}}
    answers: list[dict[str, Any]] = [
        {"content": content, "tool_calls": [one] * number}
        for number in (1, 2)
        for content in ("", None)
        for one in (call, as_text)
    ]
    answers.append({"content": "x", "reasoning_content": "x", "reasoning": "x", "thinking": "x"})
    chats = [
        Chat(
            messages=[question, {"role": "assistant", **answer}],
            tools=[tool] if "tool_calls" in answer else None,
            cuts=[(1, True), (2, False)],
        )
        for answer in answers
    ]
    for written in template.written(chats, Spellings(signs="")):
        if isinstance(written, Written):
            prompt, whole = written.texts
            header = prompt.removesuffix(frame.opened)
            if whole.startswith(header):
                yield whole[len(header) :]


def _is_stripped(template: Template, token: str) -> bool:
    """Whether an answer that holds the token is not written as it is, at once or once more turns follow."""
    content, question = f"zqBefore{token}zqBehind", {"role": "user", "content": "x"}
    messages = [question, {"role": "assistant", "content": content}, question]
    chat = Chat(messages=messages, tools=None, cuts=[(2, False), (3, True)])
    (written,) = template.written([chat], Spellings(signs=""))
    return isinstance(written, Written) and any(content not in text for text in written.texts)


def _shown(pieces: Sequence[Piece]) -> str:
    return "".join(piece.shown for piece in pieces)


def _in_short(roles: Sequence[str]) -> str:
    return ", ".join(roles[:8]) + (f" and {len(roles) - 8} more" if len(roles) > 8 else "")
