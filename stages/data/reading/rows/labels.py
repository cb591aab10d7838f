"""Labels: what a value says as true or false.

    true | 1 | "1.0" | "False" | … --label_of--> true, false or None

Owns the words of tables without booleans, and the words that judge an answer and are no label. Does not own
which column holds a label (schemas, preferences) or a mark (marks). Light import.
"""

from typing import Any

_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
_VERDICTS = {
    *("yes", "y", "t", "good", "better", "chosen", "accepted", "positive", "pos", "correct", "right"),
    *("desirable", "preferred", "like", "liked", "upvote", "up", "thumbsup", "pass", "win", "+1"),
    *("no", "n", "f", "bad", "worse", "rejected", "negative", "neg", "incorrect", "wrong"),
    *("undesirable", "dispreferred", "dislike", "disliked", "downvote", "down", "thumbsdown", "fail", "lose"),
    *("-1", "-1.0"),
}
"""Words that say of an answer whether it is a good one, without hyphens, spaces and underscores in them."""


def label_of(value: Any) -> bool | None:
    """What a value says as a label: true or false, 1 or 0, or either as text, for tables without booleans;
    None: it is none.
    """
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    word = value.strip().lower() if isinstance(value, str) else ""
    if word in _TRUE:
        return True
    return False if word in _FALSE else None


def is_verdict(value: Any) -> bool:
    """Whether a value judges an answer in words or numbers other than those of a label: `bad`, -1."""
    if isinstance(value, int | float):
        return value == -1
    if not isinstance(value, str):
        return False
    word = value.strip().lower()
    return word in _VERDICTS or word.translate(str.maketrans("", "", " -_")) in _VERDICTS
