"""The demo's judge: is a response correct, polite and short? Each in [0, 1], and one total.

    words -> answers named -> correct, polite, short -> total = correct * (0.5 + 0.25 * polite + 0.25 * short)

Only a right answer earns anything: being polite or brief about a wrong one is worth nothing. A response
that names no answer of its category, or that repeats itself, scores zero on every component: silence is not
brevity.
"""

import re
from collections.abc import Mapping
from typing import Any

POLITE = ("glad to help", "happy to help", "you are welcome", "good question")
RUDE = ("obviously", "silly question", "everyone knows", "stop asking")

SHORT_WORDS = 10  # an answer and a courtesy fit; nothing else does
LONG_WORDS = 14  # from here on brevity is 0; linear in between
MIN_DISTINCT_FRAC = 0.6  # below this share of distinct words a response is repetition


def score(prompt: str, response: str, row: Mapping[str, Any]) -> dict[str, float]:
    """Judge one response; `row` is the prompt's data row: its `answer`, its category's `other_answers`.

    Example: score("What does a cow say?", "Good question! Moo.", {"answer": "moo", "other_answers": ["baa"]})
             -> {"score": 1.0, "correct": 1.0, "polite": 1.0, "short": 1.0}
    """
    words = re.findall(r"[a-z]+", response.lower())
    text = " ".join(words)
    named = {row["answer"].lower(), *(other.lower() for other in row["other_answers"])}.intersection(words)
    if not named or len(set(words)) < MIN_DISTINCT_FRAC * len(words):
        return {"score": 0.0, "correct": 0.0, "polite": 0.0, "short": 0.0}

    correct = float(named == {row["answer"].lower()})
    polite = float(any(marker in text for marker in POLITE) and not any(marker in text for marker in RUDE))
    short = min(1.0, max(0.0, (LONG_WORDS - len(words)) / (LONG_WORDS - SHORT_WORDS)))
    total = correct * (0.5 + 0.25 * polite + 0.25 * short)
    return {"score": total, "correct": correct, "polite": polite, "short": short}
