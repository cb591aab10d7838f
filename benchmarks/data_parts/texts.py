"""The text that is measured on: read once, end to end, and cut into documents by fixed seeds.

    files --read_text--> one text --documents_of--> documents of web-like lengths --write_jsonl--> file
                            |
                            +--passages--> runs of words --mixtures--> any number of distinct documents

Everything is a function of the text and the arguments. Owns nothing on the disk but what it is told to write.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from stages.config.data import DataSource
from stages.data.reading.readers import read_source

SIGMA = 0.9
"""Lengths of documents are log-normal with this spread, as those of web pages; the mean is 1.5 medians."""


def read_text(files: Sequence[Path]) -> str:
    """All documents of the files, blank lines between them."""
    sources = [DataSource(path=str(file), document="file") for file in files]
    return "\n\n".join(
        document.text for source in sources for document in read_source(source, "documents").records
    )


def documents_of(text: str, median_chars: int, seed: int = 0) -> list[str]:
    """The text cut at white space into documents of log-normal lengths."""
    rng = np.random.default_rng(seed)
    documents = []
    start = 0
    while start < len(text):
        length = int(median_chars * math.exp(SIGMA * rng.standard_normal()))
        end = text.find(" ", start + max(1, length))
        end = len(text) if end < 0 else end
        documents.append(text[start:end].strip())
        start = end
    return [document for document in documents if document]


def passages(text: str, num_words: int) -> list[str]:
    """The text as runs of `num_words` words; the rest is left out."""
    words = text.split()
    ends = range(num_words, len(words) + 1, num_words)
    return [" ".join(words[end - num_words : end]) for end in ends]


def mixtures(num_passages: int, num_documents: int, per_document: int, seed: int = 0) -> np.ndarray:
    """int64 (num_documents, per_document): which passages make each document, each one's in random order.

    Every passage stands about equally often, and no two documents share all (or, with thousands of passages,
    more than one or two).
    """
    rng = np.random.default_rng(seed)
    rounds = -(-num_documents * per_document // num_passages)
    drawn = np.concatenate([rng.permutation(num_passages) for _ in range(rounds)])
    return drawn[: num_documents * per_document].reshape(num_documents, per_document)


def write_jsonl(path: Path, documents: Iterable[str]) -> None:
    """One {"text": ...} per line."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)


def jsonl_lines(found: Sequence[str], num_bytes: int, per_document: int) -> Iterator[bytes]:
    """Lines of a jsonl file of about `num_bytes`, each document a mixture of passages."""
    encoded = [json.dumps(passage, ensure_ascii=False)[1:-1].encode() for passage in found]
    mean = sum(map(len, encoded)) / len(encoded) * per_document
    for members in mixtures(len(encoded), max(1, int(num_bytes / mean)), per_document).tolist():
        yield b'{"text": "' + b"\\n".join(encoded[index] for index in members) + b'"}\n'
