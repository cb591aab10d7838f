"""Decontamination: which documents hold a run of words of the texts that a model is evaluated on.

    evaluation texts --words--> every run of n words --hash--> table
    document         --words--> every run of n words --hash--> in the table? --same words?--> the shared run

Legend: W words of a block of documents, E runs of the evaluation texts.

Words are those of `words.normalised_words`: case, punctuation and line ends make no difference. A hash says
only where to look; the words themselves decide.
Owns the search, and which texts of a prompt are looked for. Does not own what happens to a document that
shares a run (prepare).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stages.data.corpus.words import blocks_of, hash_words, ngrams, normalised_words
from stages.data.reading.records import Prompt

_SLOTS_PER_RUN = 8
"""Slots of the first table per run: at most one run in so many of clean text is searched for in vain."""


class Contamination:
    """The runs of `ngram` words of some texts, to be looked for in documents.

    Example: with ngram=3, Contamination(["One, two three four."]) has the runs `one two three` and
    `two three four`; shared_run("... TWO three\\nfour!") is "two three four".
    """

    def __init__(self, texts: Sequence[str], ngram: int = 13) -> None:
        self._ngram = ngram
        words_of_texts = [normalised_words(text) for text in texts]
        long = [text for text, words in zip(texts, words_of_texts, strict=True) if len(words) >= ngram]
        self._words = [word for words in words_of_texts if len(words) >= ngram for word in words]
        hashes_E, starts_E, _ = _runs(long, ngram)
        order = np.argsort(hashes_E, kind="stable")
        self._hashes_E, self._starts_E = hashes_E[order], starts_E[order]
        num_slots = 1 << max(16, (_SLOTS_PER_RUN * len(hashes_E)).bit_length())
        self._slot_mask = np.uint64(num_slots - 1)
        self._occupied = np.zeros(num_slots, bool)
        self._occupied[hashes_E & self._slot_mask] = True

    def shared_run(self, text: str) -> str | None:
        """The first run of words that the text shares, as lower-cased words with spaces between; or None."""
        return self.shared_runs([text])[0]

    def shared_runs(self, texts: Sequence[str]) -> list[str | None]:
        """`shared_run` of each text, many at once."""
        return [run for block in blocks_of(texts) for run in self._of_block(block)]

    def _of_block(self, texts: Sequence[str]) -> list[str | None]:
        found: list[str | None] = [None] * len(texts)
        hashes, starts, documents = _runs(texts, self._ngram)
        hits, ranks = self._hits(hashes)
        for document, rows in _grouped(documents[hits]):
            first = int(np.searchsorted(documents, document))  # the document's first run starts at its word 0
            places = starts[hits[rows]] - starts[first]
            words = normalised_words(texts[document])
            found[document] = self._first_shared(words, places, self._starts_E[ranks[rows]])
        return found

    def _hits(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the hashes are those of runs that are looked for, and which runs: row, rank."""
        if not len(self._hashes_E):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        (likely,) = np.nonzero(self._occupied[hashes & self._slot_mask])
        ranks = np.searchsorted(self._hashes_E, hashes[likely])
        equal = self._hashes_E[np.minimum(ranks, len(self._hashes_E) - 1)] == hashes[likely]
        return likely[equal], ranks[equal]

    def _first_shared(
        self, words: list[str], places: NDArray[np.int64], starts: NDArray[np.int64]
    ) -> str | None:
        """The first run of a document, of those at `places`, that is word for word the one at its start."""
        for place, start in zip(places.tolist(), starts.tolist(), strict=True):
            run = words[place : place + self._ngram]
            if run == self._words[start : start + self._ngram]:
                return " ".join(run)
        return None


def texts_of(prompt: Prompt) -> list[str]:
    """What must not stand in training text: what is asked, and the texts in the row's other columns."""
    asked = [message.content for message in prompt.messages if message.role != "system"]
    return asked + [value for value in prompt.row.values() if isinstance(value, str)]


def num_too_short(texts: Sequence[str], ngram: int) -> int:
    """How many of the texts have fewer words than a run: they are not looked for."""
    return sum(len(normalised_words(text)) < ngram for text in texts)


def _runs(
    texts: Sequence[str], ngram: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Every run of `ngram` words inside a text: its hash, its first word among all words, its text."""
    words = hash_words(texts)
    hashes_W = ngrams(words, ngram)
    (starts,) = np.nonzero(np.arange(len(hashes_W)) + ngram <= words.ends_W)
    texts_W = np.repeat(np.arange(len(texts)), words.lengths_D)
    return hashes_W[starts], starts, texts_W[starts]


def _grouped(documents: NDArray[np.int64]) -> Iterator[tuple[int, slice]]:
    """Each document of a list in document order, and its rows of that list."""
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    for start, end in pairwise([*starts, len(documents)]):
        yield int(documents[start]), slice(start, end)
