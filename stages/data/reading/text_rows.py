"""Text rows: the lines of a txt file -> its documents; and what lines of text may hold at all.

    lines --decoded--> text --blank lines--> {"text": a document}

Owns where a document ends. Does not own files (files) or tables of text (table_rows). Light import.
"""

from collections.abc import Iterable, Iterator, Sequence

from stages.data.reading.json_rows import RawRow, decoded


def text_lines(lines: Iterable[bytes], first_line: int) -> Iterator[RawRow | tuple[int, str]]:
    """(line number, text without its line end), or the row that says what is wrong with the line."""
    for number, data in enumerate(lines, start=first_line):
        text = decoded(data, number)
        if isinstance(text, RawRow):
            yield text
        elif "\0" in text:
            yield with_nul(number, text)
        else:
            yield number, text


def with_nul(number: int, text: str) -> RawRow:
    """The row that says where a line holds a NUL byte."""
    column = text.index("\0") + 1
    problem = f"NUL byte at column {column}: a binary file, or UTF-16; convert with iconv or remove it"
    return RawRow(number, None, problem)


def documents(lines: Iterable[RawRow | tuple[int, str]], document: str) -> Iterator[RawRow]:
    """The documents of a txt file: its lines, its blocks of lines between blank ones, or all of it."""
    block: list[str] = []
    start, problem = 1, ""
    for line in lines:
        number, text = line[0], "" if isinstance(line, RawRow) else line[1]
        is_blank = not isinstance(line, RawRow) and not text.strip()
        if is_blank and (document != "file"):
            if block:
                yield _document(start, block, problem)
            block, problem = [], ""
            continue
        start = start if block else number
        if isinstance(line, RawRow) and not problem:
            start, problem = number, line.problem  # the line to look at
        block.append(text)
        if document == "line":
            yield _document(start, block, problem)
            block, problem = [], ""
    if problem or any(text.strip() for text in block):
        yield _document(start, block, problem)


def _document(start: int, lines: Sequence[str], problem: str) -> RawRow:
    return RawRow(start, None if problem else {"text": "\n".join(lines)}, problem)
