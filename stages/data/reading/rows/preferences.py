"""Preferences: rows of reward -> Pair: one prompt, a chosen and a rejected continuation.

    chosen, rejected (+ prompt | conversations) --common beginning to the prompt--> Pair

Owns where the prompt ends and the two sides begin, and a label that says which side is the better one. Does
not own questions (prompts), turns (turns), or which of several responses is better (ranked, trees). Light
import.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from stages.data.reading.records import Message, Messages, Pair
from stages.data.reading.rows.advice import UNKNOWN, Advice
from stages.data.reading.rows.calls import tools_of
from stages.data.reading.rows.cells import Cells, RowError, as_text, filled, unpacked
from stages.data.reading.rows.conversations import check_unanswered
from stages.data.reading.rows.guesses import could_be_read, is_talk, likely
from stages.data.reading.rows.labels import label_of
from stages.data.reading.rows.prompts import asked
from stages.data.reading.rows.transcripts import is_transcript, turns_of
from stages.data.reading.rows.turns import as_messages, listed_messages, unpacked_messages, with_system
from stages.data.reading.rows.wording import described, in_yaml, listed

SIDES = {"chosen": ("chosen",), "rejected": ("rejected",)}

_DECIDED_BY = {
    ("human_ref_A", "human_ref_B"): ("labels", (1, 0)),
    ("response_0", "response_1"): ("better_response_id", (0, 1)),
}
"""Two answers of a row -> the column that says which is better, and its value for either (SHP,
PKU-SafeRLHF).
"""
_SAYS_WHICH = re.compile(
    r"labels?|(?:.*[_-])?(?:winner|choice|chosen|prefer(?:red|ence)?|better|safer|best)(?:[_-].*)?",
    re.IGNORECASE,
)
"""Names of columns that may say which of two answers is better, in words or numbers of their own."""
_COUNTED = ({"first", "second"}, {"one", "two"}, {"left", "right"})
"""Words by which two of a kind are told apart, beside letters and digits."""


def preference(cells: Cells) -> tuple[Pair, ...]:
    """`chosen` and `rejected` as text or messages; the prompt has its own column, or both begin with it."""
    named = [(name, unpacked_messages(value, name)) for name, value in _sides(cells)]
    for name, value in named:
        if not isinstance(value, str | Mapping | list):
            raise RowError(f"{name}: expected text, got {described(value)}")
    if len({isinstance(value, str) for _, value in named}) > 1:
        raise RowError(f"{named[1][0]}: one of chosen and rejected is text, the other messages")
    question = cells.optional("prompt")
    if question is None and isinstance(named[0][1], str):
        return hh_pair(cells) if is_transcript(named[0][1]) else (_pair_of_texts(cells),)
    chosen, rejected = (as_messages(value, name, "assistant", cells) for name, value in named)
    if question is None:
        return (pair_of_messages((), with_system(cells, chosen), with_system(cells, rejected), cells),)
    prompt = asked(cells, "prompt")
    check_unanswered(prompt, question[0])
    is_text = isinstance(unpacked_messages(question[1], question[0]), str)
    return (_after_prompt(prompt, chosen, rejected, cells, is_text=is_text),)


def sharegpt_preference(cells: Cells) -> tuple[Pair, ...]:
    """`conversations` up to the question, `chosen` and `rejected` as `{from, value}` or text."""
    column, prompt = listed_messages(cells, "conversations")
    check_unanswered(prompt, column)
    chosen, rejected = (as_messages(value, name, "assistant", cells) for name, value in _sides(cells))
    return (_after_prompt(prompt, chosen, rejected, cells, is_text=False),)


def hh_pair(cells: Cells) -> tuple[Pair, ...]:
    """Two transcripts that part somewhere."""
    chosen, rejected = (turns_of(as_text(value, name), name) for name, value in _sides(cells))
    return (pair_of_messages((), chosen, rejected, cells),)


def label_is_no_pair(cells: Cells) -> NoReturn:
    """A labelled answer has no other answer beside it."""
    column, _ = cells.required("label")
    raise RowError(f"{column}: one labelled answer is no pair of answers; use this source for sft or ppo")


def deciding_label(cells: Cells) -> str | None:
    """The column that says which of two answers is the better one, where their names do not."""
    found = _decision(cells)
    return None if found is None else found[1]


def _decision(cells: Cells) -> tuple[tuple[str, str], str, tuple[int, int]] | None:
    """(two answers, the column that says which is better, its value for either), where the row has them."""
    names = {cells.column(field) for field in SIDES if cells.has_field(field)}
    known = ((answers, *by) for answers, by in _DECIDED_BY.items() if {*answers} == names)
    return next((one for one in known if one[1] in cells.row), None)


def _sides(cells: Cells) -> list[tuple[str, Any]]:
    """(column, value) of the better answer, then of the other: as their names say, or a label beside two
    answers whose names do not. Raises RowError for a label whose meaning is not known.
    """
    sides = [cells.required(field) for field in SIDES]
    names = [name for name, _ in sides]
    decision = _decision(cells)
    if decision is not None:
        answers, label, values = decision
        says = label_of(cells.row[label])
        if says is None:
            found = described(cells.row[label])
            raise RowError(f"{label}: expected {values[0]} or {values[1]}, got {found}")
        return sorted(sides, key=lambda side: side[0] != answers[values.index(int(says))])
    read = {*names, *cells.columns.values()}
    if _are_alike(*names):
        telling = [name for name in cells.row if _SAYS_WHICH.fullmatch(name) and name not in read]
        deciding = next((name for name in telling if cells.row[name] not in (None, "")), None)
        if deciding is not None:
            raise RowError(
                Advice.TWO_ANSWERS_AND_A_LABEL.line(label=deciding, chosen=names[0], rejected=names[1])
            )
    return sides


def _are_alike(one: str, other: str) -> bool:
    """Whether two columns are named like two of a kind: `response_a` and `response_b`, `model_a_answer` and
    `model_b_answer`, `first_answer` and `second_answer`.
    """
    words = [re.split(r"[\W_]+", name.lower()) for name in (one, other)]
    if any({*words[0]} ^ {*words[1]} == pair for pair in _COUNTED):
        return True
    begin = len(_common_prefix(one, other))
    end = len(_common_prefix(one[begin:][::-1], other[begin:][::-1]))
    rest = [name[begin : len(name) - end].strip("_-. ") for name in (one, other)]
    return one != other and begin + end > 1 and all(len(name) <= 1 for name in rest)


def _after_prompt(
    prompt: Messages, chosen: Messages, rejected: Messages, cells: Cells, *, is_text: bool
) -> Pair:
    """The sides may be whole conversations: what they repeat of the prompt is taken once. Where the prompt is
    text and they begin otherwise, or end with it, they tell it all (TRL's rule); a system message of theirs
    wins.
    """
    system, question = _without_system(prompt)
    own, shared = _without_system(_common_prefix(chosen, rejected))
    begin = len(own) + len(shared)
    repeated = _num_repeated(question, shared)
    is_whole = bool(shared) and shared[0].role != "assistant"
    if is_whole and not repeated and (is_text or _same(shared[-len(question) :], question)):
        question = shared
    else:
        question += shared[repeated:]
    return pair_of_messages((own or system) + question, chosen[begin:], rejected[begin:], cells)


def _without_system(messages: Messages) -> tuple[Messages, Messages]:
    """(its system message, if it begins with one; the other messages)."""
    at = int(bool(messages) and messages[0].role == "system")
    return messages[:at], messages[at:]


def _num_repeated(before: Messages, after: Messages) -> int:
    """How many messages at the end of `before` stand at the beginning of `after` again."""
    longest = min(len(before), len(after))
    return next((n for n in range(longest, 0, -1) if _same(before[-n:], after[:n])), 0)


def _same(one: Messages, other: Messages) -> bool:
    """Equal but for white space around what is said."""
    return [replace(turn, content=turn.content.strip()) for turn in one] == [
        replace(turn, content=turn.content.strip()) for turn in other
    ]


def _pair_of_texts(cells: Cells) -> Pair:
    """No prompt column: the shared beginning is the prompt, back to its last line break, or else its last
    space: two answers may begin with the same words. Only where no other column may hold the prompt.
    """
    (column, chosen), (other, rejected) = _sides(cells)
    for name, side in ((column, chosen), (other, rejected)):
        filled(as_text(side, name), name, "response")
    if chosen == rejected:
        raise RowError(f"{other}: the same as {column}; remove the row, or set on_bad_row: skip")
    _check_all_is_read(cells, column, other)
    shared = _common_prefix(chosen, rejected)
    breaks = [shared.rfind("\n") + 1, max(shared.rfind(space) for space in " \t") + 1]
    cut = next(
        (at for at in breaks if shared[:at].strip() and chosen[at:].strip() and rejected[at:].strip()), 0
    )
    if not cut:
        raise RowError(Advice.NO_PROMPT.line(column=column, other=other))
    cells.shared_prompt = shared[:cut].rstrip()
    prompt = with_system(cells, (Message(role="user", content=cells.shared_prompt),))
    return pair_of_messages(prompt, _said(chosen[cut:]), _said(rejected[cut:]), cells)


def _check_all_is_read(cells: Cells, column: str, other: str) -> None:
    """Raise RowError where a further column holds text, at any depth, and so perhaps the prompt."""
    fields = ("chosen", "rejected", "system", "tools")
    read = {cells.group_column, *(cells.column(field) for field in fields if cells.has_field(field))}
    unread = {name: value for name, value in cells.row.items() if name not in read and _holds_text(value)}
    if not unread:
        return
    readable = [name for name, value in unread.items() if could_be_read(value)]
    talk = next((name for name, value in unread.items() if is_talk(unpacked(value))), UNKNOWN)
    prompt = likely("prompt", readable) or talk
    raise RowError(
        Advice.PROMPT_NOT_READ.line(
            column=column,
            other=other,
            unread=listed(unread),
            prompt=in_yaml(prompt),
        )
    )


def _holds_text(value: Any) -> bool:
    left = [value]
    while left:  # and no recursion: a row may be as deep as it likes
        inner = left.pop()
        if isinstance(inner, str) and inner.strip():
            return True
        if isinstance(inner, Mapping | list):
            left += inner.values() if isinstance(inner, Mapping) else inner
    return False


def _said(text: str) -> Messages:
    return (Message(role="assistant", content=text),)


def pair_of_messages(prompt: Messages, chosen: Messages, rejected: Messages, cells: Cells) -> Pair:
    """The longest common beginning of the two sides belongs to the prompt. Raises RowError."""
    names = {field: cells.column(field) or field for field in SIDES}
    if chosen == rejected:
        raise RowError(
            f"{names['rejected']}: the same as {names['chosen']}; remove the row, or set on_bad_row: skip"
        )
    shared = len(_common_prefix(chosen, rejected))
    prompt = prompt + chosen[:shared]
    for field, side in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        _check_side(side, names[field])
    if not prompt:
        _check_all_is_read(cells, names["chosen"], names["rejected"])
        raise RowError(Advice.NO_PROMPT.line(column=names["chosen"], other=names["rejected"]))
    if prompt[0].role == "assistant":
        raise RowError(f"{names['chosen']}: starts with the assistant: no prompt")
    return Pair(
        prompt=prompt,
        chosen=chosen[shared:],
        rejected=rejected[shared:],
        row=cells.row,
        tools=tools_of(cells),
    )


def _check_side(side: Messages, name: str) -> None:
    if not side:
        raise RowError(f"{name}: empty response: it is a beginning of the other one")
    if side[0].role != "assistant" or side[-1].role != "assistant":
        raise RowError(f"{name}: after the shared prompt comes no answer of the assistant, up to the end")


def _common_prefix(one: Any, other: Any) -> Any:
    length = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return one[:length]
