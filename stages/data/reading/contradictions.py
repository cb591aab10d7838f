"""Contradictions: what the further columns of a preference row say against the order of its pair.

    row, names of its two sides --contradiction--> "margin -1.0", or nothing

Owns: which columns tell how good an answer is, and which way. A list of two scores says nothing: whose is the
first, is not told. Does not own: reading pairs (rows), counting (observations). Light import.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

Sides = tuple[str, str]
"""What the chosen and the rejected answer are called."""
_SCORE_WORDS = {"score", "scores", "rating", "ratings", "reward", "rewards", "grade", "quality"}
_RANK_WORDS = {"rank", "ranks", "ranking", "rankings"}
_MARGIN_WORDS = {"margin"}
_WINNER_WORDS = {"winner", "preferred", "preference", "better"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def contradiction(row: Mapping[str, Any], sides: Sequence[Sides]) -> str:
    """The first thing in a row that speaks against its pair, as it stands there; empty: nothing does."""
    return next(_contradictions(row, sides), "")


def _contradictions(row: Mapping[str, Any], sides: Sequence[Sides]) -> Iterator[str]:
    own = [(chosen, rejected) for chosen, rejected in sides if chosen in row and rejected in row]
    for column, value in row.items():
        words = {word.lower() for word in _WORD.findall(column)}
        sign = -1 if words & _RANK_WORDS else 1 if words & _SCORE_WORDS else 0  # a low rank is a good one
        if sign:
            for better, worse in _beside(column, row, sides):
                if _is_not_above(row[better], row[worse], sign):
                    yield f"{better} {row[better]}, {worse} {row[worse]}"
            yield from _inside(column, value, sides, sign)
        elif _names_the_other(words, value, own):
            yield f"{column} {value}"


def _beside(column: str, row: Mapping[str, Any], sides: Sequence[Sides]) -> Iterator[tuple[str, str]]:
    """This column and that of the other answer, where their names differ in the side alone.

    Example: (score_chosen, score_rejected), (chosen-rating, rejected-rating), (chosenReward, rejectedReward).
    """
    for chosen, rejected in sides:
        for as_written in (str, str.capitalize, str.upper):
            other = column.replace(as_written(chosen), as_written(rejected))
            if other != column and other in row:
                yield column, other


def _inside(column: str, value: Any, sides: Sequence[Sides], sign: int) -> Iterator[str]:
    """Of an object that holds both: {"chosen": 1, "rejected": 9}."""
    if isinstance(value, Mapping):
        for chosen, rejected in sides:
            if _is_not_above(value.get(chosen), value.get(rejected), sign):
                yield f"{column}.{chosen} {value[chosen]}, {column}.{rejected} {value[rejected]}"


def _names_the_other(words: Collection[str], value: Any, own: Sequence[Sides]) -> bool:
    """Of a negative margin, and of a column that calls the rejected answer the better one, in a row that has
    both answers under these names.
    """
    if not own:
        return False
    if not _MARGIN_WORDS.isdisjoint(words):
        return (_number(value) or 0) < 0
    return not _WINNER_WORDS.isdisjoint(words) and value in [rejected for _, rejected in own]


def _is_not_above(better: Any, worse: Any, sign: int) -> bool:
    high, low = _number(better), _number(worse)
    return high is not None and low is not None and sign * high <= sign * low


def _number(value: Any) -> float | None:
    """A score as a number, also as a table of text holds it; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
