"""Advice: what an error about a row says to do, all of it in one table.

    Advice.MISSING.line(field=…, columns=…, advised=…) --> one line of a RowError

Owns the words of every line that tells a person to set columns or a format, or to bring a row or a file into
another shape. Does not own when a row is wrong (schemas, cells, preferences, ...) nor which column is meant
(guesses). A test follows each of these lines on the row that caused it. Light import.
"""

from enum import Enum

UNKNOWN = "…"
"""In place of a column that cannot be guessed."""


class Advice(Enum):
    """One kind of line, with the names that it is about in braces."""

    MISSING = "{field}: missing; columns are {columns} - set columns: {{{advised}}}"
    NOTHING_TO_IMITATE = (
        "prompt: missing; columns are {columns} - set columns: {{{advised}}}, or {{messages: …}}"
    )
    BROKEN_PATH = "{path}: {problem} - set columns: {{{field}: …}}"
    NO_SUCH_FIELD = "columns: format {format} has no field '{field}'; fields are {fields} - or set format"
    PROMPT_NOT_READ = (
        "{column}: no prompt beside {other}, and text that is not read in {unread} "
        "- set columns: {{prompt: {prompt}}}, or, where both begin with the prompt, remove {unread}"
    )
    NO_PROMPT = (
        "{column}: shares no beginning with {other}, so there is no prompt; write it into a column "
        "prompt, or before both"
    )
    LABELLED_LATER = (
        "{column}: false, but by its first row the source is not labelled; set format: labelled, or "
        "format: {format} to imitate it"
    )
    NO_LABEL = (
        "{column}: expected true or false, got {value}; set format: {format} where it labels something else"
    )
    NO_SCORES = "{response}: no score or rank for it - set columns: {{scores: {scores}}} or {{ranks: …}}"
    SCORE_KEY = "{response}.score: missing; keys are {keys} - set columns: {{{advised}}}"
    RESPONSE_KEY = "{response}.response: missing; keys are {keys} - set columns: {{{advised}}}"
    NOT_A_MARK_COLUMN = (
        "{column}: one mark per message of {messages}, but not read - set columns: {{loss_mask: {mapped}}}, "
        "or remove it"
    )
    MARKS_OF_ANOTHER_FORM = (
        "{column}: one mark per {what} of {messages}, but not read; write the list loss_mask, 0 or 1 per "
        "message, or remove {column}"
    )
    NOT_A_MARK_KEY = (
        "{name}: {value}, like a training mark, but not read; write train: true or false, or remove {key}"
    )
    TWO_ANSWERS_AND_A_LABEL = (
        "{label}: says which of {chosen} and {rejected} is better, but is not read; write the better one "
        "into chosen and the other into rejected, without {label}"
    )
    FLAT_TREE = (
        "message_id, parent_id: one turn of a tree per row; nest the turns by parent_id, one tree per row: "
        "{{prompt: {{text, role, replies: [{{text, role, rank, replies}}]}}}}"
    )
    TABLE_BY_COLUMNS = (
        "a table as one object, {shape}, not rows; write it with pandas' "
        'to_json(orient="records", lines=True), as .jsonl'
    )
    LISTS_BY_COLUMN = (
        "a dict of lists ({{column: [values]}}), not rows; write one object {{column: value}} per row"
    )
    SEVERAL_LISTS = "one object, with rows in the lists under {keys}; leave only one list in the file"
    LIST_IN_A_LINE = "one object, with rows in the list under '{key}'; name the file .json"
    LIST_OF_NAMES = (
        "columns: a list names the columns of a csv or tsv file without header line; for a {kind} file write "
        "{{field: column}}"
    )
    HAS_HEADER = "the file has a header line; remove the list under columns:"
    TWICE_IN_HEADER = (
        "column '{column}' stands twice in the header; rename one, or set columns: [name, …] if the file "
        "has no header line"
    )
    NO_GROUP_COLUMN = "{column}: missing; columns are {columns} - set {key}"
    PYTHON_REPR = "{name}: Python's repr of a list, not JSON; write the cell with json.dumps"

    def line(self, **names: object) -> str:
        """The words, with these names."""
        return self.value.format(**names)
