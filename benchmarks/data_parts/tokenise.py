"""Tokenise and pack: the path of prepare against the bare tokenizer's batch call, same text, interleaved.

documents --filter_block--> blocks on disk (not timed)
bare        texts in memory --encode_batch--> thrown away
prepare     blocks on disk --encode_block--> ids on disk --documents, write_shards--> shards on disk
"""

import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_parts.processes import in_child
from data_parts.texts import documents_of, read_text, write_jsonl
from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig
from stages.data.chat.special import CHATML
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus.blocks import Corpus, documents, encode_block
from stages.data.corpus.filtering import Filter, filter_block
from stages.data.corpus.shards import token_dtype, write_shards
from stages.data.corpus.vocabulary import train_tokenizer
from stages.data.reading.readers import splits_of

VOCAB_SIZE = 8192
CONTEXT_LENGTH = 2048
NUM_BLOCKS = 4
PACKINGS = ("concat", "best_fit", "bucket")
LONG, SHORT = 2000, 200
"""Median characters of a document: of web pages, and of short answers."""


def measure(files: Sequence[Path], repeats: int) -> dict[str, Any]:
    """Seconds of every variant, and what the text was."""
    return {
        "long": in_child(_variants, files=files, median_chars=LONG, repeats=repeats, processes=2),
        "short": in_child(_variants, files=files, median_chars=SHORT, repeats=repeats, processes=1),
        "threads": in_child(
            _variants, threads=2, files=files, median_chars=LONG, repeats=repeats, processes=1
        ),
    }


def train(texts: Sequence[str], directory: Path) -> Path:
    """A tokenizer of VOCAB_SIZE entries, trained on the texts and saved."""
    ChatTokenizer(train_tokenizer(texts, VOCAB_SIZE, 64), template=CHATML).save(directory)
    return directory


def _variants(files: Sequence[Path], median_chars: int, repeats: int, processes: int) -> dict[str, Any]:
    """Variant -> median seconds: `NAME` in this process, `NAME x2` in two that are running already."""
    texts = documents_of(read_text(files), median_chars)
    with _blocks(texts) as (corpus, tokenizer):
        work = _Work(corpus.directory, corpus.starts, tokenizer)
        variants: dict[str, Callable[[], int]] = {
            "encode_batch": lambda: sum(map(work.encode_batch, range(NUM_BLOCKS))),
            "encode_batch_fast": lambda: sum(map(work.encode_batch_fast, range(NUM_BLOCKS))),
            **{packing: partial(_prepared, work, packing, map) for packing in PACKINGS},
        }
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=spawn, initializer=work.warm_up) as pool:
            if processes > 1:
                variants["encode_batch x2"] = lambda: sum(pool.map(work.encode_batch, range(NUM_BLOCKS)))
                for packing in PACKINGS:
                    variants[f"{packing} x2"] = partial(_prepared, work, packing, pool.map)
            tokens, seconds = _interleaved(variants, repeats)
    return {
        "documents": len(texts),
        "megabytes": sum(len(text.encode()) for text in texts) / 1e6,
        "tokens": tokens,
        "median_chars": median_chars,
        "context_length": CONTEXT_LENGTH,
        "seconds": seconds,
    }


@contextmanager
def _blocks(texts: Sequence[str]) -> Iterator[tuple[Corpus, Path]]:
    """The documents as NUM_BLOCKS filtered blocks, and a tokenizer trained on them."""
    directory = Path(tempfile.mkdtemp(prefix="bench-tokenise-"))
    try:
        file = directory / "documents.jsonl"
        write_jsonl(file, texts)
        config = PrepareConfig(data=[DataSource(path=str(file))], exact_dedup=False)
        source, keeps = config.data[0], Filter(config, [])
        splits = splits_of(source, -(-file.stat().st_size // NUM_BLOCKS))
        assert len(splits) == NUM_BLOCKS
        reports = [filter_block(directory, n, split, source, config, keeps) for n, split in enumerate(splits)]
        corpus = Corpus(directory, [report.num_kept for report in reports], [0] * NUM_BLOCKS)
        yield corpus, train(texts, directory / "tokenizer")
    finally:
        shutil.rmtree(directory)


class _Work:
    """What a process does with one block; can be sent to another, which loads its own tokenizer."""

    def __init__(self, directory: Path, starts: np.ndarray, tokenizer: Path) -> None:
        self.directory, self.starts, self.tokenizer = directory, starts, tokenizer

    @property
    def corpus(self) -> Corpus:
        return Corpus(self.directory, np.diff(self.starts).tolist(), [0] * NUM_BLOCKS)

    def warm_up(self) -> None:
        """What no variant's time shall hold."""
        loaded(self.tokenizer)
        for block in range(NUM_BLOCKS):
            _texts(self.directory, block)

    def encode_batch(self, block: int) -> int:
        """Tokens, by the bare tokenizer's batch call, ids left where the library has them."""
        encodings = loaded(self.tokenizer).tokenizer.backend_tokenizer.encode_batch(
            _texts(self.directory, block), add_special_tokens=False
        )
        return sum(map(len, encodings))

    def encode_batch_fast(self, block: int) -> int:
        """The same by the call that keeps no offsets."""
        encodings = loaded(self.tokenizer).tokenizer.backend_tokenizer.encode_batch_fast(
            _texts(self.directory, block), add_special_tokens=False
        )
        return sum(map(len, encodings))

    def encode_block(self, block: int) -> None:
        """As prepare does it."""
        chat, corpus = loaded(self.tokenizer), self.corpus
        dtype = token_dtype(chat.vocab_size)
        wanted = np.ones(int(np.diff(self.starts)[block]), bool)
        encode = partial(chat.documents_ids, dtype=dtype)
        encode_block(corpus, block, wanted, encode, dtype, tokenizer=str(self.tokenizer))


@cache
def loaded(tokenizer: Path) -> ChatTokenizer:
    """Once per process, as in a worker of prepare."""
    return ChatTokenizer.load(tokenizer)


@cache
def _texts(directory: Path, block: int) -> list[str]:
    """The texts of a block, in the memory of this process."""
    ends = np.load(directory / f"{block:06d}.npz")["ends"].tolist()
    data = (directory / f"{block:06d}.text").read_bytes()
    return [data[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _prepared(work: _Work, packing: Any, mapped: Callable[..., Any]) -> int:
    """Tokens of the documents, from blocks to shards on the disk; `mapped` runs the blocks."""
    for block in range(NUM_BLOCKS):
        (work.directory / f"{block:06d}.encoded.json").unlink(missing_ok=True)
    for _ in mapped(work.encode_block, range(NUM_BLOCKS)):
        pass
    chat, corpus = loaded(work.tokenizer), work.corpus
    out = work.directory / "shards"
    out.mkdir(exist_ok=True)
    counts = write_shards(
        out,
        documents(corpus, np.arange(len(corpus)), token_dtype(chat.vocab_size)),
        (),
        packing=packing,
        separator_id=chat.separator_id,
        vocab_size=chat.vocab_size,
        context_length=CONTEXT_LENGTH,
        shard_tokens=1_000_000,
    )
    return counts.tokens_text


def _interleaved(variants: dict[str, Callable[[], int]], repeats: int) -> tuple[int, dict[str, Any]]:
    """Tokens of the text, and per variant the median, fastest and slowest of `repeats` rounds over all."""
    measured: dict[str, list[float]] = {name: [] for name in variants}
    found: set[int] = set()
    for round_ in range(repeats + 1):  # the first warms up: caches of words, page cache, processes
        for name, variant in variants.items():
            start = time.perf_counter()
            found.add(variant())
            if round_:
                measured[name].append(time.perf_counter() - start)
    (tokens,) = found  # every variant gives the same tokens
    return tokens, {
        name: {"median": statistics.median(times), "min": min(times), "max": max(times)}
        for name, times in measured.items()
    }
