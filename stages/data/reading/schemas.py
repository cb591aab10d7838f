"""Schemas: one row of columns -> records, or a RowError that names the field and the fix.

    row + column map --detect--> Schema --parse--> (Document | Conversation | Pair | Prompt, ...)

Owns which schemas give a kind of record, and which one a row is of. Does not own what a schema means (rows/),
nor files, lines, weights (readers). A further format is one more Schema in SCHEMAS. One row gives one record,
several (ranked, tree), or none (labelled false, all tied). Light import.

    text, messages, sharegpt, prompt_completion, instruction, labelled   rows/conversations
    preference, sharegpt, hh_transcript                                  rows/preferences
    ranked, tree                                                         rows/ranked, rows/trees
    prompt                                                               rows/prompts
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stages.config.data import DataFormat
from stages.data.reading.records import Record
from stages.data.reading.rows import conversations, preferences, prompts, ranked, trees
from stages.data.reading.rows.advice import Advice
from stages.data.reading.rows.calls import TOOLS, tool_columns
from stages.data.reading.rows.cells import Cells, RowError
from stages.data.reading.rows.guesses import check_columns
from stages.data.reading.rows.labels import is_verdict, label_of
from stages.data.reading.rows.marks import ROW_MARKS, mark_columns
from stages.data.reading.rows.preferences import SIDES
from stages.data.reading.rows.prompts import ASKED, used_by
from stages.data.reading.rows.thoughts import THOUGHTS, thoughts_beside
from stages.data.reading.rows.transcripts import is_transcript
from stages.data.reading.rows.wording import quoted

__all__ = [
    "SCHEMAS",
    "Kind",
    "Record",
    "RowError",
    "Schema",
    "check_label",
    "detect",
    "fields_of",
    "named",
]

Kind = Literal["documents", "conversations", "pairs", "prompts"]
"""What a stage reads of its rows."""
Aliases = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """One row format, as it is read for one kind of record."""

    format: DataFormat
    required: tuple[str, ...]  # fields that must be there
    aliases: Aliases  # every field -> the columns looked for, in order
    parse: Callable[[Cells], tuple[Record, ...]]
    is_imitated: bool = False  # its assistant turns are trained as they stand, so training marks count
    fits: Callable[[Cells], bool] | None = None  # where this fails, any other schema is nearer
    inner: Callable[[Cells], tuple["Schema", Mapping[str, str]]] | None = None
    """Of labelled rows: the schema they are of without their label, and its column map."""

    def cells(
        self,
        row: Mapping[str, Any],
        columns: Mapping[str, str],
        min_margin: float = 0.0,
        *,
        is_padded: bool = False,
        group_column: str | None = None,
    ) -> Cells:
        """The row through this schema's fields. Raises RowError for a configured field it does not have."""
        unknown = next((field for field in columns if field not in self.aliases), None)
        if unknown is not None:
            fields = ", ".join(self.aliases)
            raise RowError(Advice.NO_SUCH_FIELD.line(format=self.format, field=unknown, fields=fields))
        return Cells(
            row,
            columns,
            self.aliases,
            min_margin,
            is_imitated=self.is_imitated,
            is_padded=is_padded,
            group_column=group_column,
        )

    def read(self, cells: Cells, *, is_stated: bool) -> tuple[Record, ...]:
        """The records of a row. Raises RowError, about missing columns first, because they explain the rest.
        `is_stated`: the config names this format.
        """
        try:
            return self.parse(cells)
        except RowError:
            check_columns(cells, self.required, is_stated=is_stated, is_imitated=self.is_imitated)
            raise

    def columns_read(self, cells: Cells) -> dict[str, str]:
        """Field -> the column of the row that it is read from; `input` and `history` only where they are."""
        if self.inner is not None:
            schema, renamed = self.inner(cells)
            rest = schema.columns_read(schema.cells(cells.row, renamed))
            return {"label": cells.required("label")[0], **rest}
        found = cells.columns_read()
        question = next((field for field in ("prompt", "instruction") if field in found), None)
        unread = {"input", "history"} - {*(() if question is None else used_by(cells, question))}
        unread |= {*(() if tool_columns(cells) else ("tools",)), *(() if mark_columns(cells) else ROW_MARKS)}
        unread |= {*(() if "reasoning" in found and thoughts_beside(cells) else THOUGHTS)}
        label = preferences.deciding_label(cells)
        decided = {} if label is None else {"label": label}
        return {**{field: column for field, column in found.items() if field not in unread}, **decided}

    def distance(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[float, ...]:
        """How far the row is from this schema, smallest first; 0 throughout: the row is of this schema.

        A schema that does not fit comes last; then count the configured fields it does not have, then the
        share and the number of what it requires and the row lacks, or has as null (tables fill up with it).
        """
        configured = {field: column for field, column in columns.items() if field in self.aliases}
        cells = Cells(row, configured, self.aliases)
        missing = sum(_is_absent(cells, field) for field in self.required)
        is_unfit = self.fits is not None and not self.fits(cells)
        return is_unfit, len(columns) - len(configured), missing / len(self.required), missing


def _is_absent(cells: Cells, field: str) -> bool:
    return cells.column(field) is None or cells.required(field)[1] is None


def _transcript_in(field: str) -> Callable[[Cells], bool]:
    return lambda cells: cells.column(field) is not None and is_transcript(cells.required(field)[1])


def _is_alpaca(cells: Cells) -> bool:
    """Whether the row has an instruction with an output of its own: nothing else is to be looked for."""
    if "instruction" not in cells.row or cells.is_renamed("prompt") or cells.is_renamed("completion"):
        return False
    prompt, completion = cells.column("prompt"), cells.column("completion")
    return completion == "output" or (prompt == "instruction" and completion in (None, "response"))


_BESIDE = {"system": ASKED["system"], **TOOLS}
_TALK = {"conversations": ("conversations", "conversation"), **_BESIDE}
_LABEL = {"label": ("label", "kto_tag")}
_TREE = {"prompt": ("prompt",)}

_PLAIN_SFT = (
    Schema(
        format="messages",
        required=("messages",),
        aliases={"messages": ("messages",), **_BESIDE, **ROW_MARKS},
        parse=conversations.messages,
        is_imitated=True,
    ),
    Schema(
        format="sharegpt",
        required=("conversations",),
        aliases={**_TALK, "chosen": ("chosen",), **ROW_MARKS},
        parse=conversations.sharegpt,
        is_imitated=True,
    ),
    Schema(
        format="prompt_completion",
        required=("prompt", "completion"),
        aliases={
            **ASKED,
            "prompt": ("prompt", "question", "query", "instruction", "input"),
            "completion": ("completion", "response", "answer", "output"),
            **THOUGHTS,
            **ROW_MARKS,
        },
        parse=conversations.prompt_completion,
        is_imitated=True,
        fits=lambda cells: not _is_alpaca(cells),
    ),
    Schema(
        format="instruction",
        required=("instruction", "output"),
        aliases={
            "instruction": ("instruction",),
            **{field: ASKED[field] for field in ("input", "system", "history", "tools")},
            "output": ("output", "response", "completion", "answer"),
            **THOUGHTS,
            **ROW_MARKS,
        },
        parse=conversations.instruction,
        is_imitated=True,
    ),
)
_PLAIN_PROMPTS = (
    Schema(
        format="prompt",
        required=("prompt",),
        aliases={**ASKED, "prompt": (*ASKED["prompt"], "messages")},
        parse=prompts.prompt,
    ),
    Schema(format="sharegpt", required=("conversations",), aliases=_TALK, parse=prompts.conversation_prompt),
)


def detect(kind: Kind, row: Mapping[str, Any], columns: Mapping[str, str]) -> Schema:
    """The first schema of a kind that the row is of; else the nearest, to say what it lacks."""
    return _nearest(SCHEMAS[kind], row, columns)


def named(kind: Kind, name: DataFormat) -> Schema | None:
    """The schema of that name."""
    return next((schema for schema in SCHEMAS[kind] if schema.format == name), None)


def fields_of(schemas: Iterable[Schema]) -> list[str]:
    """Every field name that `columns:` may rename."""
    return list(dict.fromkeys(field for schema in schemas for field in schema.aliases))


def _nearest(schemas: Sequence[Schema], row: Mapping[str, Any], columns: Mapping[str, str]) -> Schema:
    return min(schemas, key=lambda schema: schema.distance(row, columns))


def check_label(kind: Kind, schema: Schema, row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Raise RowError for a conversation labelled false, or judged in other words than a label's, that
    `schema`, guessed by another, would imitate.
    """
    if kind != "conversations" or schema.format == "labelled" or row.keys().isdisjoint(_LABEL["label"]):
        return
    found = Cells(row, columns, _LABEL).first_of(_LABEL["label"])
    if found is not None and label_of(found[1]) is False:
        raise RowError(Advice.LABELLED_LATER.line(column=found[0], format=schema.format))
    if found is not None and schema.is_imitated and is_verdict(found[1]):
        column, value = found[0], quoted(found[1])
        raise RowError(Advice.NO_LABEL.line(column=column, value=value, format=schema.format))


def _labelled(inner: Sequence[Schema], keep: Callable[..., Any]) -> Schema:
    """Rows of one of `inner` with a true or false `label`, or one that the config names; `keep` turns their
    reader, and their format without the label, into the reader of labelled rows.
    """

    def without_label(cells: Cells) -> tuple[Schema, dict[str, str]]:
        columns = {field: column for field, column in cells.columns.items() if field != "label"}
        return _nearest(inner, cells.row, columns), columns

    def fits(cells: Cells) -> bool:
        if cells.column("label") is None:
            return False
        schema, columns = without_label(cells)
        is_label = cells.is_renamed("label") or label_of(cells.required("label")[1]) is not None
        return is_label and not any(schema.distance(cells.row, columns))

    def parse(cells: Cells) -> tuple[Record, ...]:
        schema, columns = without_label(cells)
        inner_cells = cells.through(columns, schema.aliases, is_imitated=schema.is_imitated)
        return schema.read(inner_cells, is_stated=False)

    aliases = {field: columns for schema in reversed(inner) for field, columns in schema.aliases.items()}
    return Schema(
        format="labelled",
        required=("label",),
        aliases={**_LABEL, **aliases},
        parse=keep(parse, lambda cells: without_label(cells)[0].format),
        fits=fits,
        inner=without_label,
    )


_PROMPTS = (
    Schema(
        format="tree", required=("prompt",), aliases=_TREE, parse=trees.tree_prompt, fits=trees.holds_tree
    ),
    *_PLAIN_PROMPTS,
    Schema(
        format="hh_transcript",
        required=("chosen",),
        aliases=SIDES,
        parse=prompts.hh_prompt,
        fits=_transcript_in("chosen"),
    ),
    _labelled(_PLAIN_PROMPTS, lambda parse, _: parse),
)

SCHEMAS: dict[Kind, tuple[Schema, ...]] = {
    "documents": (
        Schema(format="text", required=("text",), aliases={"text": ("text",)}, parse=conversations.document),
    ),
    "conversations": (
        _labelled(_PLAIN_SFT, conversations.labelled),
        Schema(
            format="tree",
            required=("prompt",),
            aliases=_TREE,
            parse=trees.tree_conversation,
            fits=trees.holds_tree,
        ),
        *_PLAIN_SFT,
        Schema(
            format="hh_transcript",
            required=("chosen",),
            aliases=SIDES,
            parse=conversations.hh_conversation,
            fits=_transcript_in("chosen"),
        ),
    ),
    "pairs": (
        Schema(
            format="hh_transcript",
            required=("chosen", "rejected"),
            aliases=SIDES,
            parse=preferences.hh_pair,
            fits=_transcript_in("chosen"),
        ),
        Schema(
            format="sharegpt",
            required=("conversations", "chosen", "rejected"),
            aliases={**SIDES, **_TALK},
            parse=preferences.sharegpt_preference,
        ),
        Schema(
            format="preference",
            required=("chosen", "rejected"),
            aliases={**ASKED, "prompt": (*ASKED["prompt"], "messages", "input"), **SIDES},
            parse=preferences.preference,
        ),
        Schema(
            format="ranked",
            required=("prompt", "responses"),
            aliases={**ASKED, **ranked.RATED},
            parse=ranked.ranked,
            fits=ranked.holds_responses,
        ),
        Schema(
            format="tree",
            required=("prompt",),
            aliases=_TREE,
            parse=trees.tree_pairs,
            fits=trees.holds_tree,
        ),
        _labelled(_PLAIN_SFT, lambda *_: preferences.label_is_no_pair),
    ),
    "prompts": _PROMPTS,
}
"""What each kind of record can be read from, in the order in which it is tried."""
