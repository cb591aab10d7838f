"""Words: the one definition of a word by which documents are compared, and hashes of runs of words.

    texts --normalised_words--> words --hash_words--> HashedWords --ngrams--> one hash per run of n words

Legend: D documents, W words of all of them end to end.

A word is a run of letters, digits and the marks on them (accents, vowel signs) after NFKC and lower-casing;
everything else (punctuation, symbols, the underscore, white space, line ends) only separates words. Scripts
that are written without spaces (ideographs, kana, Thai, Lao, Khmer, Myanmar) give a word for each letter with
its marks. So "Don't stop!" and "don\u2019t  STOP" are the same words: don, t, stop.
A hash depends on the words alone: not on the process, the block or the other documents.
Does not own which words quality rules count (quality), nor what is done with equal hashes.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, groupby

import numpy as np
from numpy.typing import NDArray


def _marks() -> str:
    """The combining marks of Unicode, which `\\w` leaves out, as ranges of a character class."""
    codes = chain(range(0x300, 0x20000), range(0xE0100, 0xE01F0))
    marks = (code for code in codes if unicodedata.category(chr(code)).startswith("M"))
    runs = [[*run] for _, run in groupby(enumerate(marks), lambda numbered: numbered[1] - numbered[0])]
    return "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in runs)


_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and CJK ideographs
)
_LETTER, _MARK = rf"[^\W_{_UNSPACED}]", f"[{_marks()}]"
_WORD = re.compile(  # what looks for ASCII saves most of the time: few words have marks
    rf"{_LETTER}+(?:(?![\0-\x7f]){_MARK}+{_LETTER}*)*|(?=\w)[{_UNSPACED}]{_MARK}*"
)
_ASCII_SEPARATORS = {code: " " for code in range(128) if not chr(code).isalnum()}
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses no bits

HASHED_WORDS = 1 << 17
"""Distinct words whose hash is remembered (about 30 MB)."""
BLOCK_CHARS = 2_000_000
"""Characters of documents whose words are held at once: bounds memory, and small arrays sort faster."""


def normalised_words(text: str) -> list[str]:
    """The words of a text, lower-cased.

    Example: "The U.S., in 2024:\\nyes" -> ["the", "u", "s", "in", "2024", "yes"].
    """
    if text.isascii():  # the same words in a third of the time
        return text.lower().translate(_ASCII_SEPARATORS).split()
    lowered = unicodedata.normalize("NFKC", text).lower().replace("i\u0307", "i")  # Turkish \u0130
    return _WORD.findall(lowered)


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedWords:
    """The words of D documents end to end, as hashes."""

    hashes_W: NDArray[np.uint64]
    offsets: NDArray[np.int64]  # (D + 1,): document d has the words offsets[d]:offsets[d + 1]

    @property
    def lengths_D(self) -> NDArray[np.int64]:
        """Words per document."""
        return np.diff(self.offsets)

    @property
    def ends_W(self) -> NDArray[np.int64]:
        """For each word, where its document ends."""
        return np.repeat(self.offsets[1:], self.lengths_D)


def hash_words(texts: Sequence[str]) -> HashedWords:
    """The hashes of all words of the texts."""
    words = [normalised_words(text) for text in texts]
    hashes = [np.fromiter(map(_hash, one), np.uint64, len(one)) for one in words]
    return HashedWords(
        hashes_W=np.concatenate([np.empty(0, np.uint64), *hashes]),
        offsets=offsets_of([len(one) for one in words]),
    )


@lru_cache(maxsize=HASHED_WORDS)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")


def offsets_of(lengths: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where each of so long pieces starts when they lie end to end, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def ngrams(words: HashedWords, size: int) -> NDArray[np.uint64]:
    """uint64 (W,): the hash of the run of `size` words that starts at each word.

    A run does not end with its document: those that start less than `size` words before `ends_W` hold words
    of the next document, and the caller leaves them out.
    """
    padded = np.concatenate([words.hashes_W, np.zeros(size, np.uint64)])
    runs_W = np.zeros(len(words.hashes_W), np.uint64)
    for index in range(size):
        runs_W *= _MULTIPLIER
        runs_W += padded[index : index + len(runs_W)]
    return mixed(runs_W)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit of the value (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def blocks_of(texts: Sequence[str], max_chars: int = BLOCK_CHARS) -> Iterator[Sequence[str]]:
    """The texts in order, in runs of at most max_chars characters (or one longer text)."""
    start = chars = 0
    for index, text in enumerate(texts):
        if index > start and chars + len(text) > max_chars:
            yield texts[start:index]
            start, chars = index, 0
        chars += len(text)
    if start < len(texts):
        yield texts[start:]
