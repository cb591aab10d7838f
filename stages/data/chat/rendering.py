"""Rendering: conversations -> what the template writes of them, many in one exchange with its process.

Owns: batches, and the words for conversations that cannot be rendered. Does not own: the process (templates),
how messages are given to a template (messages), where answers stand (turns), ids (tokenizer).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from stages.data.chat.frame import Frame, Template
from stages.data.chat.messages import Forms, Talk
from stages.data.chat.stand_ins import any_of
from stages.data.chat.templates import Chat, Refused, Spellings, Written
from stages.data.chat.turns import Spelled, Turn, Unfit, cuts_of, turns_of
from stages.data.reading.files import one_line
from stages.errors import ModelError

BATCH_TALKS, BATCH_CHARS = 128, 2**18
"""Conversations that are given to the template's process at once; all their texts together have about as many
characters at most.
"""

R = TypeVar("R")


class Rendering:
    """A template, and what its text means."""

    def __init__(
        self,
        template: Template,
        frame: Frame,
        *,
        spelled: Collection[str],
        inside: Collection[str],
        ends: Collection[str],
    ) -> None:
        """Of the tokenizer's tokens: those that content may not become (`spelled`), those among them that an
        answer may (`inside`), and those that may end one.
        """
        self._template, self._frame = template, frame
        self._spelled = Spelled(all=any_of(spelled), inside=any_of(inside), ends=tuple(ends))
        self._spellings = Spellings(
            signs="".join(sorted({sign for text in spelled for sign in (text[0], text[-1])})),
            inside=tuple(sorted(inside)),
        )
        self._forms = Forms(template)

    def written(
        self, asked: Sequence[tuple[Talk, Sequence[tuple[int, bool]]]]
    ) -> Iterator[Written | Refused]:
        """What the template writes of each conversation, for these cuts; one batch ahead of what is taken."""
        batches = self._batches(asked)
        ahead = next(batches, [])
        if len(asked) == len(ahead):
            yield from self._ask(ahead)
            return
        with ThreadPoolExecutor(1) as thread:
            answers = thread.submit(self._ask, ahead)
            for batch in batches:
                now, answers = answers, thread.submit(self._ask, batch)
                yield from now.result()
            yield from answers.result()

    def _batches(
        self, asked: Sequence[tuple[Talk, Sequence[tuple[int, bool]]]]
    ) -> Iterator[list[Chat | Refused]]:
        waiting: list[Chat | Refused] = []
        num_chars = 0
        for talk, cuts in asked:
            chat = self._forms.of(talk, cuts)
            waiting.append(chat)
            num_chars += 0 if isinstance(chat, Refused) else chat.num_chars * len(cuts)
            if len(waiting) >= BATCH_TALKS or num_chars >= BATCH_CHARS:
                yield waiting
                waiting, num_chars = [], 0
        if waiting:
            yield waiting

    def _ask(self, waiting: Sequence[Chat | Refused]) -> list[Written | Refused]:
        chats = [chat for chat in waiting if isinstance(chat, Chat)]
        answers = iter(self._template.written(chats, self._spellings) if chats else [])
        return [_in_words(next(answers)) if isinstance(chat, Chat) else chat for chat in waiting]

    def turns(self, talk: Talk, written: Written, *, since: int) -> list[Turn]:
        return turns_of(talk, written, self._frame, self._spelled, since=since)


def _in_words(answer: Written | Refused) -> Written | Refused:
    if isinstance(answer, Written):
        return answer
    words = f"the chat template refuses it: {one_line(answer.words)}"
    return Refused(words=f"{words}; change the row, or set on_bad_row: skip")


def cuts_of_prompt(talk: Talk) -> list[tuple[int, bool]]:
    return [*cuts_of(talk), (len(talk.messages), True)]


def attempt(make: Callable[[Talk, Written], R], talk: Talk, written: Written | Refused) -> R | Refused:
    """What `make` makes of a text, or why there is nothing."""
    if isinstance(written, Refused):
        return written
    try:
        return make(talk, written)
    except Unfit as unfit:
        return Refused(words=str(unfit))


def or_raise(found: R | Refused) -> R:
    if isinstance(found, Refused):
        raise ModelError(found.words)
    return found
