"""Languages: which language a document is written in, by py3langid.

    text --first characters--> byte n-grams --naive Bayes--> (code, probability)

Owns how much of a document is looked at and what a text without letters is. Does not own which languages are
kept (prepare). Codes are ISO 639-1 where the language has one (`en`), else ISO 639-3 (`arz`).
"""

import re
from collections.abc import Sequence
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from stages.config.prepare import PrepareConfig
from stages.errors import DataError

LANGUAGE_CHARS = 1000
"""Characters from the start of a document that decide (0.4 ms): web texts get the same language from 2000 of
them, but not all from 500.
"""
UNDETERMINED = "und"
"""ISO 639-2 for a text whose language cannot be told."""

_LETTER = re.compile(r"[^\W\d_]")
_NO_LANGUAGE = "zxx"


def identify(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Per text its language and that language's probability among all the model knows, in [0, 1].

    Whatever has no letter, or no letters that the model has seen, is ("und", 0.0).
    """
    return [_identify(text[:LANGUAGE_CHARS]) for text in texts]


def check_languages(codes: Sequence[str]) -> None:
    """Raise DataError if one of `prepare.languages` is not a code that `identify` can answer."""
    known = [code for code in _identifier().labels if code != _NO_LANGUAGE]
    unknown = [code for code in codes if code not in known]
    if unknown:
        raise DataError(
            f"{PrepareConfig.KEY}.languages: no language has the code {', '.join(map(repr, unknown))}; "
            f"known are {', '.join(sorted(known))}"
        )


def _identify(text: str) -> tuple[str, float]:
    if _LETTER.search(text) is None:
        return UNDETERMINED, 0.0
    code, probability = _identifier().classify(text)
    return (code, probability) if code not in (UNDETERMINED, _NO_LANGUAGE) else (UNDETERMINED, 0.0)


@cache
def _identifier() -> LanguageIdentifier:
    """The model, once per process.

    A text without anything that the model knows has the same probability in all its classes (two of them are
    Serbian); below three times that its language is undetermined.
    """
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.min_confidence = 3 / len(identifier.nb_classes)
    return identifier
