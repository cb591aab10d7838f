"""The same work by peers: a jsonl file in, ids of its documents on the disk out, one process and two.

    this project   normal form, exact duplicates out, ids, rows of CONTEXT_LENGTH, digests of every file
    datatrove      rows read by json -> DocumentTokenizer: ids one after another, not shuffled
    datasets       load_dataset -> map(tokenise) -> map(concatenate and chunk), as run_clm.py does it

Every measurement is a process of its own that has imported what it needs; the time holds the starting of
workers by fork, where there are two. One thread each. Reading is part of the work for all.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data_parts.processes import in_child
from data_parts.texts import documents_of, jsonl_lines, passages, read_text
from data_parts.tokenise import CONTEXT_LENGTH, loaded, train
from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig
from stages.data.chat.special import END_OF_TEXT
from stages.data.corpus.blocks import Corpus, documents, encode_block
from stages.data.corpus.filtering import BlockReport, Filter, filter_block
from stages.data.corpus.selection import select
from stages.data.corpus.shards import token_dtype, write_shards
from stages.data.reading.files import FileSplit
from stages.data.reading.readers import splits_of

PASSAGE_WORDS, PASSAGES = 50, 8
NUM_FILES = 8
"""Parts of the input, so that workers of any of the three have some each."""


def measure(files: Sequence[Path], megabytes: float, repeats: int) -> dict[str, Any]:
    """Median seconds of each peer and number of processes, interleaved; and the tokens each counts."""
    with TemporaryDirectory(prefix="bench-peers-") as name:
        directory = Path(name)
        tokenizer = in_child(_make, files=files, megabytes=megabytes, directory=directory)
        measured: dict[str, list[float]] = {}
        tokens: dict[str, int] = {}
        for round_ in range(repeats):
            for peer, work in PEERS.items():
                for processes in (1, 2):
                    out = directory / f"{round_}-{processes}-{work.__name__}"
                    out.mkdir()
                    seconds, counted = in_child(
                        work, processes=processes, data=directory / "data", out=out, tokenizer=tokenizer
                    )
                    measured.setdefault(f"{peer} x{processes}", []).append(seconds)
                    tokens[peer] = counted
        data = sum(path.stat().st_size for path in (directory / "data").iterdir())
    return {
        "megabytes": data / 1e6,
        "tokens": tokens,
        "seconds": {
            peer: {"median": statistics.median(times), "min": min(times), "max": max(times)}
            for peer, times in measured.items()
        },
    }


def _make(files: Sequence[Path], megabytes: float, directory: Path) -> Path:
    """data/*.jsonl, and the tokenizer's directory."""
    text = read_text(files)
    lines = list(jsonl_lines(passages(text, PASSAGE_WORDS), int(megabytes * 1e6), PASSAGES))
    (directory / "data").mkdir()
    for number in range(NUM_FILES):
        (directory / "data" / f"{number}.jsonl").write_bytes(b"".join(lines[number::NUM_FILES]))
    return train(documents_of(text, 2000), directory / "tokenizer")


# This project


def _by_this_project(data: Path, out: Path, tokenizer: Path, processes: int) -> tuple[float, int]:
    """As prepare does it, its workers being processes of a pool instead of Ray's."""
    chat = loaded(tokenizer)  # forked workers have it too
    config = PrepareConfig(data=[DataSource(path=str(data))], tokenizer=tokenizer)
    start = time.perf_counter()
    splits = splits_of(config.data[0], int(config.block_mb * 1e6))
    with _mapping(processes) as mapped:
        reports = list(mapped(partial(_filtered, out, config), list(enumerate(splits))))
        corpus = Corpus(out, [report.num_kept for report in reports], [0] * len(reports))
        selection = select(corpus, config, seed=0)
        for _ in mapped(partial(_encoded, corpus, tokenizer), range(len(splits))):
            pass
    counts = write_shards(
        out,
        documents(corpus, selection.train, token_dtype(chat.vocab_size)),
        documents(corpus, selection.heldout, token_dtype(chat.vocab_size)),
        packing="concat",
        separator_id=chat.separator_id,
        vocab_size=chat.vocab_size,
        context_length=CONTEXT_LENGTH,
        shard_tokens=config.shard_tokens,
    )
    return time.perf_counter() - start, counts.tokens_text + counts.tokens_heldout


class _mapping:
    """`map` of this process, or of a pool of forked ones."""

    def __init__(self, processes: int) -> None:
        fork = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(processes, mp_context=fork) if processes > 1 else None

    def __enter__(self) -> Callable[..., Any]:
        return map if self._pool is None else self._pool.map

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _filtered(out: Path, config: PrepareConfig, numbered: tuple[int, FileSplit]) -> BlockReport:
    number, split = numbered
    return filter_block(out, number, split, config.data[0], config, Filter(config, []))


def _encoded(corpus: Corpus, tokenizer: Path, block: int) -> None:
    chat = loaded(tokenizer)
    dtype = token_dtype(chat.vocab_size)
    wanted = np.ones(int(np.diff(corpus.starts)[block]), bool)
    encode = partial(chat.documents_ids, dtype=dtype)
    encode_block(corpus, block, wanted, encode, dtype, tokenizer=str(tokenizer))


# Peers


def _by_datatrove(data: Path, out: Path, tokenizer: Path, processes: int) -> tuple[float, int]:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer

    executor = LocalPipelineExecutor(
        pipeline=[
            partial(_rows, data),
            DocumentTokenizer(
                output_folder=str(out / "tokens"),
                tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
                eos_token=END_OF_TEXT,
                shuffle_documents=False,
                save_final_metadata=False,
            ),
        ],
        tasks=processes,
        workers=processes,
        start_method="fork",
        logging_dir=str(out / "logs"),
    )
    start = time.perf_counter()
    executor.run()
    seconds = time.perf_counter() - start
    return seconds, sum(file.stat().st_size for file in (out / "tokens").glob("*.ds")) // 2


def _rows(data: Path, _: Any, rank: int, world_size: int) -> Iterator[Any]:
    """datatrove's documents of one task; its own JsonlReader wants a package that is not among ours."""
    from datatrove.data import Document

    for path in sorted(data.iterdir())[rank::world_size]:
        with path.open("rb") as stream:
            for number, line in enumerate(stream):
                yield Document(text=json.loads(line)["text"], id=f"{path.name}/{number}")


def _by_datasets(data: Path, out: Path, tokenizer: Path, processes: int) -> tuple[float, int]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    fast = AutoTokenizer.from_pretrained(tokenizer)
    num_proc = processes if processes > 1 else None
    start = time.perf_counter()
    rows = datasets.load_dataset(
        "json",
        data_files=sorted(map(str, data.iterdir())),
        split="train",
        cache_dir=str(out / "cache"),
        num_proc=num_proc,
    )
    ids = rows.map(
        partial(_tokenised, fast), batched=True, num_proc=num_proc, remove_columns=rows.column_names
    )
    chunks = ids.map(_chunked, batched=True, num_proc=num_proc)
    return time.perf_counter() - start, len(chunks) * CONTEXT_LENGTH


def _tokenised(tokenizer: Any, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return {"input_ids": [[*one, tokenizer.eos_token_id] for one in ids]}


def _chunked(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Rows of CONTEXT_LENGTH from a batch's ids end to end; the rest of each batch is left out."""
    ids = [token for one in batch["input_ids"] for token in one]
    ends = range(CONTEXT_LENGTH, len(ids) + 1, CONTEXT_LENGTH)
    return {"input_ids": [ids[end - CONTEXT_LENGTH : end] for end in ends]}


PEERS: dict[str, Callable[..., tuple[float, int]]] = {
    "this project": _by_this_project,
    "datatrove": _by_datatrove,
    "datasets": _by_datasets,
}
