"""Arrow rows: a parquet or Arrow file, or a table of the hub -> rows as JSON would hold them.

    .parquet --row groups--> record batches --Python values--> RawRow
    .arrow   --IPC stream or file-->^

An .arrow file is what `datasets` writes (`save_to_disk`, its cache): a stream; the IPC file format, which has
a magic at both ends, is read too. Owns the batches and what their values become. Does not own files (files)
or what a row means (schemas). Light import: pyarrow only when used.
"""

import base64
import datetime
import decimal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.data.reading.files import reading, shown, shown_column
from stages.data.reading.json_rows import RawRow
from stages.data.reading.rows.cells import Binary
from stages.errors import DataError

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 256
"""Rows of a table held as Python values at once."""
_PARQUET, _ARROW_FILE, _STREAM_START, _STREAM_END = b"PAR1", b"ARROW1", b"\xff" * 4, bytes(4)


def parquet_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a parquet file. Raises DataError."""
    import pyarrow.parquet

    with reading(path), _faults(path, "parquet"):
        # otherwise a row group is held whole, and one may be the whole file
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        names = file.schema_arrow.names
    with file:
        yield from _rows_of(names, file.iter_batches(batch_size=BATCH_ROWS), path, "parquet")


def arrow_rows(path: Path) -> Iterator[RawRow]:
    """The rows of an Arrow stream, or of an Arrow file. Raises DataError."""
    import pyarrow

    with reading(path):
        if _is_cut(path):  # Arrow takes a stream without its end for a shorter one
            raise EOFError
        source = pyarrow.OSFile(str(path))
    with source:
        with reading(path), _faults(path, "Arrow"):
            is_file = source.read(len(_ARROW_FILE)) == _ARROW_FILE
            source.seek(0)
            reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            names = reader.schema.names
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
        yield from _rows_of(names, map(_sound, batches), path, "Arrow")


def _sound(batch: "pyarrow.RecordBatch") -> "pyarrow.RecordBatch":
    """The batch, once its offsets are known to lie within its bytes: a damaged one would read beyond."""
    batch.validate(full=True)
    return batch


def _rows_of(
    names: Sequence[str], batches: "Iterator[pyarrow.RecordBatch]", path: Path, kind: str
) -> Iterator[RawRow]:
    if (twice := next((name for at, name in enumerate(names) if name in names[:at]), None)) is not None:
        raise DataError(f"{shown(path)}: column '{shown_column(twice)}' stands twice; rename one")
    row = 1
    while True:
        with reading(path), _faults(path, kind):
            batch = next(batches, None)
        if batch is None:
            return
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield from batch_rows(batch.slice(start, BATCH_ROWS), first_row=row + start)
        row += batch.num_rows


@contextmanager
def _faults(path: Path, kind: str) -> Iterator[None]:
    """Turn Arrow's words for a broken file of this kind into one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if _is_cut(path):
            raise EOFError from error
        raise DataError(f"{shown(path)}: not a valid {kind} file, or damaged") from error


def _is_cut(path: Path) -> bool:
    """Whether the file begins as one of Arrow's but does not end like one."""
    with path.open("rb") as data:
        start = data.read(len(_ARROW_FILE))
        size = data.seek(0, 2)
        data.seek(max(0, size - len(_ARROW_FILE)))
        end = data.read()
    if _PARQUET.startswith(start[: len(_PARQUET)]):
        return size < 12 or not end.endswith(_PARQUET)
    if _ARROW_FILE.startswith(start):
        return size < 12 or not end.endswith(_ARROW_FILE)
    return _STREAM_START.startswith(start[:4]) and not end.endswith(_STREAM_END)


def batch_rows(batch: "pyarrow.RecordBatch", first_row: int) -> Iterator[RawRow]:
    """The rows of a record batch as JSON would hold them: numbers, text, lists, objects."""
    try:
        rows = _plain_rows(batch)
    except (ValueError, OverflowError):
        if batch.num_rows == 1:
            yield RawRow(first_row, None, _odd_column(batch))
            return
        for at in range(batch.num_rows):  # which row is it?
            yield from batch_rows(batch.slice(at, 1), first_row + at)
        return
    for number, columns in enumerate(rows, start=first_row):
        yield RawRow(number, columns)


def _plain_rows(batch: "pyarrow.RecordBatch") -> list[dict[str, Any]]:
    if all(_is_plain(kind) for kind in batch.schema.types):
        return batch.to_pylist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a map with a key twice: the last one counts
        rows = batch.to_pylist(maps_as_pydicts="lossy")
    return [{name: plain(value) for name, value in row.items()} for row in rows]


def _odd_column(batch: "pyarrow.RecordBatch") -> str:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist()
        except UnicodeDecodeError:
            return f"{shown_column(name)}: not UTF-8"
        except (ValueError, OverflowError):
            return f"{shown_column(name)}: a {column.type} that Python cannot hold"
    return "not readable"


def _is_plain(kind: "pyarrow.DataType") -> bool:
    """Whether Arrow gives this type's values as JSON would hold them."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_plain(kind.field(at).type) for at in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    tests: tuple[Callable[[Any], bool], ...] = (
        types.is_string,
        types.is_large_string,
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_null,
    )
    return any(test(kind) for test in tests)


def plain(value: Any) -> Any:
    """A value of an Arrow table as JSON would hold it: bytes that are UTF-8 as text (old parquet writers do
    not mark text as such), other bytes as Binary, decimals as numbers, times in ISO 8601 or seconds.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return Binary(base64.b64encode(value).decode())
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
