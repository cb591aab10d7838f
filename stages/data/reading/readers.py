"""Readers: sources of any accepted shape -> records, or one error line that names file, line and field.

    path, glob, directory --places--> splits --raw_rows--> columns --schemas--> records --weight--> Rows
    organisation/name ------------------hub-----------------^

Owns bad rows, weights, parts, identity. Does not own files (files, hub), what a row is in each kind of file
(raw_rows, json_rows), what it means (schemas) or tokens (chat). Imports neither torch, transformers nor
datasets.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from blake3 import blake3

from rollout.ground.whole import file_digest
from stages.config.data import DataSource
from stages.config.reward import RewardConfig
from stages.data.batches import content_share, repeats, stage_seed
from stages.data.reading.files import FileSplit, cut, kind_of, one_line, reading, shown, whole
from stages.data.reading.hub import hub_commit, hub_rows, is_hub_id
from stages.data.reading.json_rows import RawRow
from stages.data.reading.places import found_at
from stages.data.reading.raw_rows import raw_rows
from stages.data.reading.records import Conversation, Document, Pair, Prompt, split_key
from stages.data.reading.rows.advice import Advice
from stages.data.reading.rows.wording import listed
from stages.data.reading.schemas import (
    SCHEMAS,
    Kind,
    Record,
    RowError,
    Schema,
    check_label,
    detect,
    fields_of,
    named,
)
from stages.errors import DataError

_logger = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T")
_PADDED = ("parquet", "arrow")
"""Kinds of files in which every object has the keys of all objects of its column; so have hub datasets."""
NUM_KEYS = 20
"""Keys of messages that are named, the most frequent ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Generic[R]):
    """What was read: records in file order (source after source, weights applied), and the rows left out."""

    records: list[R]
    num_skipped: int  # malformed rows left out under on_bad_row: skip
    num_filtered: int  # sound rows that hold nothing to train on (ties, label false)
    sizes: list[tuple[DataSource, int]]  # how many of the records are whose, in order
    counts: "list[Counts]"  # of reading each of these sources
    unread_keys: Mapping[str, int] = field(default_factory=dict)  # key of a message -> how often it was there


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What became of the rows of a source, or of one of its splits; those of all its splits add up."""

    num_rows: int
    num_records: int  # before `part:` chose some
    num_skipped: int  # malformed rows left out under on_bad_row: skip
    num_filtered: int  # rows that gave no record
    first_problem: str  # the line about the first malformed row; empty: none
    unread_keys: Mapping[str, int] = field(default_factory=dict)  # key of a message -> how often it was there
    num_shared_prompts: int = 0  # pairs whose prompt is what both texts begin with
    shared_prompt: str = ""  # the first of these

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            num_rows=self.num_rows + other.num_rows,
            num_records=self.num_records + other.num_records,
            num_skipped=self.num_skipped + other.num_skipped,
            num_filtered=self.num_filtered + other.num_filtered,
            first_problem=self.first_problem or other.first_problem,
            unread_keys=Counter(self.unread_keys) + Counter(other.unread_keys),
            num_shared_prompts=self.num_shared_prompts + other.num_shared_prompts,
            shared_prompt=self.shared_prompt or other.shared_prompt,
        )


NO_ROWS = Counts(num_rows=0, num_records=0, num_skipped=0, num_filtered=0, first_problem="")


def most_frequent(unread_keys: Mapping[str, int]) -> list[tuple[str, int]]:
    """The NUM_KEYS most frequent keys, with how often each was there."""
    ordered = sorted(unread_keys.items(), key=lambda counted: (-counted[1], counted[0]))
    return ordered[:NUM_KEYS]


def unread_keys_in_words(unread_keys: Mapping[str, int]) -> str:
    """`id (1200), foo (3)`."""
    shown = [f"{key} ({number})" for key, number in most_frequent(unread_keys)]
    more = [f"and {len(unread_keys) - NUM_KEYS} more"] if len(unread_keys) > NUM_KEYS else []
    return ", ".join(shown + more)


def read_conversations(sources: Sequence[DataSource], *, seed: int) -> Rows[Conversation]:
    """What is imitated. Raises DataError."""
    return read(sources, "conversations", seed=seed)


def read_pairs(sources: Sequence[DataSource], *, seed: int, group_column: str | None = None) -> Rows[Pair]:
    """Preference pairs, from rows that all have the `group_column`. Raises DataError."""
    return read(sources, "pairs", seed=seed, group_column=group_column)


def read_prompts(sources: Sequence[DataSource], *, seed: int) -> Rows[Prompt]:
    """Prompts; each keeps its further columns in `row`. Raises DataError."""
    return read(sources, "prompts", seed=seed)


def read(
    sources: Sequence[DataSource], kind: Kind, *, seed: int, group_column: str | None = None
) -> Rows[Any]:
    """All records of a kind: what the functions above return, and documents. Raises DataError."""
    records: list[Any] = []
    sizes: list[tuple[DataSource, int]] = []
    counts: list[Counts] = []
    num_skipped = num_filtered = 0
    unread_keys = Counter[str]()
    for index, source in enumerate(sources):
        if source.weight == 0:
            continue
        rows = read_source(source, kind, group_column)
        if rows.unread_keys:
            named = unread_keys_in_words(rows.unread_keys)
            _logger.warning("%s: message keys that are not read: %s", shown(source.path), named)
        check_weight(source, len(rows.records))
        taken = weighted(rows.records, source.weight, stage_seed(seed, "weight", index))
        records += taken
        sizes.append((source, len(taken)))
        counts += rows.counts
        num_skipped += rows.num_skipped
        num_filtered += rows.num_filtered
        unread_keys.update(rows.unread_keys)
    if not records:
        raise DataError(f"{', '.join(shown(source.path) for source in sources) or kind}: no rows")
    return Rows(
        records=records,
        num_skipped=num_skipped,
        num_filtered=num_filtered,
        sizes=sizes,
        counts=counts,
        unread_keys=unread_keys,
    )


def read_source(source: DataSource, kind: Kind, group_column: str | None = None) -> Rows[Any]:
    """All records of one source, once each, whatever its weight. Raises DataError."""
    reader = read_whole(source, kind, group_column)
    records = list(reader)
    check_counts(source, reader.counts, len(records))
    return Rows(
        records=records,
        num_skipped=reader.counts.num_skipped,
        num_filtered=reader.counts.num_filtered,
        sizes=[(source, len(records))],
        counts=[reader.counts],
        unread_keys=reader.counts.unread_keys,
    )


def read_whole(source: DataSource, kind: Kind, group_column: str | None = None) -> "RecordReader":
    """The records of one source, one by one; `check_counts` is the caller's, at the end. Raises DataError."""
    return RecordReader(source, kind, _whole_files(source), group_column, is_whole=True)


def splits_of(source: DataSource, block_bytes: int) -> list[FileSplit]:
    """The source in parts that can be read apart (`read_split`), in order: of about `block_bytes` where lines
    can be told apart anywhere (plain jsonl; txt by line), else whole files. Raises DataError.
    """
    if is_hub_id(source.path):
        return _whole_files(source)
    return [split for path in files_of(source) for split in cut(path, source, block_bytes)]


def read_split(source: DataSource, split: FileSplit, kind: Kind) -> "RecordReader":
    """The records of one split; its `counts` are complete when it is exhausted. Those of all splits, added
    up, go to `check_counts`. Raises DataError as reading the whole source would.
    """
    return RecordReader(source, kind, [split], None, is_whole=False)


def check_counts(source: DataSource, counts: Counts, num_kept: int) -> None:
    """Raise DataError when all of a source is read and more rows were left out than the cap allows, or no
    record is left. `num_kept`: records after `part:`.
    """
    cap = max(1.0, source.max_skipped_frac * counts.num_rows)
    if counts.num_skipped > cap or counts.num_skipped == counts.num_rows > 0:
        raise DataError(
            f"{counts.first_problem} - and {counts.num_skipped} of {counts.num_rows} rows are bad, more than "
            f"max_skipped_frac allows ({source.max_skipped_frac:.0%}, at least one)"
        )
    if not counts.num_records:
        raise DataError(f"{shown(source.path)}: no rows")
    if not num_kept:
        raise DataError(
            f"{shown(source.path)}: no rows in part: {source.part} of {counts.num_records}; "
            "raise heldout_frac"
        )


def check_weight(source: DataSource, num_records: int) -> None:
    """Raise DataError where a weight above 0 comes to no record of `num_records`."""
    if source.weight > 0 and not len(repeats(num_records, source.weight, seed=0)):
        raise DataError(
            f"{shown(source.path)}: no rows at weight {source.weight:g} of {num_records}; raise weight, or "
            "set it to 0"
        )


def is_held_out(record: Record, heldout_frac: float) -> bool:
    """Whether a record is of the share `heldout_frac` that a hash of its `split_key` chooses."""
    return content_share(split_key(record)) < heldout_frac


def check_sides(
    sources: Sequence[DataSource], *, num_train: int, num_heldout: int, num_dropped: int = 0
) -> None:
    """Raise DataError where of reward's pairs none is left on one side of its held-out share."""
    for side, number in (("training", num_train), ("held-out", num_heldout)):
        if not number:
            paths = ", ".join(shown(source.path) for source in sources if source.weight > 0)
            left_out = f" (left out: {num_dropped})" if num_dropped else ""
            raise DataError(
                f"{paths}: no {side} pair among {num_train + num_heldout}{left_out}; add pairs with other "
                f"prompts, or change {RewardConfig.KEY}.heldout_frac"
            )


def weighted(records: Sequence[T], weight: float, seed: int) -> list[T]:
    """Each record floor(weight) times, then a seeded choice of round(fraction * n) of them once more.

    The choice is made once: the same rows in every epoch.
    """
    return [records[index] for index in repeats(len(records), weight, seed).tolist()]


def content_digest(source: DataSource) -> str:
    """What the source holds: blake3 of the contents of its `files_of`, in order; of a hub dataset, in plain,
    the commit that is meant, subset and split. File names do not enter, the kind of file does. Raises
    DataError.
    """
    if is_hub_id(source.path):
        subset = "" if source.subset is None else f" {source.subset}"
        return f"hub {hub_commit(source)}{subset} {source.split}"
    total = blake3()
    for path in files_of(source):
        kind = kind_of(path)
        with reading(path):
            contents = bytes.fromhex(file_digest(path))
        suffix = f".{kind.compression}" if kind.compression else ""
        total.update(f"{kind.kind}{suffix}:".encode() + contents)
    return total.hexdigest()


def files_of(source: DataSource) -> tuple[Path, ...]:
    """The files that are read of a local source, in order. Raises DataError."""
    return found_at(source.path, source.split).files


def split_digest(split: FileSplit, source: DataSource) -> str:
    """What a split of the source holds now: blake3 of its bytes; of a hub dataset nothing, its commit says
    all. Raises DataError.
    """
    if is_hub_id(source.path):
        return ""
    with reading(split.path):
        return file_digest(split.path, split.start, split.end)


def _whole_files(source: DataSource) -> list[FileSplit]:
    """Every file whole."""
    if is_hub_id(source.path):
        return [whole(Path(source.path))]
    return [whole(path) for path in files_of(source)]


def _raw_rows(split: FileSplit, source: DataSource) -> Iterator[RawRow]:
    return hub_rows(source) if is_hub_id(source.path) else raw_rows(split, source)


class RecordReader(Iterator[Any]):
    """The records of splits of one source, one by one; counts what it leaves out."""

    def __init__(
        self,
        source: DataSource,
        kind: Kind,
        splits: Sequence[FileSplit],
        group_column: str | None,
        *,
        is_whole: bool,
    ) -> None:
        self._source, self._kind, self._splits, self._is_whole = source, kind, splits, is_whole
        self._group_column = group_column
        _check_settings(source)
        self.schema: Schema | None = _stated_schema(source, kind)
        self.columns_seen: dict[str, str] = {}  # field -> the column it is read from
        self.rows_of: Counter[Path] = Counter()  # file -> its rows
        self._sound: dict[Path, Mapping[str, Any]] = {}  # file -> its first row that can be read
        self._num_rows = self._num_records = self._num_skipped = self._num_filtered = 0
        self._first_problem = ""
        self._unread_keys = Counter[str]()
        self._shared_prompts = 0
        self._shared_prompt = ""
        self._records = self._read()

    def __next__(self) -> Record:
        return next(self._records)

    @property
    def counts(self) -> Counts:
        """Of the rows read so far."""
        return Counts(
            num_rows=self._num_rows,
            num_records=self._num_records,
            num_skipped=self._num_skipped,
            num_filtered=self._num_filtered,
            first_problem=self._first_problem,
            unread_keys=dict(self._unread_keys),
            num_shared_prompts=self._shared_prompts,
            shared_prompt=self._shared_prompt,
        )

    def _read(self) -> Iterator[Record]:
        takes_all = self._source.part == "all"
        for split in self._splits:
            self.rows_of[split.path] += 0
            is_padded = is_hub_id(self._source.path) or kind_of(split.path).kind in _PADDED
            shown_path = shown(split.path)
            for line, columns, problem in _raw_rows(split, self._source):
                self._num_rows += 1
                self.rows_of[split.path] += 1
                try:
                    if columns is None:
                        raise RowError(problem)
                    records = self._parse(columns, is_padded=is_padded)
                except RowError as error:
                    problem = self._foreign(split, columns) or str(error)
                    self._bad(f"{shown_path}:{line}: {one_line(problem)}")
                    continue
                self._sound.setdefault(split.path, columns)
                self._num_records += len(records)
                self._num_filtered += not records
                for record in records:
                    if takes_all or _in_part(record, self._source):
                        yield record if isinstance(record, Document) else _placed(record, shown_path, line)

    def _parse(self, row: dict[str, Any], *, is_padded: bool) -> tuple[Record, ...]:
        schema = self._detected(row) if self.schema is None else self.schema
        cells = schema.cells(
            row,
            self._source.column_of,
            self._source.min_margin,
            is_padded=is_padded,
            group_column=self._group_column,
        )
        records = schema.read(cells, is_stated=self._source.format is not None)
        if self._source.format is None:
            check_label(self._kind, schema, row, self._source.column_of)
        if self._group_column is not None and self._group_column not in row:
            key, columns = f"{RewardConfig.KEY}.group_column", listed(row)
            raise RowError(Advice.NO_GROUP_COLUMN.line(column=self._group_column, columns=columns, key=key))
        self.schema = schema  # a row that cannot be read decides nothing
        if cells.unread_keys:
            self._unread_keys.update(cells.unread_keys)
        if cells.shared_prompt is not None:
            self._shared_prompts += 1
            self._shared_prompt = self._shared_prompt or cells.shared_prompt
        if not self.columns_seen:
            self.columns_seen = schema.columns_read(cells)
        return records

    def _detected(self, row: dict[str, Any]) -> Schema:
        """That of the row, or, where a split is read, of the first row of the source that can be read."""
        if not self._is_whole and len(SCHEMAS[self._kind]) > 1:
            reader = read_whole(self._source.model_copy(update={"on_bad_row": "skip"}), self._kind)
            for _ in reader:
                break
            if reader.schema is not None:
                return reader.schema
        return detect(self._kind, row, self._source.column_of)

    def _foreign(self, split: FileSplit, row: Mapping[str, Any] | None) -> str:
        """What to say where a file that cannot be read lies among others that can: it has other columns.
        Empty where that is not what is wrong.
        """
        if row is None or split.path in self._sound or self._source.on_bad_row == "skip":
            return ""
        if self._is_of_a_format(row):  # and wrong in itself
            return ""
        others = (other for other in self._splits if other.path != split.path)
        sound = next(iter(self._sound.items()), None)
        sound = sound or next(filter(None, map(self._first_sound, others)), None)
        if sound is None or set(sound[1]) == set(row):
            return ""
        return (
            f"columns {listed(row)} are not those of {shown(sound[0])} ({listed(sound[1])}), and one entry "
            "has one format; move this file elsewhere, or name the others by a glob"
        )

    def _first_sound(self, split: FileSplit) -> tuple[Path, Mapping[str, Any]] | None:
        """A file and its first row, where that is of a format."""
        try:
            row = next(_raw_rows(split, self._source), None)
        except DataError:
            return None
        if row is None or row.columns is None or not self._is_of_a_format(row.columns):
            return None
        return split.path, row.columns

    def _is_of_a_format(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the columns of the source's format, or, as long as that is open, of any."""
        schema = self.schema or detect(self._kind, row, self._source.column_of)
        return not any(schema.distance(row, self._source.column_of))

    def _bad(self, problem: str) -> None:
        if self._source.on_bad_row == "error":
            raise DataError(problem)
        self._first_problem = self._first_problem or problem
        self._num_skipped += 1


def _placed(record: Conversation | Pair | Prompt, path: str, line: int) -> Record:
    return replace(record, place=f"{path}:{line}")


def _in_part(record: Record, source: DataSource) -> bool:
    return is_held_out(record, source.heldout_frac) == (source.part == "heldout")


def _check_settings(source: DataSource) -> None:
    """Settings that only a hub dataset has say nothing about a file."""
    if source.revision is None and source.subset is None:
        return
    if not is_hub_id(source.path) and Path(source.path).exists():
        setting = "subset" if source.revision is None else "revision"
        raise DataError(f"{shown(source.path)}: {setting}: only a dataset of the hub has one; remove it")


def _stated_schema(source: DataSource, kind: Kind) -> Schema | None:
    """The schema `format:` names, once it and the names under `columns:` are known to exist."""
    possible = SCHEMAS[kind]
    schema = None if source.format is None else named(kind, source.format)
    if source.format is not None and schema is None:
        usable = " or ".join(schema.format for schema in possible)
        raise DataError(f"{shown(source.path)}: format {source.format} gives no {kind}; use {usable}")
    fields = fields_of(possible if schema is None else [schema])
    unknown = next((name for name in source.column_of if name not in fields), None)
    if unknown is not None:
        raise DataError(
            f"{shown(source.path)}: columns: no field '{one_line(unknown)}'; fields are {', '.join(fields)}"
        )
    return schema
