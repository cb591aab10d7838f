"""Ranked: K responses to one prompt, with scores or ranks -> the pairs whose margin is large enough.

    prompt, responses (+ scores | ranks) --every two, margin > min_margin--> (Pair, ...)

Owns the shapes of rated data and which response of two is preferred. Does not own the prompt (prompts) or
trees of replies (trees). Light import.

Shapes: texts with a parallel list of `scores` (higher is better) or `ranks` (lower is better), or objects
that hold text and score (UltraFeedback, Nectar). Scores win over ranks where a row has both. A response
without a score (null) is in no pair, and neither are two equal ones, whatever their scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from stages.data.reading.records import Messages, Pair
from stages.data.reading.rows.advice import UNKNOWN, Advice
from stages.data.reading.rows.calls import tools_of
from stages.data.reading.rows.cells import Cells, RowError, unlike, unpacked
from stages.data.reading.rows.conversations import answer, check_unanswered
from stages.data.reading.rows.guesses import score_key, text_key
from stages.data.reading.rows.prompts import asked
from stages.data.reading.rows.wording import described, in_yaml, listed

_TEXT_KEYS = ("response", "text", "content", "answer", "completion", "output", "messages")
_SCORE_KEYS = ("score", "overall_score", "rating", "reward")
_RANK_KEYS = ("rank",)
_LARGEST = 1e300  # differences of two such still are finite

RATED = {
    "responses": ("responses", "completions", "answers", "generations", "candidates"),
    "scores": ("scores", "ratings", "rewards"),
    "ranks": ("ranks", "rank"),
}
"""Fields of rated responses -> the columns looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """A response and how good it is."""

    messages: Messages
    merit: float | None  # higher is better: the score, or minus the rank; None: not rated


def holds_responses(cells: Cells) -> bool:
    """Whether the row has several responses, rated or not."""
    return cells.column("responses") is not None


def ranked(cells: Cells) -> tuple[Pair, ...]:
    """All pairs of the row whose margin exceeds `min_margin`. Raises RowError."""
    prompt = asked(cells, "prompt")
    check_unanswered(prompt, cells.required("prompt")[0])
    return pairs_of(prompt, rated_responses(cells), cells)


def pairs_of(prompt: Messages, responses: Sequence[Rated], cells: Cells) -> tuple[Pair, ...]:
    """Every two responses that differ in text and, by more than `min_margin`, in merit."""
    pairs = []
    tools = tools_of(cells)
    for one, other in combinations(responses, 2):
        if one.merit is None or other.merit is None or one.messages == other.messages:
            continue
        if abs(one.merit - other.merit) <= cells.min_margin:
            continue
        better, worse = (one, other) if one.merit > other.merit else (other, one)
        pairs.append(
            Pair(prompt=prompt, chosen=better.messages, rejected=worse.messages, row=cells.row, tools=tools)
        )
    return tuple(pairs)


def rated_responses(cells: Cells) -> tuple[Rated, ...]:
    """The responses of a row in its order. Raises RowError."""
    column, items = cells.required("responses")
    items = unpacked(items)
    if not isinstance(items, list):
        raise unlike(items, column, "a list of responses")
    if len(items) < 2:
        raise RowError(f"{column}: {len(items)} responses; a pair needs two")
    merits = _listed_merits(cells, column, len(items))
    names = [f"{column}[{index}]" for index in range(len(items))]
    if merits is None:
        merits = [_merit_inside(cells, item, name) for item, name in zip(items, names, strict=True)]
    return tuple(
        Rated(messages=_response(cells, item, name), merit=merit)
        for item, name, merit in zip(items, names, merits, strict=True)
    )


def _listed_merits(cells: Cells, column: str, num_responses: int) -> list[float | None] | None:
    """From the columns `scores` or `ranks`, parallel to the responses; None: the row has neither."""
    for field, sign in (("scores", 1), ("ranks", -1)):
        found = cells.optional(field)
        if found is None:
            continue
        name, values = found[0], unpacked(found[1])
        if not isinstance(values, list):
            raise unlike(values, name, "a list of numbers")
        if len(values) != num_responses:
            raise RowError(f"{name}: {len(values)} numbers for {num_responses} responses in {column}")
        return [_merit(value, f"{name}[{index}]", sign) for index, value in enumerate(values)]
    return None


def _merit_inside(cells: Cells, item: Any, name: str) -> float | None:
    if not isinstance(item, Mapping):
        raise RowError(Advice.NO_SCORES.line(response=name, scores=_scores_beside(cells)))
    for keys, sign in ((_SCORE_KEYS, 1), (_RANK_KEYS, -1)):
        key = next((key for key in keys if key in item), None)
        if key is not None:
            return _merit(item[key], f"{name}.{key}", sign)
    key = score_key(item)
    field = "ranks" if key is not None and "rank" in key.lower() else "scores"
    advised = _in_items(cells, field, key)
    raise RowError(Advice.SCORE_KEY.line(response=name, keys=listed(item), advised=advised))


def _scores_beside(cells: Cells) -> str:
    """The column that may hold the responses' scores: a list of as many numbers."""
    responses = unpacked(cells.required("responses")[1])
    lists = {column: unpacked(value) for column, value in cells.row.items()}
    return next(
        (
            in_yaml(column)
            for column, values in lists.items()
            if isinstance(values, list)
            and len(values) == len(responses)
            and all(isinstance(value, int | float) for value in values)
        ),
        UNKNOWN,
    )


def _in_items(cells: Cells, field: str, key: str | None) -> str:
    """`field: column.*.key`, a path that reaches into every response."""
    column = cells.required("responses")[0]
    return f"{field}: {UNKNOWN if key is None else in_yaml(f'{column}.*.{key}')}"


def _merit(value: Any, name: str, sign: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"{name}: expected a number, got {described(value)}")
    if not abs(value) <= _LARGEST:  # neither do NaN and infinity compare so
        raise RowError(f"{name}: expected a number that is finite, got {described(value)}")
    return sign * float(value)


def _response(cells: Cells, item: Any, name: str) -> Messages:
    """Text, messages, or an object that holds either beside its score."""
    if not isinstance(item, Mapping):
        return answer(name, item, cells)
    if "role" in item or "from" in item:
        rated = (*_SCORE_KEYS, *_RANK_KEYS)
        return answer(name, {key: value for key, value in item.items() if key not in rated}, cells)
    key = next((key for key in _TEXT_KEYS if key in item), None)
    if key is None:
        scores = [field for field in ("scores", "ranks") if cells.optional(field) is not None]
        inside = [] if scores else [_in_items(cells, "scores", score_key(item))]
        advised = ", ".join([_in_items(cells, "responses", text_key(item)), *inside])
        raise RowError(Advice.RESPONSE_KEY.line(response=name, keys=listed(item), advised=advised))
    return answer(f"{name}.{key}", item[key], cells)
