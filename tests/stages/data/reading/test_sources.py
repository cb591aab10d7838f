"""Sources: every kind of file gives its rows with the line they start at, and every damaged one one line."""

import ctypes
import datetime
import decimal
import glob
import gzip
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from stages.config.data import DataSource
from stages.data.reading import readers
from stages.data.reading.files import whole
from stages.data.reading.places import files_matching, found_at
from stages.data.reading.raw_rows import raw_rows
from stages.errors import DataError

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
PAIRS = b"prompt,completion\nq1,a1\n"


def zstd(data: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def source(path: Path | str, **settings: Any) -> DataSource:
    return DataSource(path=str(path), **settings)


def rows(path: Path, **settings: Any) -> list[tuple[int, Any]]:
    """(line, columns, or what is wrong) of every row."""
    found = raw_rows(whole(path), source(path, **settings))
    return [(row.line, row.columns if row.columns is not None else row.problem) for row in found]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def texts(path: Path, **settings: Any) -> list[str]:
    return [document.text for document in readers.read_source(source(path, **settings), "documents").records]


def files_at(path: Path) -> list[Path]:
    return [*found_at(str(path), "train").files]


def failure(path: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        readers.read_source(source(path, **settings), "documents")
    message = str(caught.value)
    assert message.isprintable(), "an error is one line"
    return message.replace(f"{path.parent}/", "")


# csv and tsv


def test_csv_rows_carry_the_line_they_start_at_also_after_quoted_line_ends(tmp_path):
    data = b'text,label\r\n"one, ""two""\nthree",1\n\nfour,2\n"a\n\nb",3\nlast,4'
    assert rows(written(tmp_path / "a.csv", data)) == [
        (2, {"text": 'one, "two"\nthree', "label": "1"}),
        (5, {"text": "four", "label": "2"}),
        (6, {"text": "a\n\nb", "label": "3"}),
        (9, {"text": "last", "label": "4"}),
    ]


def test_in_tsv_files_a_quote_is_a_sign_like_any_other(tmp_path):
    data = b'text\ta, b; c\n"quoted" at the start\t1\nan open " quote\t0\n'
    assert rows(written(tmp_path / "a.tsv", data)) == [
        (2, {"text": '"quoted" at the start', "a, b; c": "1"}),
        (3, {"text": 'an open " quote', "a, b; c": "0"}),
    ]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_list_names_the_columns_of_a_file_without_header_line(tmp_path, name, separator):
    path = written(tmp_path / name, f"\ufeffone{separator}1\r\ntwo{separator}0\r\n".encode())
    assert rows(path, columns=["text", "label"]) == [
        (1, {"text": "one", "label": "1"}),
        (2, {"text": "two", "label": "0"}),
    ]
    assert texts(path, columns=["text", "label"]) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "data", "settings", "line"),
    [
        ("a.csv", b'text\n"never closed\n', {}, "a.csv:2: quote opened and never closed"),
        ("a.csv", b'text,b\n"one\n",x\ny,"two\nmore\n', {}, "a.csv:4: quote opened and never closed"),
        ("a.csv", b'text,b\n"one\ntwo","say ""hi""\n" now,x\n', {},
         "a.csv:3: quote opened and never closed; the next one, in line 4, has text after it"),
        ("a.csv", b'text,b,c\n"one\ntwo",5" disk,"open\nmore\n', {},
         "a.csv:3: quote opened and never closed"),
        ("a.csv", b'text\n"a"b\n', {},
         'a.csv:2: text after a closing quote; a quote within a cell is written ""'),
        ("a.csv", b"text\na\rb\n", {}, 
         "a.csv:2: a carriage return that ends no line; convert the line ends to \\n"),
        ("a.csv", b"text,b\nx,y\none, two,z\n", {},
         "a.csv:3: expected 2 cells, got 3; a cell that holds a comma must stand in quotes"),
        ("a.csv", b"text,b\nx\n", {}, "a.csv:2: expected 2 cells, got 1"),
        ("a.tsv", b"text\tb\nx\ty\tz\n", {}, "a.tsv:2: expected 2 cells, got 3"),
        ("a.tsv", b"text\tb\nx,y\n", {}, "a.tsv:2: expected 2 cells, got 1; is it a csv file?"),
        ("a.tsv", b"\ntext;b\nx;y\n", {},
         "a.tsv:2: a semicolon separates the cells, no tab; call the file .csv"),
        ("a.csv", b"text,b,text\nx,y,z\n", {},
         "a.csv:1: column 'text' stands twice in the header; rename one, or set columns: [name, …] if the "
         "file has no header line"),
        ("a.csv", b",,\n", {},
         "a.csv:1: column '' stands twice in the header; rename one, or set columns: [name, …] if the file "
         "has no header line"),
        ("a.csv", b"text,b\nx,y\n", {"columns": ["text", "b"]},
         "a.csv:1: the file has a header line; remove the list under columns:"),
        ("a.csv", b"x,y\n", {"columns": ["text", "text"]},
         "a.csv: columns: 'text' stands twice; give each its own name"),
        ("a.csv", b"x,y,z\n", {"columns": ["text", "b"]},
         "a.csv:1: expected 2 cells, one for each name under columns:, got 3; a cell that holds a comma must "
         "stand in quotes"),
        ("a.tsv", b"x\ty\n", {"columns": ["text", "b", "c"]},
         "a.tsv:1: expected 3 cells, one for each name under columns:, got 2"),
        ("a.csv", b"one,two\nx,y\n", {},
         "a.csv:2: text: missing; columns are one, two - set columns: {text: …}"),
        ("a.csv", b"text\n", {}, "a.csv: no rows"),
        ("a.csv", b"", {}, "a.csv: no rows"),
        ("a.tsv", b"\n\n", {}, "a.tsv: no rows"),
        ("a.csv", b"te\xe9xt\n", {}, "a.csv:1: not UTF-8 (byte 0xE9 at column 3); convert with iconv"),
        ("a.csv", b'text\n"a\nb\xe9"\n', {},
         "a.csv:3: not UTF-8 (byte 0xE9 at column 2); convert with iconv"),
        ("a.csv", b"text\na\x00b\n", {},
         "a.csv:2: NUL byte at column 2: a binary file, or UTF-16; convert with iconv or remove it"),
        ("a.tsv", b"text\na\x00b\n", {},
         "a.tsv:2: NUL byte at column 2: a binary file, or UTF-16; convert with iconv or remove it"),
        ("a.txt", b"one\n\n\x00two", {},
         "a.txt:3: NUL byte at column 1: a binary file, or UTF-16; convert with iconv or remove it"),
        ("a.jsonl", b'{"text": "x"}\n', {"columns": ["text"]},
         "a.jsonl: columns: a list names the columns of a csv or tsv file without header line; for a jsonl "
         "file write {field: column}"),
        ("a.jsonl", b'{"text": "x"}\n', {"revision": "main"},
         "a.jsonl: revision: only a dataset of the hub has one; remove it"),
        ("a.json", b'[{"text": "x"}', {}, "a.json:1: not valid JSON: the list is never closed"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) and ":" in value else "",
)  # fmt: skip
def test_bad_tables_and_texts_are_named_by_line(tmp_path, name, data, settings, line):
    assert failure(written(tmp_path / name, data), **settings) == line


def test_a_bad_csv_row_is_skipped_and_reading_goes_on_after_it(tmp_path):
    good = b"good\n" * 2
    for bad in (b"a,b\n", b'"a"b\n', b"a\xe9\n", b"a\x00\n", b'"two\nlines",b\n'):
        path = written(tmp_path / "a.csv", b"text\n" + good + bad + good)
        read = readers.read_source(source(path, on_bad_row="skip"), "documents")
        assert ([row.text for row in read.records], read.num_skipped) == (["good"] * 4, 1), bad


def test_an_unclosed_quote_is_never_skipped_for_it_swallows_the_rows_after_it(tmp_path):
    path = written(tmp_path / "a.csv", b'text\none\n"two\nthree\nfour\n')
    assert failure(path, on_bad_row="skip") == "a.csv:3: quote opened and never closed"
    path = written(tmp_path / "a.csv", b'text,b\n"one,1\ntwo,2\n"three",3\nfour,4\n' + b"five,5\n" * 300)
    assert failure(path, on_bad_row="skip") == (
        "a.csv:2: quote opened and never closed; the next one, in line 4, has text after it"
    )


def test_an_unclosed_quote_ends_at_the_longest_cell_and_not_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.data.reading.table_rows.MAX_CELL_CHARS", 2000)
    path = written(tmp_path / "a.csv", b'text,b\none,1\n"two,2\n' + b"three,3\n" * 300 + b"\xe9")
    assert failure(path) == (
        "a.csv:3: quote opened and never closed, or a cell of more than 2,000 characters"
    )


def test_a_nameless_first_column_as_pandas_writes_it_is_read(tmp_path):
    assert texts(written(tmp_path / "a.csv", b",text\n0,one\n1,two\n")) == ["one", "two"]


def test_cells_may_be_longer_than_the_csv_modules_limit(tmp_path):
    long = "x" * 1_000_000
    assert texts(written(tmp_path / "a.csv", f'text\n"{long}"\n'.encode())) == [long]


# txt


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("paragraph", [(2, "one\ntwo"), (5, "three"), (7, "four")]),
        ("line", [(2, "one"), (3, "two"), (5, "three"), (7, "four")]),
        ("file", [(1, "\none\ntwo\n \nthree\n\nfour")]),
    ],
)
def test_a_document_of_a_txt_file_is_a_paragraph_a_line_or_all_of_it(tmp_path, document, expected):
    path = written(tmp_path / "a.txt", b"\xef\xbb\xbf\r\none\r\ntwo\n \nthree\n\nfour\n")
    assert rows(path, document=document) == [(line, {"text": text}) for line, text in expected]


@pytest.mark.parametrize("document", ["paragraph", "line", "file"])
def test_a_blank_txt_file_has_no_rows_and_a_bad_line_is_one_bad_row(tmp_path, document):
    assert rows(written(tmp_path / "a.txt", b"\n \n"), document=document) == []
    found = rows(written(tmp_path / "a.txt", b"\n\xff\n"), document=document)
    assert found == [(2, "not UTF-8 (byte 0xFF at column 1); convert with iconv")]


# Compression


SOUND = {
    "jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "json": b'[{"text": "one"}, {"text": "two"}]',
    "csv": b"text\none\ntwo\n",
    "tsv": b"text\none\ntwo\n",
    "txt": b"one\n\ntwo\n",
}


@pytest.mark.parametrize("kind", SOUND)
def test_every_text_kind_is_read_plain_and_compressed(tmp_path, kind):
    for suffix, pack in (("", bytes), (".gz", gzip.compress), (".zst", zstd)):
        path = written(tmp_path / f"a.{kind}{suffix}", pack(SOUND[kind]))
        assert texts(path) == ["one", "two"], path.name
        both = written(tmp_path / f"b.{kind}{suffix}", pack(b"") + pack(SOUND[kind]))
        assert texts(both) == ["one", "two"], "compressed streams one after another"


@pytest.mark.parametrize(("suffix", "pack", "name"), [("gz", gzip.compress, "gzip"), ("zst", zstd, "zstd")])
def test_truncated_and_damaged_compressed_files_are_told_apart(tmp_path, suffix, pack, name):
    lines = b"".join(json.dumps({"text": os.urandom(8).hex()}).encode() + b"\n" for _ in range(20_000))
    whole_file = pack(lines)
    for cut in (len(whole_file) - 1, len(whole_file) // 2, 6):
        path = written(tmp_path / f"a.jsonl.{suffix}", whole_file[:cut])
        assert failure(path) == f"a.jsonl.{suffix}: file ends early (truncated?)"
    path = written(tmp_path / f"a.jsonl.{suffix}", b"plain text, misnamed\n")
    assert failure(path) == f"a.jsonl.{suffix}: not a valid {name} file, or damaged"
    path = written(tmp_path / f"a.jsonl.{suffix}", whole_file + b"trailing")
    assert failure(path) == f"a.jsonl.{suffix}: not a valid {name} file, or damaged"


def test_a_zstd_file_that_needs_too_much_memory_is_not_called_damaged(tmp_path):
    window = (28 - 10) << 3  # an exponent of 28: 256 MiB
    block = (1 | len(b"abc") << 3).to_bytes(3, "little") + b"abc"
    path = written(tmp_path / "a.txt.zst", bytes.fromhex("28b52ffd") + bytes([0, window]) + block)
    assert failure(path) == (
        "a.txt.zst: ZSTD decompress failed: Frame requires too much memory for decoding (a window above 128 "
        "MiB); compress it with zstd --long=27 or less"
    )


# parquet


def test_parquet_rows_are_numbered_through_all_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"row {n}" for n in range(1, 1001)]})
    pyarrow.parquet.write_table(table, path, row_group_size=300)
    assert rows(path) == [(n, {"text": f"row {n}"}) for n in range(1, 1001)]


def test_errors_in_parquet_name_the_row(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["x"] * 700 + [None])
    assert failure(path) == "a.parquet:701: text: expected text, got null"
    data = pyarrow.array([b"x"] * 300 + [b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    assert failure(parquet(tmp_path / "b.parquet", text=data)) == "b.parquet:301: text: not UTF-8"


def test_bytes_of_a_table_that_are_no_text_are_not_read_as_text(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=pyarrow.array([b"ok", b"caf\xe9"], pyarrow.binary()))
    assert failure(path) == "a.parquet:2: text: not UTF-8 (byte 0xE9 at column 4); convert with iconv"
    path = parquet(tmp_path / "b.parquet", text=["x"], image=pyarrow.array([b"\xff"], pyarrow.binary()))
    assert texts(path) == ["x"], "a column that is not read may hold bytes"


def test_parquet_values_become_what_json_would_hold(tmp_path):
    when = datetime.datetime(2024, 2, 3, 4, 5, 6)
    path = parquet(
        tmp_path / "a.parquet",
        text=pyarrow.array([b"caf\xc3\xa9"], pyarrow.binary()),
        image=pyarrow.array([b"\xff\x00"], pyarrow.binary()),
        messages=[[{"role": "user", "content": "q", "scores": [1, 2]}]],
        kind=pyarrow.array(["x"]).dictionary_encode(),
        entries=pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        when=[when],
        day=[when.date()],
        price=[decimal.Decimal("1.5")],
        took=[datetime.timedelta(seconds=90)],
        flag=[True],
        nothing=pyarrow.nulls(1),
    )
    ((_, row),) = rows(path)
    assert row == {
        "text": "café",
        "image": "/wA=",
        "messages": [{"role": "user", "content": "q", "scores": [1, 2]}],
        "kind": "x",
        "entries": {"k": 1},
        "when": "2024-02-03T04:05:06",
        "day": "2024-02-03",
        "price": 1.5,
        "took": 90.0,
        "flag": True,
        "nothing": None,
    }
    assert json.loads(json.dumps(row)) == row
    assert texts(path) == ["café"]


def test_a_time_that_python_cannot_hold_is_a_bad_row(tmp_path):
    when = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))
    (_, sound), odd = rows(parquet(tmp_path / "a.parquet", text=["x", "y"], when=when))
    assert sound == {"text": "x", "when": "1970-01-01T00:00:00"}
    assert odd == (2, "when: a timestamp[us] that Python cannot hold")


def test_of_a_map_with_a_key_twice_the_last_one_counts_and_nothing_is_printed(tmp_path):
    entries = pyarrow.array([[("k", 1), ("k", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int32()))
    path = parquet(tmp_path / "a.parquet", text=["x"], entries=entries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows(path) == [(1, {"text": "x", "entries": {"k": 2}})]


def test_truncated_damaged_and_empty_parquet_files_are_told_apart(tmp_path):
    data = parquet(tmp_path / "a.parquet", text=[os.urandom(50).hex() for _ in range(2000)]).read_bytes()
    for cut in (len(data) - 1, len(data) // 2, 4, 0):
        assert (
            failure(written(tmp_path / "b.parquet", data[:cut])) == "b.parquet: file ends early (truncated?)"
        )
    damaged = "b.parquet: not a valid parquet file, or damaged"
    assert failure(written(tmp_path / "b.parquet", b"{}" * 100)) == damaged
    assert failure(written(tmp_path / "b.parquet", data[:10] + b"\xff" * 40 + data[50:])) == damaged
    empty = parquet(tmp_path / "c.parquet", text=pyarrow.array([], pyarrow.string()))
    assert failure(empty) == "c.parquet: no rows"


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert failure(tmp_path / "a.parquet") == "a.parquet: column 'text' stands twice; rename one"


# Places


def test_a_directory_is_read_with_all_its_kinds_in_path_order(tmp_path):
    for kind, data in SOUND.items():
        written(tmp_path / f"{kind}.{kind}", data)
    parquet(tmp_path / "q.parquet", text=["one", "two"])
    written(tmp_path / "z.jsonl.zst", zstd(SOUND["jsonl"]))
    written(tmp_path / "README.md", b"not data")
    assert len(files_at(tmp_path)) == 7
    assert texts(tmp_path) == ["one", "two"] * 7


def test_links_are_followed_and_a_row_is_read_once_however_many_names_it_has(tmp_path):
    for folder in ("data", "elsewhere"):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder / "a.jsonl", json.dumps({"text": folder}).encode())
    (tmp_path / "data" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "z.jsonl").symlink_to(tmp_path / "data" / "a.jsonl")
    assert texts(tmp_path / "data") == ["data", "elsewhere"]
    assert sorted(texts(tmp_path / "data" / "**" / "*.jsonl")) == ["data", "elsewhere"]
    (tmp_path / "data" / "self").rename(tmp_path / "data" / "0")  # sorts before the file it leads to
    assert texts(tmp_path / "data" / "**" / "*.jsonl") == ["data", "elsewhere"]


def test_links_upwards_do_not_lead_round_and_round(tmp_path):
    below = tmp_path / "data" / "inner"
    below.mkdir(parents=True)
    written(below / "a.jsonl", b'{"text": "one"}')
    for name in ("up", "again", "top"):
        (below / name).symlink_to(tmp_path / "data")
    for pattern in ("**", "**/*.jsonl", "**/inner/**/*.jsonl", "*/**"):
        assert files_at(tmp_path / pattern) == [below / "a.jsonl"], pattern


def test_a_directory_is_taken_by_its_shortest_path(tmp_path):
    for place in ("a/b", "z"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "a/b/far").symlink_to(tmp_path / "z")
    written(tmp_path / "z/x.jsonl", b'{"text": "one"}')
    for place in ("", "**", "**/x.jsonl", "**/*.jsonl"):
        assert files_at(tmp_path / place) == [tmp_path / "z/x.jsonl"], place


PATTERNS = (
    "*", "**", "*/*", "*/", "**/", "**/*.jsonl", "a/**", "a/**/*.jsonl", "**/a/*", "?", "[ab]*", "[!a]*",
    "*/c.jsonl", "**/c.jsonl", ".*", ".*/*", "**/.*", "[.]*", "x[[]1]/*", "x[1]/*", "a/../*.jsonl", "gone/*",
    "*/gone", "c.jsonl", "./*", "*.jsonl/*",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_what_they_match_in_the_standard_library(tmp_path, monkeypatch, pattern):
    for folder in (".", "a", "a/b", "a/.h", ".h", "x[1]", "x1", "a-b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("c.jsonl", "d.txt", ".e.jsonl", "a-c.jsonl"):
            written(tmp_path / folder / name, b"")
    monkeypatch.chdir(tmp_path)
    expected = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if Path(match).is_file()]
    assert files_matching(pattern) == expected
    assert files_matching(f"{tmp_path}/{pattern}") == [tmp_path / path for path in expected]


@pytest.mark.process
@pytest.mark.parametrize("pattern", ["", "**", "**/*.jsonl", "*/*.jsonl", "*/a.jsonl"])
def test_a_directory_that_may_not_be_read_is_not_left_out_in_silence(tmp_path, pattern):
    for folder in ("open", "shut"):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder / "a.jsonl", b'{"text": "one"}')
    code = "import sys, stages.data.reading.places as places; print(places.found_at(sys.argv[1], 'train'))"
    (tmp_path / "shut").chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / pattern)],
        capture_output=True,
        text=True,
        preexec_fn=no_override,
        check=False,
    )
    (tmp_path / "shut").chmod(0o755)
    problem = done.stderr.splitlines()[-1].partition("DataError: ")[2]
    assert problem.startswith(f"{tmp_path}/shut") and problem.endswith(": cannot be read: Permission denied")


def no_override() -> None:
    """From here on permissions hold for root too: exec gives no capability outside of the bounding set."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    written(tmp_path / "a.jsonl", SOUND["jsonl"])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "README.md").symlink_to(tmp_path / "gone.md")
    for place in ("", "*.jsonl", "*"):
        assert failure(tmp_path / place).endswith("b.jsonl: a link that leads nowhere")


@pytest.mark.parametrize("suffix", ["ndjson", "jsonlines", "NDJSON.gz"])
def test_other_names_of_jsonl_are_jsonl(tmp_path, suffix):
    pack = gzip.compress if suffix.endswith("gz") else bytes
    assert texts(written(tmp_path / f"a.{suffix}", pack(SOUND["jsonl"]))) == ["one", "two"]


def test_upper_case_suffixes_are_suffixes(tmp_path):
    assert texts(written(tmp_path / "A.JSONL.GZ", gzip.compress(SOUND["jsonl"]))) == ["one", "two"]


@pytest.mark.parametrize("name", ["jsonl", "a.parquet.gz", "a.gz", "a", "a.jsonl.bz2", ".zst"])
def test_a_name_that_says_nothing_is_met_with_the_kinds_there_are(tmp_path, name):
    assert failure(written(tmp_path / name, b"{}\n")) == (
        f"{name}: cannot tell what it is by its name; jsonl, json, parquet, arrow, csv, tsv, txt and "
        f".gz or .zst of "
        "the text ones are read"
    )


def test_pipes_missing_places_and_impossible_names_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert failure(tmp_path / "a.jsonl") == "a.jsonl: not a file"
    assert failure(tmp_path / "gone" / "b.jsonl") == "no such file: b.jsonl"
    assert failure(tmp_path / ("x" * 300 + ".jsonl")).endswith("cannot be read: File name too long")
    assert failure(tmp_path / "a\0b.jsonl") == r"no such file: a\x00b.jsonl"
    assert failure(tmp_path / "a\nb.jsonl") == r"no such file: a\nb.jsonl"


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")  # nothing is mapped at its start
    assert failure(tmp_path / "a.jsonl") == "a.jsonl: cannot be read: Input/output error"


# Splits


def records_of_splits(settings: DataSource, block_bytes: int) -> tuple[list[Any], readers.Counts]:
    records: list[Any] = []
    counts = None
    for split in readers.splits_of(settings, block_bytes):
        reader = readers.read_split(settings, split, "documents")
        records += list(reader)
        counts = reader.counts if counts is None else counts + reader.counts
    assert counts is not None
    readers.check_counts(settings, counts, len(records))
    return records, counts


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1000, 10**9])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz"])
def test_the_splits_of_a_file_hold_its_rows_once_in_order(tmp_path, name, block_bytes):
    values = ["x" * (n % 50) + str(n) for n in range(100)]
    lines = [json.dumps({"text": value}) if "jsonl" in name else value for value in values]
    data = ("\ufeff" + ("text\n" if name == "a.csv" else "") + "\r\n\n".join(lines)).encode()
    path = written(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    settings = source(path, document="line")
    records, counts = records_of_splits(settings, block_bytes)
    assert records == readers.read_source(settings, "documents").records
    assert [record.text for record in records] == values
    assert (counts.num_rows, counts.num_records, counts.num_skipped) == (100, 100, 0)
    num_splits = len(readers.splits_of(settings, block_bytes))
    can_be_cut = name in ("a.jsonl", "a.txt")
    assert num_splits > 20 if can_be_cut and block_bytes <= 64 else num_splits == 1 or can_be_cut


def test_txt_paragraphs_are_not_cut(tmp_path):
    path = written(tmp_path / "a.txt", b"one\ntwo\n\nthree\n")
    assert readers.splits_of(source(path), 1) == [whole(path)]


def test_lines_in_errors_of_a_split_are_those_of_the_file(tmp_path):
    path = written(tmp_path / "a.jsonl", b'{"text": "x"}\n' * 50 + b"{broken\n" + b'{"text": "x"}\n' * 50)
    settings = source(path)
    message = failure(path)
    assert message.startswith("a.jsonl:51: ")
    with pytest.raises(DataError) as caught:
        records_of_splits(settings, 100)
    assert str(caught.value).endswith(message)


def test_the_cap_of_skipped_rows_holds_for_all_splits_together(tmp_path):
    good, bad = b'{"text": "x"}\n', b"{broken\n"
    path = written(tmp_path / "a.jsonl", bad + good * 198 + bad)
    settings = source(path, on_bad_row="skip")
    records, counts = records_of_splits(settings, 200)
    assert (len(records), counts.num_skipped, counts.num_rows) == (198, 2, 200)
    path.write_bytes(bad + good * 197 + bad * 2)
    with pytest.raises(DataError, match="3 of 200 rows are bad") as caught:
        records_of_splits(settings, 200)
    assert "a.jsonl:1:" in str(caught.value), "the first bad row is named"


def test_later_splits_use_the_schema_that_the_first_row_of_the_source_has(tmp_path):
    first = {"instruction": "q", "output": "a"}
    later = {"instruction": "q", "output": "a", "prompt": "p", "completion": "c"}
    lines = [json.dumps(row).encode() for row in (first, later)]
    path = written(tmp_path / "a.jsonl", b"\n".join(lines))
    settings = source(path)
    whole_file = readers.read_source(settings, "conversations").records
    splits = readers.splits_of(settings, 1)
    assert len(splits) == 2
    assert [r for split in splits for r in readers.read_split(settings, split, "conversations")] == whole_file
    assert whole_file[0] == whole_file[1]


# Other signs between the cells of a csv file


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_a_csv_file_may_have_another_sign_between_its_cells(tmp_path, sign):
    data = f'\ufeffprompt{sign}text\r\n"a{sign}b, ""c"""{sign}one, two\r\nx{sign}y\r\n'
    assert rows(written(tmp_path / "a.csv", data.encode())) == [
        (2, {"prompt": f'a{sign}b, "c"', "text": "one, two"}),
        (3, {"prompt": "x", "text": "y"}),
    ]
    packed = written(tmp_path / "a.csv.gz", gzip.compress(data.encode()))
    assert rows(packed) == rows(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("data", "settings", "expected"),
    [
        (b"sep=;\r\nprompt;text\r\nx;y\r\n", {}, [(3, {"prompt": "x", "text": "y"})]),
        (b"sep=:\nprompt:text\nx:y,z\n", {}, [(3, {"prompt": "x", "text": "y,z"})]),
        (b";prompt;text\n0;x;y\n", {}, [(2, {"": "0", "prompt": "x", "text": "y"})]),
        (b"\n\nprompt|text\nx|y\n", {}, [(4, {"prompt": "x", "text": "y"})]),
        (b"x;y\n", {"columns": ["prompt", "text"]}, [(1, {"prompt": "x", "text": "y"})]),
        (b"x; y\n", {"columns": ["text"]}, [(1, {"text": "x; y"})]),
        (b"text\nx; y\n", {}, [(2, {"text": "x; y"})]),
        (b"prompt,text\nx;1,y;2\n", {}, [(2, {"prompt": "x;1", "text": "y;2"})]),
        (b"a;b|c\nx\n", {}, [(2, {"a;b|c": "x"})]),
        (b'"a;b"\nx\n', {}, [(2, {"a;b": "x"})]),
    ],
)  # fmt: skip
def test_the_first_line_tells_the_sign_between_cells(tmp_path, data, settings, expected):
    assert rows(written(tmp_path / "a.csv", data), **settings) == expected


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"a;text\nx;y;z\n",
         "a.csv:2: expected 2 cells, got 3; a cell that holds a semicolon must stand in quotes"),
        (b"a;text\nx,y\n",
         "a.csv:2: expected 2 cells, got 1; a semicolon separates the cells of the first line"),
        (b'a;text\n"one\ntwo";"say ""hi"" \n" now;x\n',
         "a.csv:3: quote opened and never closed; the next one, in line 4, has text after it"),
    ],
)  # fmt: skip
def test_errors_of_such_a_file_name_its_sign_and_line(tmp_path, data, line):
    assert failure(written(tmp_path / "a.csv", data)) == line


# Arrow files


def arrow(path: Path, *, batch_rows: int, is_file: bool, **columns: Any) -> Path:
    table = pyarrow.table(columns)
    new = pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return path


@pytest.mark.parametrize("is_file", [False, True])
def test_arrow_rows_are_numbered_through_all_batches(tmp_path, is_file):
    texts = [f"row {n}" for n in range(1, 1001)]
    path = arrow(tmp_path / "a.arrow", batch_rows=700, is_file=is_file, text=texts)
    assert rows(path) == [(n, {"text": text}) for n, text in enumerate(texts, start=1)]


@pytest.mark.parametrize("is_file", [False, True])
def test_truncated_damaged_and_empty_arrow_files_are_told_apart(tmp_path, is_file):
    whole_file = arrow(
        tmp_path / "a.arrow", batch_rows=100, is_file=is_file, text=["x" * 50] * 1000
    ).read_bytes()
    for cut in (len(whole_file) - 4, len(whole_file) // 2, 5, 0):
        path = written(tmp_path / "b.arrow", whole_file[:cut])
        assert failure(path) == "b.arrow: file ends early (truncated?)", cut
    assert (
        failure(written(tmp_path / "b.arrow", b"{}" * 100)) == "b.arrow: not a valid Arrow file, or damaged"
    )
    empty = arrow(
        tmp_path / "c.arrow", batch_rows=1, is_file=is_file, text=pyarrow.array([], pyarrow.string())
    )
    assert failure(empty) == "c.arrow: no rows"


# Git LFS


@pytest.mark.parametrize(
    "suffix", ["jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow", "jsonl.gz", "txt.zst"]
)
def test_a_git_lfs_pointer_is_named_whatever_its_ending(tmp_path, suffix):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123456\n"
    path = written(tmp_path / f"a.{suffix}", pointer)
    assert (
        failure(path) == f"a.{suffix}: a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"
    )


def test_a_text_about_git_lfs_is_a_text(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1 is how a pointer begins. " + "It is small. " * 100
    assert texts(written(tmp_path / "a.txt", text.encode())) == [text]
