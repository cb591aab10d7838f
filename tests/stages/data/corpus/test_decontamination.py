"""Decontamination: runs of words are found whatever stands between them, and nothing shorter is."""

import random
import sys
import unicodedata

import pytest

from stages.data.corpus import words
from stages.data.corpus.decontamination import Contamination, num_too_short
from stages.data.corpus.words import BLOCK_CHARS, blocks_of, hash_words, ngrams, normalised_words

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
RUN = "natalia sold clips to 48 of her friends in april and then she"
"""The first 13 words of it."""


def test_words_are_lower_case_without_punctuation_line_ends_or_typographic_variants():
    assert normalised_words("The U.S., in 2024:\nyes_no") == ["the", "u", "s", "in", "2024", "yes", "no"]
    assert normalised_words("Don\u2019t STOP") == normalised_words("don't\tstop!") == ["don", "t", "stop"]
    assert normalised_words("\uff21\uff22\uff23 \ufb01ne \u00c9t\u00e9") == ["abc", "fine", "\u00e9t\u00e9"]
    assert normalised_words("cafe\u0301") == ["caf\u00e9"]
    assert normalised_words("\u4f60\u597d, \u3053\u306eGPU") == [
        "\u4f60",
        "\u597d",
        "\u3053",
        "\u306e",
        "gpu",
    ]
    assert normalised_words("... \u2014 !") == []


def test_marks_belong_to_the_word_they_stand_in():
    hindi = "\u0939\u093f\u0928\u094d\u0926\u0940"  # Hindi, with vowel signs and a virama
    arabic = "\u0643\u064e\u062a\u064e\u0628\u064e"  # kataba, vocalised
    assert normalised_words(f"{hindi}, {arabic}!") == [hindi, arabic]
    assert normalised_words("\u0130stanbul i\u0307") == ["istanbul", "i"]
    assert normalised_words("x\u0301y \u0301") == ["x\u0301y"]
    keys, dogs = "\u0915\u0940", "\u0915\u0941"  # one consonant with two vowel signs
    assert Contamination([f"{keys} " * 13]).shared_run(f"{dogs} " * 13) is None


def test_scripts_without_spaces_give_a_word_for_each_letter_with_its_marks():
    thai = ["\u0e14\u0e35", "\u0e04", "\u0e23\u0e31", "\u0e1a"]
    khmer = ["\u1781\u17d2", "\u1798\u17c2", "\u179a"]
    assert normalised_words("".join(thai) + "!") == thai
    assert normalised_words("".join(khmer) + " \u17d4") == khmer  # a full stop is no word
    assert normalised_words("\u0eaa\u0eb0 \u1019\u103c\u1014\u103a") == [
        "\u0eaa",
        "\u0eb0",
        "\u1019\u103c",
        "\u1014\u103a",
    ]


def test_every_mark_of_unicode_continues_a_word():
    characters = map(chr, range(sys.maxunicode + 1))
    marks = [one for one in characters if unicodedata.category(one)[0] == "M"]
    texts = [unicodedata.normalize("NFKC", f"a{mark}b") for mark in marks]
    split = [text for text in texts if len(normalised_words(text)) > 1]
    assert len(marks) > 2000 and [text for text in split if " " not in text] == []


def test_a_character_beyond_ascii_changes_no_other_word():
    rng = random.Random(8)
    for _ in range(200):
        text = "".join(rng.choices([chr(code) for code in range(128)], k=60))
        assert normalised_words(f"{text} \u00e9") == [*normalised_words(text), "\u00e9"]


def test_thirteen_shared_words_are_found_and_twelve_are_not():
    contamination = Contamination([QUESTION])
    shared = RUN.split()
    assert contamination.shared_run("We read: " + " ".join(shared) + " was rich.") == RUN
    assert contamination.shared_run("We read: " + " ".join(shared[:12]) + " was rich.") is None
    assert contamination.shared_run("We read: " + " ".join(shared[1:]) + " was rich.") is None


@pytest.mark.parametrize(
    "document",
    [
        f"{QUESTION} How many did she sell?",
        f"Here is a question. {QUESTION}",
        QUESTION,
        QUESTION.upper(),
        QUESTION.replace(" ", "\n"),
        QUESTION.replace(" ", " -- * "),
        "**Natalia** sold clips (to 48 of her\r\n\r\nfriends) in April; and, then: 'she'",
    ],
)
def test_case_punctuation_and_line_ends_make_no_difference_at_any_place(document):
    assert Contamination([QUESTION]).shared_run(document) == RUN


def test_a_run_at_the_end_of_a_text_is_found_at_the_end_of_a_document():
    last = "and then she sold half as many clips in May"
    contamination = Contamination([QUESTION], ngram=10)
    assert contamination.shared_run(f"It was said: {last}") == last.lower()
    assert contamination.shared_run(f"It was said: {last[:-4]}") is None


def test_changing_one_word_in_thirteen_hides_the_run():
    words_of = QUESTION.split()
    words_of[9] = "June"
    assert Contamination([QUESTION]).shared_run(" ".join(words_of)) is None


def test_a_run_lies_within_one_text_and_one_document():
    first, second = " ".join(RUN.split()[:7]), " ".join(RUN.split()[7:])
    assert Contamination([QUESTION]).shared_runs([first, second]) == [None, None]
    assert Contamination([first, second], ngram=7).shared_run(RUN) == first
    assert Contamination([first, second], ngram=6).shared_run(" ".join(RUN.split()[2:12])) is None


def test_texts_with_too_few_words_are_counted_and_not_looked_for():
    texts = ["What is 2 + 2?", "", RUN, " ".join(RUN.split()[:12])]
    assert num_too_short(texts, 13) == 3 and num_too_short(texts, 12) == 2
    assert Contamination(texts).shared_runs(["What is 2 + 2?", "", RUN]) == [None, None, RUN]


def test_nothing_to_look_for_finds_nothing():
    assert Contamination([]).shared_runs([QUESTION, ""]) == [None, None]
    assert Contamination([QUESTION]).shared_runs([]) == []


def test_the_first_of_several_shared_runs_is_told():
    other = "one two three four five"
    contamination = Contamination([other, QUESTION], ngram=5)
    assert contamination.shared_run(f"{QUESTION} {other}") == "natalia sold clips to 48"
    assert contamination.shared_run(f"{other} {QUESTION}") == other


def test_equal_hashes_of_different_words_drop_no_document(monkeypatch):
    monkeypatch.setattr(words, "_hash", lambda word: 7)  # all words collide
    contamination = Contamination([QUESTION], ngram=5)
    assert contamination.shared_run("these words are not in the question at all, are they?") is None
    assert contamination.shared_run(f"but these are: {QUESTION}") == "natalia sold clips to 48"


def test_many_documents_at_once_give_what_each_gives_alone():
    rng = random.Random(3)
    vocabulary = [f"w{index}" for index in range(6)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 30))) for _ in range(300)]
    contamination = Contamination(texts[:40], ngram=5)
    found = contamination.shared_runs(texts[40:])
    assert found == [contamination.shared_run(text) for text in texts[40:]]
    assert found == [shared_by_definition(text, texts[:40], 5) for text in texts[40:]]
    assert 20 < sum(run is not None for run in found) < 240


def shared_by_definition(text: str, sought: list[str], ngram: int) -> str | None:
    runs = {run for one in sought for run in all_runs(one, ngram)}
    return next((run for run in all_runs(text, ngram) if run in runs), None)


def all_runs(text: str, ngram: int) -> list[str]:
    split = text.split()
    return [" ".join(split[start : start + ngram]) for start in range(len(split) - ngram + 1)]


def test_a_hash_depends_on_the_words_and_their_order_alone():
    one, two = hash_words(["a b c d"]), hash_words(["x y", "A, b c!", "b a c"])
    assert ngrams(one, 3)[0] == ngrams(two, 3)[2] != ngrams(two, 3)[5]
    assert two.lengths_D.tolist() == [2, 3, 3] and two.ends_W.tolist() == [2, 2, 5, 5, 5, 8, 8, 8]
    # blake2b of the word, eight bytes, little-endian: the same in every process and on every machine.
    assert int(hash_words(["a"]).hashes_W[0]) == 0x2F42665B399EF840


def test_blocks_hold_all_texts_in_order_and_not_too_many_characters():
    assert [list(block) for block in blocks_of(["aa", "bb", "c", "dddddd", "e"], 5)] == [
        *(["aa", "bb", "c"], ["dddddd"], ["e"])
    ]
    assert list(blocks_of([])) == []
    assert BLOCK_CHARS > 100_000
