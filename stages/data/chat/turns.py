"""Turns: where an assistant's answers stand in what a template wrote of a conversation.

    texts of messages[:i] with a generation prompt, and of messages[: i + 1] --> prompt | answer of turn i
    all turns --> one text to train on, or one per turn where a later turn changes an earlier one

An answer is what the template adds to its prompt, up to the end-of-turn token: what the model has to produce
when it is served. Texts hold stand-ins for signs of content (`stages.data.chat.stand_ins`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.data.chat.frame import EMPTY_BLOCK, Frame, other_tag
from stages.data.chat.messages import Talk
from stages.data.chat.stand_ins import NOTHING, Content, masked
from stages.data.chat.template_process import NO_TEXT
from stages.data.chat.templates import Written
from stages.data.reading.records import Message


class Unfit(Exception):
    """Words for one line: why an answer cannot be trained as it would be served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One answer, as it is asked for."""

    message: int  # its index
    prompt: str  # what the model is given
    answer: str  # what follows it, up to the end-of-turn token
    is_trained: bool

    @property
    def whole(self) -> str:
        """A conversation that ends here."""
        return self.prompt + self.answer

    def stands_in(self, text: str) -> bool:
        """Whether the text begins with this turn and all before it, unchanged."""
        return text.startswith(self.prompt) and text.startswith(self.answer, len(self.prompt))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelled:
    """Which special tokens mean what in a template's text."""

    all: re.Pattern[str]
    inside: re.Pattern[str]  # those that an answer may spell
    ends: tuple[str, ...]  # those that may end one, the frame's end among them


Stretch = tuple[bool, str]
"""(is it trained?, text)."""


def cuts_of(talk: Talk) -> list[tuple[int, bool]]:
    """The texts that `turns_of` needs: of every answer its prompt, and the answered conversation."""
    return [cut for index in talk.answers for cut in ((index, True), (index + 1, False))]


def turns_of(talk: Talk, written: Written, frame: Frame, spelled: Spelled, *, since: int) -> list[Turn]:
    """The answers.

    Raises Unfit where one of the messages from `since` on cannot be trained and is to be. Those before
    them may be written in any way.
    """
    found: list[Turn] = []
    for at, index in enumerate(talk.answers):
        prompt, whole = written.texts[2 * at : 2 * at + 2]
        message = talk.messages[index]
        try:
            if prompt == NO_TEXT:
                raise Unfit(
                    "the conversation begins with the assistant, and the chat template writes no prompt "
                    "without messages; begin it with a user's or a system message"
                )
            behind = (
                whole[len(prompt) :]
                if whole.startswith(prompt)
                else _behind_other_prompt(talk, index, prompt, whole, written.plain, frame, spelled)
            )
            answer = _ended(frame, spelled, behind)
        except Unfit:
            if index >= since and message.is_trained:
                raise
        else:
            found.append(Turn(message=index, prompt=prompt, answer=answer, is_trained=message.is_trained))
    return found


def examples_of(turns: Sequence[Turn]) -> list[list[Stretch]]:
    """What to train on: stretches of the conversation up to its last trained answer, or of each of them as it
    was asked for, where that text would show another one than the model is served.
    """
    trained = [turn for turn in turns if turn.is_trained]
    if not trained:
        return []
    whole = trained[-1].whole
    if all(turn.stands_in(whole) for turn in trained):
        return [stretches(whole, [turn for turn in turns if turn.message <= trained[-1].message])]
    return [
        [*stretches(turn.prompt, _before(turns, turn), is_prompt=True), (True, turn.answer)]
        for turn in trained
    ]


def _before(turns: Sequence[Turn], last: Turn) -> list[Turn]:
    return [turn for turn in turns if turn.message < last.message]


def stretches(text: str, turns: Sequence[Turn], *, is_prompt: bool = False) -> list[Stretch]:
    """The text cut around the answers in it: each begins with a token of its own."""
    cut: list[Stretch] = []
    at = 0
    for turn in turns:
        if len(turn.prompt) >= at and turn.stands_in(text):
            cut += [
                (False, text[at : len(turn.prompt)]),
                (turn.is_trained and not is_prompt, turn.answer),
            ]
            at = len(turn.prompt) + len(turn.answer)
    return [stretch for stretch in [*cut, (False, text[at:])] if stretch[1]]


def _behind_other_prompt(
    talk: Talk,
    index: int,
    prompt: str,
    whole: str,
    plain: Mapping[int, int],
    frame: Frame,
    spelled: Spelled,
) -> str:
    """What stands behind the prompt of message `index` where the template's `whole` does not begin with it.

    Raises Unfit.
    """

    def hidden(message: Message) -> Content:
        inside = spelled.inside if message.role == "assistant" else NOTHING
        return Content(masked(message.content, plain, inside), message.content)

    header = prompt.removesuffix(frame.opened)
    if frame.opened and len(header) < len(prompt) and whole.startswith(header):
        rest = Content(whole[len(header) :], whole[len(header) :].translate(plain))
        return "".join([_behind_opening(frame, rest, hidden(talk.messages[index]))])  # a plain text again
    content = "".join([hidden(talk.messages[index - 1]).strip()]) if index else ""
    start = prompt.rfind(content) if content else -1
    closed = prompt[start:] if start >= 0 else ""  # the last message, and what follows it
    at = whole.rfind(closed)
    if at < 0 or not spelled.all.search(closed):
        raise Unfit(_why_other(prompt, whole, plain))
    return whole[at + len(closed) :]  # earlier messages are written otherwise (Mistral: the system's)


def _why_other(prompt: str, whole: str, plain: Mapping[int, int]) -> str:
    """Words for a prompt that the template writes differently once it is answered."""
    empty = EMPTY_BLOCK.search(prompt)
    if empty is not None and whole.startswith(header := prompt[: empty.start()]):
        tag = empty[1]
        if re.match(rf"<{tag}>\s*(?!\s|</{tag}>)", whole[len(header) :].translate(plain)):
            return (
                f"the chat template's generation prompt closes its thoughts already (<{tag}></{tag}>), and "
                "this answer has thoughts of its own; set model.chat_template to one whose prompts leave "
                "them open, or take them out of the row"
            )
    return (
        "the chat template writes a prompt differently once it is answered; set model.chat_template to one "
        "that does not"
    )


def _behind_opening(frame: Frame, rest: Content, content: Content) -> Content:
    """The answer behind what its prompt opens, where the template does not open it so itself. `rest`: what it
    writes behind the header. Raises Unfit.
    """
    if not frame.opens_a_block:
        return rest
    opening = frame.opened.strip()
    if rest.startswith(opening):
        return _behind(frame, rest)
    closing = other_tag(opening)
    thoughts, closed, said = content.rpartition(closing)
    goes_on = opening not in content  # as a server returns it: what the model wrote behind its prompt
    if closed and goes_on and rest.lstrip().startswith(content.strip()):
        return rest
    if (
        closed
        and (goes_on or thoughts.lstrip().startswith(opening))
        and rest.lstrip().startswith(said.strip())
    ):
        space = "" if rest[:1].isspace() else said[: len(said) - len(said.lstrip())]
        known = thoughts + closed  # which the template leaves out
        return (known if goes_on else _behind(frame, known)) + space + rest
    write = f"write it as {opening}…{closing}…, or " if content.strip() else ""  # calls alone: cannot be
    raise Unfit(
        f"the chat template's generation prompt ends with {opening}, and this answer does not begin with it; "
        f"{write}set model.chat_template to one whose prompts end before it"
    )


def _behind(frame: Frame, answer: Content) -> Content:
    """The answer without the opening that its prompt ends with already."""
    if answer.startswith(frame.opened):
        return answer[len(frame.opened) :]
    rest = answer.lstrip()[len(frame.opened.strip()) :]
    return rest.lstrip() if frame.opened[-1].isspace() else rest


def _ended(frame: Frame, spelled: Spelled, text: str) -> str:
    """The text up to its end-of-turn token."""
    at = text.find(frame.end)
    if at >= 0:
        return text[: at + len(frame.end)]
    kept = text.rstrip()
    if kept.endswith(spelled.ends):
        return kept
    raise Unfit(
        f"the chat template does not end this assistant turn with {frame.end}, nor with another stop token; "
        "name what ends it in eos_token_id of the model's generation_config.json"
    )
