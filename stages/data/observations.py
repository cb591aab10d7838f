"""Observations: what no rule forbids in a dataset, and what its owner should know before a run.

    records of a source --Observed.look--> counts      Observed of several --trained_on--> shared prompts

Four things: turns that are left out, texts that look templated already, scores that contradict their pair,
and prompts of an evaluation that are trained on. Nothing is changed or refused here. Owns: what is counted.
Does not own: rows and rules (readers, schemas), what is a marker (template_marks) or a contradiction
(contradictions), how it is told (pipeline.preview). Light import.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from stages.config.data import DataSource
from stages.data.chat.template_marks import Headers, marks_in
from stages.data.corpus.decontamination import num_too_short, texts_of
from stages.data.reading.contradictions import contradiction
from stages.data.reading.records import Conversation, Document, Message, Pair, Prompt, Record

EXAMPLE_CHARS = 60


class Observed:
    """One source, record by record."""

    def __init__(self, source: DataSource, *, ngram: int | None, headers: Sequence[Headers] = ()) -> None:
        """`ngram`: words in a row that decontamination looks for; None: it looks for nothing. `headers`: of
        the model's own chat template.
        """
        self.part, self.headers = source.part, headers
        self.num_records = 0
        self.turns_left_out = self.records_cut = 0  # turns after the last answer, and of how many records
        self.templated, self.markers = 0, Counter[str]()  # records with a marker; marker -> records
        self.contradicted, self.first_contradicted = 0, ""  # pairs; the scores of the first one
        self.evaluation_texts = self.evaluation_texts_too_short = 0
        self.asked: array[int] = array("Q")  # a hash of every question that an answer follows, or will
        self.first_words: dict[int, str] = {}  # of prompts: that hash -> how the question begins
        self._ngram = ngram
        sides = [("chosen", "rejected")]
        if {"chosen", "rejected"} <= source.column_of.keys():
            sides.append((source.column_of["chosen"], source.column_of["rejected"]))
        self._sides = sides

    def look(self, record: Record) -> None:
        """Count what is odd in one more record."""
        self.num_records += 1
        match record:
            case Document():
                return
            case Pair(prompt=prompt, chosen=chosen, rejected=rejected):
                self._look_for_markers((*prompt, *chosen, *rejected))
                self._compare_scores(record)
            case Conversation(messages=messages):
                self._look_for_markers(messages)
                self.turns_left_out += record.num_turns_left_out
                self.records_cut += record.num_turns_left_out > 0
                self.asked.extend(_questions(messages))
            case Prompt(messages=messages):
                self._look_for_markers(messages)
                self._count_texts(record)
                *_, question = _questions((*messages, _ANSWER))
                self.asked.append(question)
                self.first_words.setdefault(question, _first_words(messages))

    def _look_for_markers(self, messages: Iterable[Message]) -> None:
        found = set[str]().union(*(marks_in(message.content, self.headers) for message in messages))
        self.templated += bool(found)
        self.markers.update(found)

    def _compare_scores(self, pair: Pair) -> None:
        if found := contradiction(pair.row, self._sides):
            self.contradicted += 1
            where = f"{pair.place}: " if pair.place else ""
            self.first_contradicted = self.first_contradicted or f"{where}{found}"

    def _count_texts(self, prompt: Prompt) -> None:
        if self._ngram is not None:
            texts = texts_of(prompt)
            self.evaluation_texts += len(texts)
            self.evaluation_texts_too_short += num_too_short(texts, self._ngram)


def trained_on(asked: Observed, trained: Sequence[Observed]) -> tuple[int, str]:
    """How many prompts of `asked` are asked in the records of `trained` too, and how the first one begins.

    Equal are questions with the same turns before them, system messages and white space aside.
    """
    own = _hashes(asked)
    (shared,) = np.nonzero(np.isin(own, np.concatenate([own[:0], *map(_hashes, trained)])))
    return len(shared), asked.first_words[int(own[shared[0]])] if len(shared) else ""


def _hashes(observed: Observed) -> NDArray[np.uint64]:
    return np.array(observed.asked, np.uint64)


_ANSWER = Message(role="assistant", content="")


def _questions(messages: Iterable[Message]) -> Iterator[int]:
    """A hash of what stands before each answer."""
    so_far = blake2b(digest_size=8)
    for message in messages:
        if message.role == "assistant":
            yield int.from_bytes(so_far.digest(), "little")
        if message.role != "system":
            text = f"{message.role}\0{' '.join(message.content.split())}\0"
            so_far.update(text.encode(errors="surrogatepass"))


def _first_words(messages: Sequence[Message]) -> str:
    text = " ".join(messages[-1].content.split())
    return text if len(text) <= EXAMPLE_CHARS else f"{text[:EXAMPLE_CHARS]}\u2026"
