"""Rows: one split of a file -> rows of columns with the line each starts at, before any schema.

    FileSplit --opened--> lines --jsonl, json, csv, tsv, txt--> RawRow
              --record batches of parquet or Arrow------------^

Owns which reader a kind of file has, and what no kind is: a Git LFS pointer. Does not own the readers
(json_rows, table_rows, text_rows, arrow_rows), files (files) or what a row means (schemas). Light import.
"""

from collections.abc import Iterator

from stages.config.data import DataSource
from stages.data.reading.arrow_rows import arrow_rows, parquet_rows
from stages.data.reading.files import FileSplit, kind_of, lines_of, opened, reading, shown
from stages.data.reading.json_rows import RawRow, json_rows, jsonl_rows
from stages.data.reading.lfs import POINTER, is_lfs_pointer
from stages.data.reading.rows.advice import Advice
from stages.data.reading.table_rows import csv_rows, tsv_rows
from stages.data.reading.text_rows import documents, text_lines
from stages.errors import DataError


def raw_rows(split: FileSplit, source: DataSource) -> Iterator[RawRow]:
    """The rows of a split of a local file, in order. Raises DataError for what no later row can follow."""
    path, kind = split.path, kind_of(split.path)
    if source.header is not None and kind.kind not in ("csv", "tsv"):
        raise DataError(f"{shown(path)}: {Advice.LIST_OF_NAMES.line(kind=kind.kind)}")
    with reading(path):
        if is_lfs_pointer(path):
            raise DataError(f"{shown(path)}: {POINTER}")
    if kind.kind == "parquet":
        yield from parquet_rows(path)
        return
    if kind.kind == "arrow":
        yield from arrow_rows(path)
        return
    with reading(path), opened(path, kind.compression) as stream:
        lines = lines_of(stream, split)
        match kind.kind:
            case "jsonl":
                yield from jsonl_rows(lines, split.first_line)
            case "json":
                yield from json_rows(lines, path)
            case "csv":
                yield from csv_rows(lines, path, source.header)
            case "tsv":
                yield from tsv_rows(lines, path, source.header)
            case "txt":
                yield from documents(text_lines(lines, split.first_line), source.document)
