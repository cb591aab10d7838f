"""`<stage>.data:` - one dataset of a stage, and how its rows are read. Light import: pydantic only."""

from typing import Literal

from pydantic import Field

from rollout.ground.section import EXECUTION, Section

DataFormat = Literal[
    "text",
    "messages",
    "sharegpt",
    "prompt_completion",
    "instruction",
    "preference",
    "hh_transcript",
    "ranked",
    "tree",
    "labelled",
    "prompt",
]


class DataSource(Section):
    """One dataset of a stage."""

    path: str = Field(min_length=1, json_schema_extra=EXECUTION)
    """Local file, glob or directory (jsonl, json, parquet, arrow, csv, tsv, txt; .gz and .zst of them), or
    the hub id of a dataset, `organisation/name`. Identified by its content, not by this name.
    """
    revision: str | None = Field(default=None, json_schema_extra=EXECUTION)
    """Commit, tag or branch of a hub id; absent: its newest. The commit it means is recorded."""
    subset: str | None = None
    """Configuration of a hub id that has several."""
    split: str = "train"
    """Split of a hub id, or of a directory whose file and folder names tell several (train, validation,
    test). A named file or glob is read whole, and so is a directory whose names tell one split or none.
    """
    format: DataFormat | None = None
    """Row schema; detected from the columns and the stage when absent."""
    columns: dict[str, str] | list[str] = Field(default_factory=dict)
    """Field name -> column that holds it, where the file's names differ (e.g. `prompt: question`); a path
    reaches into nested values (`completion: instances.0.output`), with `*` into every item of a list
    (`scores: answers.*.votes`). A list names the columns of a csv or tsv file that has no header line.
    """
    document: Literal["file", "paragraph", "line"] = "paragraph"
    """What one document of a txt file is: all of it, a block of lines between blank lines, or a line."""
    min_margin: float = Field(default=0.0, ge=0)
    """Ranked responses make a pair when their scores (or ranks) differ by more than this."""
    weight: float = Field(default=1.0, ge=0, le=1000)
    """How often each row is seen per epoch: 2 twice, 0.5 a seeded half of the rows."""
    part: Literal["all", "train", "heldout"] = "all"
    """Which rows to use: `heldout` those of a share `heldout_frac` chosen by a hash of what the user asks
    first, `train` the others. The same file may so give one stage its training rows and another its held-out
    ones.
    """
    heldout_frac: float = Field(default=0.1, gt=0, lt=1)
    """Share of the rows that part: heldout means."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: end the run, or be left out and counted."""
    max_skipped_frac: float = Field(default=0.01, ge=0, le=1, json_schema_extra=EXECUTION)
    """Under on_bad_row: skip, the share of the rows (but at least one row) that may be left out."""

    @property
    def column_of(self) -> dict[str, str]:
        """Field -> column, as configured."""
        return self.columns if isinstance(self.columns, dict) else {}

    @property
    def header(self) -> list[str] | None:
        """Names of the columns of a csv or tsv file without header line."""
        return self.columns if isinstance(self.columns, list) else None
