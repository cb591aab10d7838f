"""prepare: documents in; tokenizer, packed token shards and statistics out.

    split -> filter (block by block) -> select (all) -> tokenizer -> encode (block by block) -> pack -> shards
      files that cannot be split -> read into pieces: blocks like the others

Everything is a function of the documents' contents and the settings: the same input gives the same bytes,
whatever the size and number of blocks and whoever works on them - this process, or Ray Data's workers. A
killed run takes up the blocks that were whole. Owns the order of these steps and what a worker does. Does not
own the formats (reading), the work on a block (filtering, blocks), who works (workers), or the layout of the
shards (shards).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from rollout.ground.whole import file_digest
from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig, PrepareSettings
from stages.data.chat.encoders import content_encoder, documents_ids
from stages.data.corpus.blocks import Corpus, documents, encode_block
from stages.data.corpus.decontamination import num_too_short, texts_of
from stages.data.corpus.filtering import BlockReport, Filter, filter_block
from stages.data.corpus.languages import check_languages
from stages.data.corpus.pieces import piece_source, read_pieces
from stages.data.corpus.selection import select, tokenizer_sample
from stages.data.corpus.shards import token_dtype, write_shards
from stages.data.corpus.statistics import metrics_of, row_counts, sources_of, steps_of
from stages.data.corpus.vocabulary import given_tokenizer, tokenizer_for
from stages.data.corpus.workers import Workers, unless_stopped
from stages.data.reading.files import FileSplit, whole
from stages.data.reading.readers import NO_ROWS, Counts, read_source, splits_of
from stages.data.reading.records import Prompt
from stages.errors import DataError
from stages.runtime import START, Runtime

RECIPE_VERSION = 5
DECIDING_PACKAGES = ("numpy", "py3langid", "pyarrow", "rensa", "rlhf-pipeline", "tokenizers")
"""Blocks of other versions of these are not taken up."""


def run(
    settings: PrepareSettings, inputs: Mapping[str, Path], out_dir: Path, runtime: Runtime
) -> Mapping[str, float]:
    """Write tokenizer, shards, index.json and statistics.json to out_dir; return the counts.

    `inputs` may hold `start`, a model whose tokenizer is taken. Raises DataError, ModelError,
    Interrupted.
    """
    config, template = settings.prepare, settings.model.chat_template
    check_languages(config.languages)
    chat = given_tokenizer(inputs.get(START, config.tokenizer), config, template)  # now: it may be unusable
    blocks = _blocks(config)
    texts = evaluation_texts(settings.evaluation_prompts)
    directory = runtime.work_dir / f"blocks-{_digest(settings, blocks, texts)}"
    directory.mkdir(parents=True, exist_ok=True)
    work = Workers(runtime=runtime, on_ray_data=_is_large(blocks, config) or runtime.joined_cluster)

    # 1. Every document by itself: normal form, length, language, quality, overlap with evaluation prompts.
    blocks = _with_pieces(blocks, directory, config, work)
    given = {"directory": directory, "config": config, "blocks": blocks, "evaluation_texts": texts}
    reports = [BlockReport.from_json(row["report"]) for row in work.map(_FilterWorker, given, len(blocks))]
    block_sources = [block.source for block in blocks]
    counts = row_counts(block_sources, reports, config)

    # 2. All documents together: duplicates, the held-out share (by content hash: a document stays on its side
    #    when others come or go), and the mixture of sources.
    corpus = Corpus(directory, [report.num_kept for report in reports], block_sources)
    selection = select(corpus, config, settings.seed)

    # 3. The model's tokenizer, one that was given, or one trained on a sample of the training text.
    if chat is None:
        sample = tokenizer_sample(corpus, selection.train, config.tokenizer_sample_chars)
        chat = tokenizer_for(sample, config, template)
    runtime.check_files()
    out_dir.mkdir(parents=True, exist_ok=True)
    chat.save(out_dir)

    # 4. Token ids of every block, then rows.
    wanted = np.zeros(len(corpus), bool)
    wanted[selection.train] = wanted[selection.heldout] = True
    dtype = token_dtype(chat.vocab_size)
    given = {
        "corpus": corpus,
        "wanted": wanted,
        "tokenizer": file_digest(out_dir / "tokenizer.json"),
        "content_spec": chat.content_spec,
        "dtype": dtype,
    }
    for _ in work.map(_EncodeWorker, given, len(blocks)):
        pass
    shards = write_shards(
        out_dir,
        documents(corpus, selection.train, dtype),
        documents(corpus, selection.heldout, dtype),
        separator_id=chat.separator_id,
        vocab_size=chat.vocab_size,
        context_length=settings.model.context_length,
        shard_tokens=config.shard_tokens,
        packing=config.packing,
    )
    if not shards.rows:
        raise DataError(
            f"prepare.data: {shards.tokens_dropped} training tokens do not fill one row of "
            f"model.context_length {settings.model.context_length}; add documents or shorten the context"
        )

    # 5. Statistics.
    metrics = {
        **metrics_of(reports, counts, selection, corpus, shards, vocab_size=chat.vocab_size),
        "evaluation_texts": len(texts),
        "evaluation_texts_too_short": num_too_short(texts, config.decontaminate_ngram),
    }
    sources = sources_of(block_sources, reports, selection, corpus)
    statistics = {**metrics, "sources": sources, "steps": steps_of(reports, selection)}
    text = json.dumps(statistics, indent=1, ensure_ascii=False)
    (out_dir / "statistics.json").write_text(text + "\n", encoding="utf-8")
    return {name: float(value) for name, value in metrics.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """A part of the input that one worker reads at a time."""

    source: int  # index in prepare.data
    split: FileSplit
    counts: Counts | None = None  # of the rows that a piece stands for; None: it is no piece


def _blocks(config: PrepareConfig) -> list[_Block]:
    """The input in order, sources of weight 0 left out."""
    block_bytes = int(config.block_mb * 1e6)
    return [
        _Block(source=index, split=split)
        for index, source in enumerate(config.data)
        if source.weight > 0
        for split in splits_of(source, block_bytes)
    ]


def _with_pieces(
    blocks: Sequence[_Block], directory: Path, config: PrepareConfig, work: Workers
) -> list[_Block]:
    """The blocks, and in place of each file that cannot be cut its pieces."""
    uncut = [block for block in blocks if block.split.end is None]
    given = {"directory": directory, "config": config, "blocks": uncut, "runtime": work.runtime}
    answers = iter([*work.map(_ReadWorker, given, len(uncut), has_deadline=False)] if uncut else [])
    parts: list[_Block] = []
    for block in blocks:
        parts += [block] if block.split.end is not None else _pieces(block, next(answers))
    return parts


def _pieces(block: _Block, answer: Mapping[str, Any]) -> list[_Block]:
    """The pieces of a file as blocks; its rows are counted with the first."""
    splits = [whole(Path(path)) for path in answer["pieces"]]
    counts = [Counts(**answer["counts"]), *[NO_ROWS] * (len(splits) - 1)]
    return [
        _Block(source=block.source, split=split, counts=own)
        for split, own in zip(splits, counts, strict=True)
    ]


def _digest(settings: PrepareSettings, blocks: Sequence[_Block], texts: Sequence[str]) -> str:
    """Of all that decides the filtered blocks but the bytes they are made from: those are in their records,
    as the tokenizer is in those of encoded blocks.
    """
    parts = [
        repr([(name, metadata.version(name)) for name in DECIDING_PACKAGES]),
        settings.model_dump_json(exclude={"prepare": {"tokenizer", "ray_data_mb"}}),
        repr(blocks),
        repr(texts),
    ]
    return blake3("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def _is_large(blocks: Sequence[_Block], config: PrepareConfig) -> bool:
    """By the bytes of its files; of a hub dataset none are known."""
    return sum(block.split.num_bytes for block in blocks) > config.ray_data_mb * 1e6


def evaluation_texts(sources: Sequence[DataSource]) -> list[str]:
    """What must not stand in the training text: evaluation prompts, and the texts in their other columns."""
    texts: list[str] = []
    for source in sources:
        if source.weight == 0:
            continue
        for prompt in read_source(source, "prompts").records:
            assert isinstance(prompt, Prompt)
            texts += texts_of(prompt)
    return texts


class _ReadWorker:
    """Reads files that cannot be cut, by their number, into pieces."""

    def __init__(
        self, directory: Path, config: PrepareConfig, blocks: Sequence[_Block], runtime: Runtime
    ) -> None:
        self._directory, self._config, self._blocks = directory, config, blocks
        self._between = partial(unless_stopped, runtime)

    def __call__(self, row: Mapping[str, int]) -> dict[str, Any]:
        block = self._blocks[row["number"]]
        pieces = read_pieces(
            self._directory,
            row["number"],
            block.split,
            self._config.data[block.source],
            int(self._config.block_mb * 1e6),
            self._between,
        )
        paths = [str(self._directory / name) for name in pieces.names]
        return {"pieces": paths, "counts": asdict(pieces.counts)}


class _FilterWorker:
    """Filters blocks by their number; one in every process that takes part."""

    def __init__(
        self,
        directory: Path,
        config: PrepareConfig,
        blocks: Sequence[_Block],
        evaluation_texts: Sequence[str],
    ) -> None:
        self._directory, self._config, self._blocks = directory, config, blocks
        self._keeps = Filter(config, evaluation_texts)

    def __call__(self, row: Mapping[str, int]) -> dict[str, Any]:
        number = row["number"]
        block = self._blocks[number]
        source = self._config.data[block.source] if block.counts is None else piece_source(block.split.path)
        report = filter_block(self._directory, number, block.split, source, self._config, self._keeps)
        counts = report.counts if block.counts is None else block.counts
        return {"report": replace(report, counts=counts).to_json()}


class _EncodeWorker:
    """Tokenises blocks by their number."""

    def __init__(
        self, corpus: Corpus, wanted: np.ndarray, tokenizer: str, content_spec: str, dtype: np.dtype
    ) -> None:
        """`tokenizer`: its digest; `content_spec`: of its encoder, all that a worker needs in memory."""
        self._corpus, self._wanted, self._tokenizer, self._dtype = corpus, wanted, tokenizer, dtype
        self._encode = partial(documents_ids, content_encoder(content_spec), dtype=dtype)

    def __call__(self, row: Mapping[str, int]) -> dict[str, Any]:
        number, starts = row["number"], self._corpus.starts
        wanted = self._wanted[starts[number] : starts[number + 1]]
        encode_block(self._corpus, number, wanted, self._encode, self._dtype, tokenizer=self._tokenizer)
        return {}
