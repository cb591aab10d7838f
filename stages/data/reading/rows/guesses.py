"""Guesses: which column of a row is likely meant by a field that its schema lacks.

    row, required fields --check_columns--> nothing, or one line that maps fields to this row's columns

Owns names that are advised and never read unasked, because they hold other things too. Does not own the words
of the line (advice). Light import.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.data.reading.rows.advice import UNKNOWN, Advice
from stages.data.reading.rows.cells import Cells, RowError, unpacked
from stages.data.reading.rows.wording import in_yaml, listed

_LIKELY: Mapping[str, tuple[str, ...]] = {
    "prompt": (
        *(
            "prompt",
            "question",
            "instruction",
            "query",
            "problem",
            "problem_statement",
            "task",
            "user_prompt",
        ),
        *("user", "human", "history", "post", "input", "request"),
    ),
    "completion": (
        *("completion", "response", "answer", "output", "solution", "generated_solution", "target", "reply"),
        *("assistant", "gpt", "gold", "summary", "generation", "final_answer", "tgt", "chosen"),
    ),
    "chosen": (
        *("chosen", "better", "preferred", "chosen_response", "preferred_output", "positive"),
        *("good", "accepted", "human_ref_a", "response_0", "response_j"),
    ),
    "rejected": (
        *("rejected", "worse", "dispreferred", "rejected_response", "non_preferred_output"),
        *("negative", "bad", "human_ref_b", "response_1", "response_k"),
    ),
    "text": (
        *("text", "content", "body", "document", "article", "page", "raw_content", "passage", "markdown"),
        *("story", "abstract", "maintext"),
    ),
}
LIKELY = {**_LIKELY, "instruction": _LIKELY["prompt"], "output": _LIKELY["completion"]}
"""Columns that are often meant by a field but may hold other things too: advised, never read unasked."""
_NO_CONTENT = (
    "id",
    "uid",
    "uuid",
    "idx",
    "index",
    "url",
    "lang",
    "language",
    "split",
    "date",
    "type",
    "level",
)
_SCORE_WORDS = ("score", "rating", "reward", "vote", "grade", "rank")


def check_columns(cells: Cells, required: Sequence[str], *, is_stated: bool, is_imitated: bool) -> None:
    """Raise RowError for a row without the columns of `required` fields. `is_stated`: the config names the
    format; `is_imitated`: sft, which takes messages as well as prompt and completion.
    """
    lacking = [field for field in required if cells.column(field) is None]
    if not lacking:
        return
    if {"message_id", "parent_id"} <= cells.row.keys():
        raise RowError(Advice.FLAT_TREE.line())
    renamed = next((field for field in lacking if cells.is_renamed(field)), None)
    if renamed is not None:
        cells.required(renamed)  # says where its path breaks
    takes_any = is_imitated and not is_stated and lacking == [*required]
    raise RowError(_nothing_to_imitate(cells) if takes_any else _missing(cells, lacking))


def _nothing_to_imitate(cells: Cells) -> str:
    """The line about a row of sft that is of no schema at all."""
    free = _free(cells)
    talk = next((column for column, value in free.items() if is_talk(unpacked(value))), None)
    if talk is not None:
        return _line(cells, "messages", {"messages": talk})
    advised = _guesses(free, ("prompt", "completion"))
    if UNKNOWN not in advised.values():
        return _line(cells, "prompt", advised)
    return Advice.NOTHING_TO_IMITATE.line(
        columns=listed(cells.row), advised=_in_braces({**cells.columns, **advised})
    )


def _missing(cells: Cells, lacking: Sequence[str]) -> str:
    """The line about a row that lacks some fields of its schema."""
    free = _free(cells)
    advised = _guesses(free, lacking)
    if {"chosen", "rejected"} <= {*lacking} and cells.has_field("prompt") and cells.column("prompt") is None:
        left = {column: value for column, value in free.items() if column not in advised.values()}
        prompt = likely("prompt", left)
        advised = {**({} if prompt is None else {"prompt": prompt}), **advised}
    return _line(cells, lacking[0], advised)


def _free(cells: Cells) -> dict[str, Any]:
    """The columns that no field is read from."""
    read = cells.columns_read()
    if "prompt" not in read and "instruction" not in read:  # with which alone these go
        read = {field: column for field, column in read.items() if field not in ("input", "history")}
    return {column: value for column, value in cells.row.items() if column not in read.values()}


def _line(cells: Cells, field: str, advised: Mapping[str, str]) -> str:
    return Advice.MISSING.line(
        field=field, columns=listed(cells.row), advised=_in_braces({**cells.columns, **advised})
    )


def _in_braces(advised: Mapping[str, str]) -> str:
    return ", ".join(f"{field}: {in_yaml(column)}" for field, column in advised.items())


def _guesses(free: Mapping[str, Any], fields: Sequence[str]) -> dict[str, str]:
    """Field -> the free column that is likely meant, or UNKNOWN."""
    left = {column: value for column, value in free.items() if could_be_read(value)}
    found: dict[str, str] = {}
    for field in fields:
        talk = next((column for column, value in left.items() if is_talk(unpacked(value))), UNKNOWN)
        is_talk_field = field in ("messages", "conversations")
        named = None if is_talk_field else likely(field, left)
        found[field] = named or (talk if is_talk_field or field == "prompt" else UNKNOWN)
        left.pop(found[field], None)
    unknown = [field for field, column in found.items() if column == UNKNOWN and field in LIKELY]
    is_document = "text" in unknown
    rest = [name for name in left if holds_content(name) and not (is_document and is_talk(left[name]))]
    if len(unknown) == 1 and len(rest) == 1:
        found[unknown[0]] = rest[0]
    return found


def likely(field: str, columns: Iterable[str]) -> str | None:
    """The column that goes by a name of the field, whatever its case."""
    by_name = {column.lower(): column for column in columns}
    if field not in LIKELY:
        return None
    return next((by_name[name] for name in LIKELY[field] if name in by_name), None)


def holds_content(column: str) -> bool:
    """Whether a column of that name may hold what is said, not what a row is called or where it is from."""
    name = column.lower()
    return name not in _NO_CONTENT and not name.endswith(("_id", "_url", "_idx", "_type"))


def could_be_read(value: Any) -> bool:
    """Whether a value is text or a list of messages, as most fields hold."""
    return (isinstance(value, str) and bool(value.strip())) or is_talk(value)


def is_talk(value: Any) -> bool:
    """Whether a value is a list of messages, by the keys of its first item."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def score_key(item: Mapping[str, Any]) -> str | None:
    """The key under which a response holds what looks like its score or rank."""
    numbers = [
        key
        for key, value in item.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and holds_content(key)
    ]
    return next((key for key in numbers for word in _SCORE_WORDS if word in key.lower()), None) or next(
        iter(numbers), None
    )


def text_key(item: Mapping[str, Any]) -> str | None:
    """The key under which a response holds what is said: of several texts the longest."""
    texts = [key for key, value in item.items() if isinstance(value, str) and holds_content(key)]
    return max(texts, key=lambda key: len(item[key]), default=None)
