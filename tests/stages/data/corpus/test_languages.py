"""Languages: plain sentences get their code, what has no letters none, unknown codes one line."""

import pytest

from stages.data.corpus.languages import LANGUAGE_CHARS, check_languages, identify
from stages.errors import DataError

SENTENCES = {
    "en": "The old bridge was closed for repairs, so we had to walk all the way around the lake.",
    "de": "Die alte Brücke war wegen Reparaturen gesperrt, also mussten wir um den ganzen See laufen.",
    "fr": "Le vieux pont était fermé pour des travaux, alors nous avons fait le tour du lac à pied.",
    "es": "El viejo puente estaba cerrado por obras, así que tuvimos que caminar alrededor del lago.",
    "ko": "오래된 다리는 수리 때문에 폐쇄되어서 우리는 호수를 돌아 걸어가야 했습니다.",
    "ja": "古い橋は修理のために閉鎖されていたので、私たちは湖の周りを歩きました。",
}


def test_plain_sentences_are_in_their_language_almost_surely():
    answers = identify(list(SENTENCES.values()))
    assert [code for code, _ in answers] == list(SENTENCES)
    assert all(0.9 < probability <= 1 for _, probability in answers)


@pytest.mark.parametrize("text", ["", " \n", "12345 !!! 678", "\u2022 \u2014 \u20ac 3.50", "_____"])
def test_a_text_without_letters_is_in_no_language(text):
    assert identify([text]) == [("und", 0.0)]


def test_letters_that_the_model_knows_nothing_about_are_in_no_language():
    assert identify(["ok"]) == [("und", 0.0)]


def test_only_the_start_of_a_document_decides():
    start = (SENTENCES["en"] + " ") * (LANGUAGE_CHARS // len(SENTENCES["en"]) + 1)
    assert identify([start + SENTENCES["de"] * 1000]) == identify([start])


def test_a_mixture_is_less_certain_than_its_parts():
    ((_, mixture),) = identify([SENTENCES["en"][:40] + SENTENCES["de"][:40]])
    assert mixture < min(probability for _, probability in identify([SENTENCES["en"], SENTENCES["de"]]))


def test_each_text_is_judged_alone():
    texts = [*SENTENCES.values(), ""]
    assert identify(texts) == [identify([text])[0] for text in texts]
    assert identify([]) == []


def test_known_codes_pass():
    check_languages(["en", "de", "zh"])
    check_languages([])


@pytest.mark.parametrize("code", ["english", "EN", "zxx", "und", ""])
def test_an_unknown_code_is_named_with_the_known_ones(code):
    with pytest.raises(DataError) as caught:
        check_languages(["en", code])
    message = str(caught.value)
    assert message.startswith(f"prepare.languages: no language has the code {code!r}; known are ace, af, am,")
    assert "\n" not in message
