"""Quality rules: hand-made documents for each, and the same answers as datatrove on varied texts."""

import random
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter
from datatrove.pipeline.filters import gopher_quality_filter as gopher_quality_filters
from datatrove.pipeline.filters import gopher_repetition_filter as gopher_repetition_filters
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION

from stages.config.prepare import QualityRules
from stages.data.corpus import quality
from stages.data.corpus.quality import Verdict, WordBlock, c4, judge, num_words_of, words_and_marks

SUBJECTS = ["the farmer", "a teacher", "that old engineer", "our captain", "the committee", "every child"]
VERBS = ["carried", "described", "remembered", "painted", "will have", "measured", "could be", "admired"]
OBJECTS = ["the boat", "a letter of thanks", "seven apples", "the red bridge", "music", "that river", "a map"]
ENDS = ["near the harbour", "with great care", "because of the rain", "to everyone's surprise", "in May"]


def sentence(rng: random.Random) -> str:
    parts = [rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(OBJECTS), rng.choice(ENDS)]
    text = " ".join(parts) + f" {rng.randint(2, 9999)} times" * (rng.random() < 0.4)
    return text[0].upper() + text[1:] + rng.choice(["."] * 8 + ["!", "?", '."', ".'", "\u2026", "..."])


def lines_of(rng: random.Random, num_lines: int) -> list[str]:
    return [" ".join(sentence(rng) for _ in range(rng.randint(1, 4))) for _ in range(num_lines)]


def some(rng: random.Random, lines: list[str], change: Callable[[str], str]) -> list[str]:
    """A random share of the lines changed: from hardly any to all."""
    share = rng.choice([0.1, 0.3, 0.6, 0.9, 1.0])
    return [change(line) if rng.random() < share else line for line in lines]


def unended(line: str) -> str:
    return line.rstrip(".!?'\"\u2026")


def repeated(rng: random.Random, lines: list[str]) -> list[str]:
    """Some lines again, elsewhere; blank lines between make them paragraphs too."""
    return lines + [rng.choice(lines) for _ in range(rng.randint(1, len(lines)))]


def repeated_passage(rng: random.Random, lines: list[str]) -> list[str]:
    """A passage of 9 to 20 percent of the text once more, in the middle of a line."""
    words = " ".join(lines).split()
    words = words + [f"extra{index}" for index in range(40)]
    length = max(6, int(len(words) * rng.uniform(0.07, 0.22)))
    return [
        " ".join(words[length:]),
        "So he said: " + " ".join(words[:length] + words[-length:] + words[:length]),
    ]


def repeated_phrase(rng: random.Random, lines: list[str]) -> list[str]:
    phrase = " ".join(rng.choice(["buy", "now", "cheap", "gold", "rings"]) for _ in range(rng.randint(2, 4)))
    return [f"{line} {phrase}{rng.choice([' so', '', ' it', ' we'])}." for line in lines]


FEATURES: dict[str, Callable[[random.Random, list[str]], list[str]]] = {
    "bullets": lambda rng, lines: [rng.choice(["- ", " \u2022 "]) + line for line in lines],
    "ellipsis ends": lambda rng, lines: some(
        rng, lines, lambda line: unended(line) + rng.choice(["...", "\u2026 "])
    ),
    "ellipses": lambda rng, lines: some(
        rng, lines, lambda line: line.replace(" ", " ... ", rng.randint(0, 9))
    ),
    "hashes": lambda rng, lines: some(rng, lines, lambda line: line.replace(" ", " #", rng.randint(0, 9))),
    "numbers": lambda rng, lines: some(
        rng, lines, lambda line: line + " 12 / 7 = 1,000.5 %" * rng.randint(0, 3)
    ),
    "repeated lines": repeated,
    "repeated passage": repeated_passage,
    "repeated phrase": repeated_phrase,
    "short words": lambda rng, lines: some(
        rng, lines, lambda line: " ".join(w[:2] for w in line.split()) + " a b c."
    ),
    "long words": lambda rng, lines: some(rng, lines, lambda line: line.replace(" ", "ation" * 2 + " ")),
    "no stop words": lambda rng, lines: [
        " ".join(w for w in line.split() if w not in quality.STOP_WORDS) for line in lines
    ],
    "capitals": lambda rng, lines: [line.upper() for line in lines],
    "one word lines": lambda rng, lines: [
        word for line in lines for word in line.split()[: rng.randint(1, 30)]
    ],
    "unended": lambda rng, lines: some(rng, lines, unended),
    "blank lines": lambda rng, lines: some(rng, lines, lambda line: line + "\n" * rng.randint(1, 9)),
    "curly": lambda rng, lines: some(rng, lines[:3], lambda line: "if (x) { go } " + line) + lines[3:],
    "lorem": lambda rng, lines: some(rng, lines[:2], lambda line: "Lorem Ipsum dolor " + line) + lines[2:],
    "javascript": lambda rng, lines: some(rng, lines, lambda line: "Please enable JavaScript. " + line),
    "policy": lambda rng, lines: some(rng, lines, lambda line: "Read our Privacy Policy and " + line),
    "citations": lambda rng, lines: some(
        rng,
        lines,
        lambda line: unended(line) + rng.choice(["[12].", ".[3]", ". [edit]", "[citation needed]!"]),
    ),
    "endless word": lambda rng, lines: some(
        rng, lines, lambda line: "x" * rng.choice([999, 1001, 1500]) + " " + line
    ),
    "few": lambda rng, lines: lines[: rng.randint(1, 3)],
    "unicode": lambda rng, lines: some(
        rng,
        lines,
        lambda line: rng.choice(
            ["\u4f60\u597d\u3002", "\u00c9t\u00e9\u00a0l\u00e0\u061f", "na\u00efve\u2028two \u0964"]
        ),
    ),
    "indented": lambda rng, lines: some(rng, lines, lambda line: "\t " + line + " \r"),
}


def varied_text(seed: int) -> str:
    rng = random.Random(seed)
    lines = lines_of(rng, rng.randint(3, 14))
    for feature in rng.choices(list(FEATURES), k=rng.choice([0, 1, 1, 2, 3])):
        lines = FEATURES[feature](rng, lines)
    return rng.choice(["\n", "\n\n"]).join(lines)


@cache
def varied_texts() -> list[str]:
    return [varied_text(seed) for seed in range(500)]


@cache
def split_cached(text: str) -> list[str]:
    return words_and_marks(text)


@pytest.fixture
def same_words(monkeypatch):
    """datatrove's tokenisers need libraries and models; the rules are compared on the same words."""
    for module in (gopher_quality_filters, gopher_repetition_filters, fineweb_quality_filter):
        monkeypatch.setattr(module, "split_into_words", lambda text, language: split_cached(text))
    monkeypatch.setattr(
        c4_filters, "split_into_sentences", lambda text, language: quality.SENTENCE_BREAK.split(text)
    )


GOPHER_QUALITY_OFF = dict.fromkeys(
    (
        "min_doc_words",
        "max_doc_words",
        "min_avg_word_length",
        "max_avg_word_length",
        "max_symbol_word_ratio",
        "max_bullet_lines_ratio",
        "max_ellipsis_lines_ratio",
        "max_non_alpha_words_ratio",
        "min_stop_words",
    )
)
GOPHER_QUALITY = {
    "too few words": {"min_doc_words": 50},
    "mean word length too low": {"min_avg_word_length": 3},
    "mean word length too high": {"max_avg_word_length": 10},
    "bullet lines": {"max_bullet_lines_ratio": 0.9},
    "lines ending in an ellipsis": {"max_ellipsis_lines_ratio": 0.3},
    "words without a letter": {"max_non_alpha_words_ratio": 0.8},
    "stop words": {"min_stop_words": 2},
}
GOPHER_REPETITION_OFF = {
    "dup_line_frac": None,
    "dup_para_frac": None,
    "dup_line_char_frac": None,
    "dup_para_char_frac": None,
    "top_n_grams": (),
    "dup_n_grams": (),
}
GOPHER_REPETITION = {
    "duplicate paragraphs": {"dup_para_frac": 0.3},
    "duplicate paragraph characters": {"dup_para_char_frac": 0.2},
    "duplicate lines": {"dup_line_frac": 0.3},
    "duplicate line characters": {"dup_line_char_frac": 0.2},
    **{f"top {n}-gram": {"top_n_grams": ((n, share),)} for n, share in ((2, 0.2), (3, 0.18), (4, 0.16))},
    **{
        f"duplicate {n}-grams": {"dup_n_grams": ((n, share),)}
        for n, share in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    },
}
FINEWEB_OFF = {"line_punct_thr": 0, "short_line_thr": 1, "char_duplicates_ratio": 1, "new_line_ratio": 1e9}
FINEWEB = {
    "lines without an end mark": {"line_punct_thr": 0.12},
    "short lines": {"short_line_thr": 0.67},
    "duplicate line characters": {"char_duplicates_ratio": 0.01},
    "newlines per word": {"new_line_ratio": 0.3},
}


def dropped_by(datatrove_filter, texts: Sequence[str]) -> list[bool]:
    return [datatrove_filter.filter(Document(text=text, id="0")) is not True for text in texts]


def assert_agrees(ours: np.ndarray, datatrove_filter) -> None:
    """On every text; and the texts try both answers."""
    theirs = dropped_by(datatrove_filter, varied_texts())
    assert ours.tolist() == theirs
    assert min(sum(theirs), len(theirs) - sum(theirs)) >= 5, f"{sum(theirs)} of {len(theirs)} texts break it"


@pytest.mark.parametrize("rule", GOPHER_QUALITY)
def test_each_rule_of_gopher_quality_drops_what_datatrove_drops(rule, same_words):
    alone = gopher_quality_filters.GopherQualityFilter(**{**GOPHER_QUALITY_OFF, **GOPHER_QUALITY[rule]})
    assert_agrees(quality.gopher_quality(WordBlock.of(varied_texts()))[rule], alone)


def test_the_symbol_rules_of_gopher_quality_drop_what_datatrove_drops(same_words):
    alone = gopher_quality_filters.GopherQualityFilter(**{**GOPHER_QUALITY_OFF, "max_symbol_word_ratio": 0.1})
    broken = quality.gopher_quality(WordBlock.of(varied_texts()))
    assert min(broken["hash marks"].sum(), broken["ellipses"].sum()) >= 5
    assert_agrees(broken["hash marks"] | broken["ellipses"], alone)


def test_very_long_documents_are_dropped_as_by_datatrove(same_words):
    texts = [
        "many words " * half + end for half in (49_999, 50_000) for end in ("", "more", "!", "more more")
    ]
    alone = gopher_quality_filters.GopherQualityFilter(**{**GOPHER_QUALITY_OFF, "max_doc_words": 100_000})
    ours = quality.gopher_quality(WordBlock.of(texts))["too many words"]
    assert ours.tolist() == dropped_by(alone, texts) == [False] * 5 + [True, False, True]


@pytest.mark.parametrize("rule", GOPHER_REPETITION)
def test_each_rule_of_gopher_repetition_drops_what_datatrove_drops(rule, same_words):
    alone = gopher_repetition_filters.GopherRepetitionFilter(
        **{**GOPHER_REPETITION_OFF, **GOPHER_REPETITION[rule]}
    )
    assert_agrees(quality.gopher_repetition(WordBlock.of(varied_texts()))[rule], alone)


@pytest.mark.parametrize("rule", FINEWEB)
def test_each_rule_of_fineweb_drops_what_datatrove_drops(rule, same_words):
    alone = fineweb_quality_filter.FineWebQualityFilter(**{**FINEWEB_OFF, **FINEWEB[rule]})
    assert_agrees(quality.fineweb(varied_texts(), num_words_of(varied_texts()))[rule], alone)


def test_c4_keeps_the_same_lines_and_drops_the_same_documents_as_datatrove(same_words):
    reasons = {
        "lorem_ipsum": "lorem ipsum",
        "curly_bracket": "curly bracket",
        "too_few_sentences": "too few sentences",
    }
    seen = dict.fromkeys((*reasons.values(), "lines removed", "all kept"), 0)
    for text in varied_texts():
        document = Document(text=text, id="0")
        answer = c4_filters.C4QualityFilter().filter(document)
        rule = None if answer is True else reasons[answer[1]]
        assert c4(text) == (document.text, rule)
        seen[rule or ("all kept" if document.text == text else "lines removed")] += 1
    assert min(seen.values()) >= 5, seen


NAMES = {
    "gopher_short_doc": "too few words",
    "gopher_long_doc": "too many words",
    "gopher_below_avg_threshold": "mean word length too low",
    "gopher_above_avg_threshold": "mean word length too high",
    "gopher_too_many_hashes": "hash marks",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullet lines",
    "gopher_too_many_end_ellipsis": "lines ending in an ellipsis",
    "gopher_below_alpha_threshold": "words without a letter",
    "gopher_enough_stop_words": "stop words",
    "empty": "empty",
    "dup_para_frac": "duplicate paragraphs",
    "dup_para_char_frac": "duplicate paragraph characters",
    "dup_line_frac": "duplicate lines",
    "dup_line_char_frac": "duplicate line characters",
    **{f"top_{n}_gram": f"top {n}-gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"duplicate {n}-grams" for n in range(5, 11)},
    "line_punct_ratio": "lines without an end mark",
    "short_line_ratio": "short lines",
    "char_dup_ratio": "duplicate line characters",
    "list_ratio": "newlines per word",
}
"""datatrove's reason -> the name of the rule here."""


@pytest.mark.parametrize(
    ("rules", "datatrove_filter"),
    [
        ("gopher_quality", gopher_quality_filters.GopherQualityFilter()),
        ("gopher_repetition", gopher_repetition_filters.GopherRepetitionFilter()),
        ("fineweb", fineweb_quality_filter.FineWebQualityFilter()),
    ],
)
def test_the_first_broken_rule_is_the_one_that_datatrove_names(
    rules: QualityRules, datatrove_filter, same_words
):
    texts = ["", " \n\t", "\n", *varied_texts()]
    answers = [datatrove_filter.filter(Document(text=text, id="0")) for text in texts]
    named = [None if answer is True else f"{rules}: {NAMES[answer[1]]}" for answer in answers]
    assert [verdict.broken for verdict in judge(texts, [rules])] == named
    assert len(set(named)) > 4


def test_symbols_are_those_of_datatrove():
    assert set(quality.TERMINAL_MARKS) == TERMINAL_PUNCTUATION
    assert set(quality.SYMBOLS) == PUNCTUATION_SET


def test_words_hold_together_what_is_written_without_spaces_and_marks_are_words():
    assert words_and_marks("Well, I don't...") == ["Well", ",", "I", "don't", "..."]
    assert words_and_marks("1,000.5 and/or U.S. state-owned -- #1") == [
        *("1,000.5", "and/or", "U.S", ".", "state-owned", "--", "#", "1")
    ]


PROSE = "It was the best of times, and that is what we have to be glad of, said the old man with a smile. "


def broken_rule(text: str, *rules: QualityRules) -> str | None:
    (verdict,) = judge([text], list(rules))
    return verdict.broken


def test_fifty_words_are_enough_for_gopher_and_forty_nine_are_not():
    assert broken_rule("of the boat " * 16 + "sleep now", "gopher_quality") is None  # 16 * 3 + 2 words
    assert broken_rule("of the boat " * 16 + "sleep", "gopher_quality") == "gopher_quality: too few words"


def test_the_top_bigram_counts_its_characters_every_time_it_occurs():
    # `aa bb` 3 times: 15 characters of a text of 75 are 0.2, which is allowed; of 74 more than 0.2.
    text = "aa bb c. aa bb d! aa bb e? "
    assert broken_rule(text + "x" * 48, "gopher_repetition") != "gopher_repetition: top 2-gram"
    assert broken_rule(text + "x" * 47, "gopher_repetition") == "gopher_repetition: top 2-gram"


def test_c4_removes_the_lines_that_are_no_sentences():
    kept = "One line stays as it is. Two sentences it has! Or is it three?"
    removed = [
        "Home | About | Contact",
        "Too short.",
        "And so it goes on and on...",
        "This site needs JavaScript to run.",
        "This site uses cookies to work.",
        "A line with " + "x" * 1001 + " in it.",
    ]
    cited = 'He wrote it down[3] and said "so be it."'
    assert c4("\n".join([kept, *removed, "", cited, kept])) == (
        f'{kept}\nHe wrote it down and said "so be it."\n{kept}',
        None,
    )


def test_c4_drops_a_document_for_a_bracket_filler_text_or_too_few_sentences():
    sentences = "This is a line of prose.\n" * 5
    assert broken_rule(sentences, "c4") is None
    assert broken_rule(sentences[:-25], "c4") == "c4: too few sentences"
    assert broken_rule(sentences + "Call f() { now }, please.", "c4") == "c4: curly bracket"
    assert broken_rule(sentences + "Lorem ipsum dolor sit amet.", "c4") == "c4: lorem ipsum"
    assert judge(["Too short."], ["c4"]) == [Verdict(text="Too short.", broken="c4: too few sentences")]


def test_rules_after_c4_see_the_text_without_the_removed_lines():
    text = (
        "This is a line of prose that is long enough.\nAnd another one is here.\n" * 3 + "short\nline\n" * 20
    )
    assert broken_rule(text, "fineweb") == "fineweb: short lines"
    assert broken_rule(text, "c4", "fineweb") == "fineweb: duplicate line characters"


def test_the_first_set_in_the_order_given_is_named():
    assert broken_rule("x", "gopher_quality", "c4") == "gopher_quality: too few words"
    assert broken_rule("x", "c4", "gopher_quality") == "c4: too few sentences"
    assert (
        broken_rule(PROSE * 2, "gopher_repetition", "gopher_quality")
        == "gopher_repetition: duplicate 5-grams"
    )


def test_a_verdict_does_not_depend_on_the_other_documents_of_the_block():
    rules: list[QualityRules] = ["gopher_repetition", "gopher_quality", "c4", "fineweb"]
    texts = varied_texts()[:120]
    together = judge(texts, rules)
    assert together == [judge([text], rules)[0] for text in texts]
    assert judge(texts[::-1], rules) == together[::-1]
    assert judge([], rules) == []
