"""Quality: published sets of rules by which documents that are no prose are dropped.

    texts --words--> WordBlock --gopher_quality, gopher_repetition--> the documents that break each rule
    texts --lines--> fineweb --> the documents that break each rule
    text  --lines--> c4 --> the text without the lines that C4 removes, or the rule that it breaks

Legend: D documents of a block, W words of all of them end to end, V distinct words.

Rules and thresholds are those of datatrove 0.10 (FineWeb was made with it), also where it differs from the
papers. Words here are what `words_and_marks` finds: runs of letters, digits and underscores, held together by
an apostrophe, full stop, slash or hyphen inside or by a comma before digits (don't, U.S, and/or, well-known,
1,000.5), and every other mark as a word of its own, but for dots or hyphens in a row, which are one. That is
how NLTK's tokeniser, which FineWeb was made with, splits most text. The rules are made for English prose:
their stop words are English.
Owns the rules. Does not own which sets are used, nor counting what was dropped (prepare).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

import numpy as np
from numpy.typing import NDArray

from stages.config.prepare import QualityRules
from stages.data.corpus.words import blocks_of, offsets_of

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Broken = dict[str, Bools]
"""Rule, in the order of the set -> (D,): the documents that break it."""

_WORD_OR_MARK = re.compile(r"\w++(?:['\u2019./-]\w++|,\d++)*+|\.{2,}|-{2,}|[^\w\s]")

# Rae et al. 2021 (Gopher), table A1 and section A.1.1.
MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN_LENGTH, MAX_MEAN_LENGTH = 3, 10
MAX_SYMBOLS_PER_WORD = 0.1
MAX_BULLET_LINES, MAX_ELLIPSIS_LINES = 0.9, 0.3
MIN_ALPHABETIC_WORDS = 0.8
MIN_STOP_WORDS = 2
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
MAX_DUPLICATE_PARTS, MAX_DUPLICATE_PART_CHARS = 0.3, 0.2
_PARAGRAPH_BREAK, _LINE_BREAK = re.compile(r"\n{2,}"), re.compile(r"\n+")
MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

# Raffel et al. 2020 (C4), section 2.2, and their code.
MIN_SENTENCES = 5
MIN_LINE_WORDS, MAX_WORD_CHARS = 3, 1000
END_MARKS = (".", "?", "!", '"', "'")
POLICY_PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
SENTENCE_BREAK = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+(?=\S)")
"""Between two sentences: a full stop, question or exclamation mark, closing quotes, white space."""

# Penedo et al. 2024 (FineWeb), section 3.6.
MIN_ENDED_LINES = 0.12
MAX_SHORT_LINES, SHORT_LINE_CHARS = 0.67, 30
MAX_DUPLICATE_LINE_CHARS = 0.01
MAX_NEWLINES_PER_WORD = 0.3


def _characters(code_points: str) -> frozenset[str]:
    """Characters written as hexadecimal code points and ranges of them: "21 3A-3C" -> ! : ; <"""
    bounds = [[int(bound, 16) for bound in one.split("-")] for one in code_points.split()]
    return frozenset(chr(point) for both in bounds for point in range(both[0], both[-1] + 1))


TERMINAL_MARKS = _characters(
    "21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 "
    "17D4-17D6 17D9-17DA 1803 1809 1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F "
    "203C-203D 2047-2049 2E2E 2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F "
    "A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 "
    "10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 "
    "1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 11946 "
    "11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 "
    "16E98 1BC9F 1DA88"
)
"""What ends a sentence, in all scripts (Unicode's Sentence_Terminal)."""
SYMBOLS = TERMINAL_MARKS | _characters(
    "0-8 B-1F 22-2D 2F 3A-3E 40 5B-60 7B-9F AB B4 BB 2013-2014 2019 201C-201E 2026 2236 2501 25BA 3001 "
    "3008-300D 3010-3011 FF05 FF08-FF09 FF0C FF11 FF1A-FF1B FF5E"
)
"""A word of these alone is no word to Gopher's word counts: datatrove's list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the rules say about one document.

    Example: judge(["Lorem ipsum dolor sit amet."], ["c4"]) -> [Verdict(text="Lorem ipsum dolor sit amet.",
    broken="c4: lorem ipsum")].
    """

    text: str  # without the lines that were removed
    broken: str | None  # the first rule it breaks, as `set: rule`; None: it passes


def judge(texts: Sequence[str], rules: Sequence[QualityRules]) -> list[Verdict]:
    """The verdict on each text by sets of rules in the order given: c4 removes lines for those after it."""
    return [verdict for block in blocks_of(texts) for verdict in _judge_block(block, rules)]


def _judge_block(texts: Sequence[str], rules: Sequence[QualityRules]) -> list[Verdict]:
    kept, first_broken = list(texts), dict[int, str]()
    block: WordBlock | None = None
    for name in rules:
        if name == "c4":
            broken = _remove_lines(kept, first_broken)
            block = None  # its words are those of the texts as they were
        elif name == "fineweb":
            broken = fineweb(kept, num_words_of(kept) if block is None else block.num_words_D)
        else:
            block = WordBlock.of(kept) if block is None else block
            broken = gopher_quality(block) if name == "gopher_quality" else gopher_repetition(block)
        for rule, broken_D in broken.items():
            for document in np.flatnonzero(broken_D).tolist():
                first_broken.setdefault(document, f"{name}: {rule}")
    return [Verdict(text=text, broken=first_broken.get(index)) for index, text in enumerate(kept)]


def _remove_lines(texts: list[str], skip: Container[int]) -> Broken:
    """Apply c4 to the texts in place, but for those in `skip`; return which break which of its rules."""
    broken = {rule: np.zeros(len(texts), np.bool_) for rule in C4_RULES}
    for document, text in enumerate(texts):
        if document not in skip:
            texts[document], rule = c4(text)
            if rule is not None:
                broken[rule][document] = True
    return broken


def words_and_marks(text: str) -> list[str]:
    """The words of a text as the quality rules count them; none holds white space.

    Example: "Well, I don't..." -> ["Well", ",", "I", "don't", "..."].
    """
    return _WORD_OR_MARK.findall(text)


def num_words_of(texts: Sequence[str]) -> Ints:
    """(D,): words and marks per document."""
    return np.array([len(words_and_marks(text)) for text in texts], np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordBlock:
    """The words of D documents end to end, as indices into the vocabulary of the block."""

    texts: Sequence[str]
    chars_D: Ints  # of the whole text, white space too; at least 1, as it is only divided by
    vocabulary: list[str]  # V
    words_W: Ints
    offsets: Ints  # (D + 1,): document d has the words offsets[d]:offsets[d + 1]
    documents_W: Ints  # the document of each word
    word_chars: Ints  # (W + 1,): characters of the words before each word

    @classmethod
    def of(cls, texts: Sequence[str]) -> "WordBlock":
        """Split the texts into words."""
        indices = defaultdict[str, int](count().__next__)  # a new word gets the next index
        words = [words_and_marks(text) for text in texts]
        lengths = [len(one) for one in words]
        words_W = np.fromiter(map(indices.__getitem__, chain.from_iterable(words)), np.int64, sum(lengths))
        chars_V = np.fromiter(map(len, indices), np.int64, len(indices))
        return cls(
            texts=texts,
            chars_D=np.array([max(len(text), 1) for text in texts], np.int64),
            vocabulary=list(indices),
            words_W=words_W,
            offsets=offsets_of(lengths),
            documents_W=np.repeat(np.arange(len(texts)), lengths),
            word_chars=offsets_of(chars_V[words_W]),
        )

    @property
    def num_words_D(self) -> Ints:
        """Words and marks per document."""
        return np.diff(self.offsets)

    def sums_D(self, values_W: Ints | Bools) -> Ints:
        """Sum over the words of each document."""
        totals = offsets_of(values_W)
        return totals[self.offsets[1:]] - totals[self.offsets[:-1]]

    def where(self, holds: Callable[[str], bool]) -> Bools:
        """(W,): for each word whether `holds`; asked once per distinct word."""
        return np.fromiter(map(holds, self.vocabulary), np.bool_, len(self.vocabulary))[self.words_W]

    def per_text(self, measure: Callable[[str], int]) -> Ints:
        """(D,): an integer of each text."""
        return np.fromiter(map(measure, self.texts), np.int64, len(self.texts))


def gopher_quality(block: WordBlock) -> Broken:
    """Rae et al. 2021: number and length of words, symbols, bullets, ellipses, stop words."""
    plain_W = ~block.where(SYMBOLS.issuperset)
    num_plain_D, num_words_D = block.sums_D(plain_W), np.maximum(block.num_words_D, 1)
    length_D = block.sums_D(np.diff(block.word_chars) * plain_W) / np.maximum(num_plain_D, 1)
    bullets_D, ellipses_D = _line_shares(block.texts)
    return {
        "too few words": num_plain_D < MIN_WORDS,
        "too many words": num_plain_D > MAX_WORDS,
        "mean word length too low": length_D < MIN_MEAN_LENGTH,
        "mean word length too high": length_D > MAX_MEAN_LENGTH,
        "hash marks": block.per_text(_num_hashes) / num_words_D > MAX_SYMBOLS_PER_WORD,
        "ellipses": block.per_text(_num_ellipses) / num_words_D > MAX_SYMBOLS_PER_WORD,
        "bullet lines": bullets_D > MAX_BULLET_LINES,
        "lines ending in an ellipsis": ellipses_D > MAX_ELLIPSIS_LINES,
        "words without a letter": block.sums_D(block.where(_has_letter)) / num_words_D < MIN_ALPHABETIC_WORDS,
        "stop words": _num_stop_words(block) < MIN_STOP_WORDS,
    }


def _has_letter(word: str) -> bool:
    return word.isalpha() or any(map(str.isalpha, word))


def _num_hashes(text: str) -> int:
    return text.count("#")


def _num_ellipses(text: str) -> int:
    return text.count("...") + text.count("\u2026")


def _line_shares(texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(D,) each: the shares of the lines that start with a bullet and that end in an ellipsis."""
    shares = np.zeros((2, len(texts)))
    for document, text in enumerate(texts):
        lines = [line.strip() for line in text.splitlines()]
        if lines:
            shares[0, document] = sum(line.startswith(("\u2022", "-")) for line in lines) / len(lines)
            shares[1, document] = sum(line.endswith(("...", "\u2026")) for line in lines) / len(lines)
    return shares[0], shares[1]


def _num_stop_words(block: WordBlock) -> Ints:
    """(D,): how many of the stop words occur, in lower case as the rule has them."""
    other = len(STOP_WORDS)
    index_V = [STOP_WORDS.index(word) if word in STOP_WORDS else other for word in block.vocabulary]
    occurs = np.zeros((len(block.texts), other + 1), np.bool_)
    occurs[block.documents_W, np.array(index_V, np.int64)[block.words_W]] = True
    return occurs[:, :other].sum(axis=1)


def gopher_repetition(block: WordBlock) -> Broken:
    """Rae et al. 2021: repeated paragraphs, lines and runs of words; characters as shares of the text's."""
    paragraphs, paragraph_chars = _duplicates([_PARAGRAPH_BREAK.split(text.strip()) for text in block.texts])
    lines, line_chars = _duplicates([_LINE_BREAK.split(text) for text in block.texts])
    broken = {
        "empty": np.array([not text for text in block.texts], np.bool_),
        "duplicate paragraphs": paragraphs > MAX_DUPLICATE_PARTS,
        "duplicate paragraph characters": paragraph_chars / block.chars_D > MAX_DUPLICATE_PART_CHARS,
        "duplicate lines": lines > MAX_DUPLICATE_PARTS,
        "duplicate line characters": line_chars / block.chars_D > MAX_DUPLICATE_PART_CHARS,
    }
    for runs in _repeated_runs(block, max(MAX_DUPLICATE_NGRAMS)):
        if runs.size in MAX_TOP_NGRAM:
            share_D = _top_chars(block, runs) / block.chars_D
            broken[f"top {runs.size}-gram"] = share_D > MAX_TOP_NGRAM[runs.size]
        if runs.size in MAX_DUPLICATE_NGRAMS:
            share_D = _duplicate_chars(block, runs) / block.chars_D
            broken[f"duplicate {runs.size}-grams"] = share_D > MAX_DUPLICATE_NGRAMS[runs.size]
    return broken


def _duplicates(parts_of_texts: Sequence[Sequence[str]]) -> tuple[NDArray[np.float64], Ints]:
    """(D,) each: share of the parts that stood before in their text, and the characters of those."""
    shares, chars = np.zeros(len(parts_of_texts)), np.zeros(len(parts_of_texts), np.int64)
    for document, parts in enumerate(parts_of_texts):
        distinct = set(parts)
        if len(distinct) < len(parts):
            shares[document] = (len(parts) - len(distinct)) / len(parts)
            chars[document] = sum(map(len, parts)) - sum(map(len, distinct))
    return shares, chars


@dataclass(frozen=True, slots=True, kw_only=True)
class _RepeatedRuns:
    """The runs of `size` words that occur more than once in their document: R of them, in G groups."""

    size: int
    starts_R: Ints  # first word, ascending
    groups_R: Ints  # equal for equal runs of one document: 0 .. G - 1


def _repeated_runs(block: WordBlock, max_size: int) -> Iterator[_RepeatedRuns]:
    """For sizes 1 .. max_size.

    A run can be repeated only where it is without its last word: few are left after the first sizes.
    """
    starts, groups = np.arange(len(block.words_W)), block.documents_W
    ends_W = block.offsets[1:][block.documents_W]
    for size in range(1, max_size + 1):
        inside = starts + size <= ends_W[starts]
        starts, groups = starts[inside], groups[inside]
        longer = groups * len(block.vocabulary) + block.words_W[starts + size - 1]
        _, index, counts = np.unique(longer, return_inverse=True, return_counts=True)
        repeated = counts > 1
        again = repeated[index]
        starts, groups = starts[again], (np.cumsum(repeated) - 1)[index[again]]
        yield _RepeatedRuns(size=size, starts_R=starts, groups_R=groups)


def _top_chars(block: WordBlock, runs: _RepeatedRuns) -> Ints:
    """(D,): characters, spaces between words too, of the most frequent run of each document, every time it
    occurs; of several the one that comes first. A document without any run has 0.
    """
    long_enough = block.num_words_D >= runs.size
    times_D, first_D = long_enough.astype(np.int64), np.where(long_enough, block.offsets[:-1], 0)
    counts_G = np.bincount(runs.groups_R)
    first_G = np.zeros(len(counts_G), np.int64)
    first_G[runs.groups_R[::-1]] = runs.starts_R[::-1]  # the last write stays: that of the earliest run
    documents_G = block.documents_W[first_G]
    order = np.lexsort((first_G, -counts_G, documents_G))
    top = order[np.diff(documents_G[order], prepend=-1) > 0]
    times_D[documents_G[top]], first_D[documents_G[top]] = counts_G[top], first_G[top]
    ends_D = np.minimum(first_D + runs.size, len(block.words_W))
    return times_D * (block.word_chars[ends_D] - block.word_chars[first_D] + runs.size - 1)


def _duplicate_chars(block: WordBlock, runs: _RepeatedRuns) -> Ints:
    """(D,): characters in runs that stood before, from left to right and without overlap."""
    seen = bytearray(len(runs.starts_R))
    duplicates, free_from = [], 0
    for start, group in zip(runs.starts_R.tolist(), runs.groups_R.tolist(), strict=True):
        if start < free_from:
            continue
        if seen[group]:
            duplicates.append(start)
            free_from = start + runs.size
        seen[group] = 1
    starts = np.array(duplicates, np.int64)
    chars_D = np.zeros(len(block.texts), np.int64)
    np.add.at(
        chars_D, block.documents_W[starts], block.word_chars[starts + runs.size] - block.word_chars[starts]
    )
    return chars_D


def fineweb(texts: Sequence[str], num_words_D: Ints) -> Broken:
    """Penedo et al. 2024: lines without an end mark, short lines, repeated lines, lists."""
    lines_of_texts = [[line for line in text.split("\n") if line.strip()] for text in texts]
    num_lines_D = np.array([max(len(lines), 1) for lines in lines_of_texts], np.int64)
    ended_D = np.array(
        [sum(line[-1] in TERMINAL_MARKS for line in lines) for lines in lines_of_texts], np.int64
    )
    short_D = np.array([_num_short(lines) for lines in lines_of_texts], np.int64)
    newlines_D = np.array([text.count("\n") for text in texts], np.int64)
    line_chars_D = np.array([len(text) for text in texts], np.int64) - newlines_D
    _, duplicate_chars_D = _duplicates(lines_of_texts)
    return {
        "empty": np.array([not lines for lines in lines_of_texts], np.bool_),
        "lines without an end mark": ended_D / num_lines_D < MIN_ENDED_LINES,
        "short lines": short_D / num_lines_D > MAX_SHORT_LINES,
        "duplicate line characters": (
            duplicate_chars_D / np.maximum(line_chars_D, 1) > MAX_DUPLICATE_LINE_CHARS
        ),
        "newlines per word": newlines_D / np.maximum(num_words_D, 1) > MAX_NEWLINES_PER_WORD,
    }


def _num_short(lines: Sequence[str]) -> int:
    return sum(len(line) <= SHORT_LINE_CHARS for line in lines)


C4_RULES = ("lorem ipsum", "curly bracket", "too few sentences")


def c4(text: str) -> tuple[str, str | None]:
    """Raffel et al. 2020: the text without citation marks and without the lines that are no sentences, and
    None; or the text as it was and the rule (of C4_RULES) that it breaks.
    """
    kept: list[str] = []
    num_sentences = 0
    for one in text.splitlines():
        line = _kept_line(one.strip())
        if line is None:
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return text, "lorem ipsum"
        if "javascript" in lower:
            continue
        if "{" in line:
            return text, "curly bracket"
        if any(phrase in lower for phrase in POLICY_PHRASES):
            continue
        num_sentences += 1 + len(SENTENCE_BREAK.findall(line))
        kept.append(line)
    return ("\n".join(kept).strip(), None) if num_sentences >= MIN_SENTENCES else (text, "too few sentences")


def _kept_line(line: str) -> str | None:
    """The line without citation marks if it has words, none of them endless, and ends as a sentence does."""
    words = line.split()
    if len(line) > MAX_WORD_CHARS and max(map(len, words)) > MAX_WORD_CHARS:
        return None
    if "[" in line:
        line = _CITATION.sub("", line)
    ends = line.endswith(END_MARKS) and not line.endswith("...")
    return line if ends and len(words) >= MIN_LINE_WORDS else None
