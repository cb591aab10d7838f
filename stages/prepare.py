"""prepare: documents in; tokenizer, packed token shards and statistics out.

    split -> filter (block by block) -> select (all) -> tokenizer -> encode (block by block) -> pack -> shards
      files that cannot be split -> read into pieces: blocks like the others

Everything is a function of the documents' contents and the settings: the same input gives the same bytes,
whatever the size and number of blocks and whoever works on them - this process, or Ray Data's workers. A
killed run takes up the blocks that were whole. Owns the order of these steps, the workers and the statistics;
does not own the formats (readers), the work on a block (corpus) or the layout of the shards (shards).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from rollout.ground.errors import GO_ON, EnvironmentProblem, raise_expected
from rollout.ground.whole import file_digest
from stages.config.data import DataSource
from stages.config.prepare import PrepareConfig, PrepareSettings
from stages.data.chat.encoders import content_encoder, documents_ids
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus.blocks import (
    BlockReport,
    Corpus,
    Dropped,
    Filter,
    Selection,
    all_dropped,
    check_passed,
    documents,
    encode_block,
    filter_block,
    select,
    tokenizer_sample,
)
from stages.data.corpus.decontamination import num_too_short, texts_of
from stages.data.corpus.languages import check_languages
from stages.data.corpus.pieces import piece_source, read_pieces
from stages.data.corpus.shards import ShardCounts, token_dtype, write_shards
from stages.data.corpus.vocabulary import given_tokenizer, tokenizer_for
from stages.data.reading.files import FileSplit, whole
from stages.data.reading.readers import NO_ROWS, Counts, check_counts, read_source, splits_of
from stages.data.reading.records import Prompt
from stages.errors import DataError, Interrupted
from stages.runtime import Runtime

RECIPE_VERSION = 5

DECIDING_PACKAGES = ("numpy", "py3langid", "pyarrow", "rensa", "rlhf-pipeline", "tokenizers")
"""Blocks of other versions of these are not taken up."""
MAX_WORKER_RESTARTS = 2
"""Of one of Ray Data's workers, and of a block: what kills its worker each time ends the stage."""


def run(
    settings: PrepareSettings, inputs: Mapping[str, Path], out_dir: Path, runtime: Runtime
) -> Mapping[str, float]:
    """Write tokenizer, shards, index.json and statistics.json to out_dir; return the counts.

    `inputs` may hold `model`: its tokenizer is taken instead of training one. Raises DataError, ModelError,
    Interrupted.
    """
    config, template = settings.prepare, settings.model.chat_template
    check_languages(config.languages)
    chat = given_tokenizer(inputs.get("model", config.tokenizer), config, template)  # now: it may be unusable
    blocks = _blocks(config)
    texts = evaluation_texts(settings.evaluation_prompts)
    directory = runtime.work_dir / f"blocks-{_digest(settings, blocks, texts)}"
    directory.mkdir(parents=True, exist_ok=True)
    work = _Workers(runtime=runtime, on_ray_data=_is_large(blocks, config) or runtime.joined_cluster)

    # 1. Every document by itself: normal form, length, language, quality, overlap with evaluation prompts.
    blocks = _with_pieces(blocks, directory, config, work)
    given = {"directory": directory, "config": config, "blocks": blocks, "evaluation_texts": texts}
    reports = [BlockReport.from_json(row["report"]) for row in work.map(_FilterWorker, given, len(blocks))]
    counts = _counts(blocks, reports, config)

    # 2. All documents together: duplicates, the held-out share (by content hash: a document stays on its side
    #    when others come or go), and the mixture of sources.
    corpus = Corpus(directory, [report.num_kept for report in reports], [block.source for block in blocks])
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
        **_metrics(reports, counts, selection, corpus, shards, chat),
        "evaluation_texts": len(texts),
        "evaluation_texts_too_short": num_too_short(texts, config.decontaminate_ngram),
    }
    sources = _sources(blocks, reports, selection, corpus)
    statistics = {**metrics, "sources": sources, "steps": _steps(reports, selection)}
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
    blocks: Sequence[_Block], directory: Path, config: PrepareConfig, work: "_Workers"
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
        for prompt in read_source(source, "evaluate").records:
            assert isinstance(prompt, Prompt)
            texts += texts_of(prompt)
    return texts


class _ReadWorker:
    """Reads files that cannot be cut, by their number, into pieces."""

    def __init__(
        self, directory: Path, config: PrepareConfig, blocks: Sequence[_Block], runtime: Runtime
    ) -> None:
        self._directory, self._config, self._blocks = directory, config, blocks
        self._between = partial(_unless_stopped, runtime)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Workers:
    """Who works on the blocks."""

    runtime: Runtime
    on_ray_data: bool

    def map(
        self, work: Callable[..., Any], given: Mapping[str, Any], num: int, *, has_deadline: bool = True
    ) -> Iterator[dict[str, Any]]:
        """`work(**given)({"number": n})` for n below `num`, in order. Raises DataError, Interrupted.

        `has_deadline`: on Ray Data some answer must come within every `collective_timeout_s`.
        """
        numbers = [{"number": number} for number in range(num)]
        spread = self.on_ray_data or self.runtime.resources.num_workers > 1
        if spread and self.runtime.executor == "ray":
            answers = _on_ray_data(work, given, numbers, self.runtime, has_deadline=has_deadline)
        else:
            answers = map(work(**given), numbers)
        for answer in answers:
            yield answer
            _unless_stopped(self.runtime)


def _unless_stopped(runtime: Runtime) -> None:
    if runtime.stop_requested():
        raise Interrupted(f"prepare: stopped between two blocks, state saved; {GO_ON}")


def _on_ray_data(
    work: Callable[..., Any],
    given: Mapping[str, Any],
    numbers: list[dict[str, int]],
    runtime: Runtime,
    *,
    has_deadline: bool = True,
) -> Iterator[dict[str, Any]]:
    """The same through Ray Data: one process per CPU, or `resources.prepare.num_workers` of them."""
    import ray
    import ray.data

    try:  # Ray Data itself waits for ever
        ray.get(ray.remote(num_cpus=1)(_nothing).remote(), timeout=runtime.placement_timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise EnvironmentProblem(
            f"prepare: no CPU to place a worker within {runtime.placement_timeout_s:g} s; free one, or raise "
            "resources.placement_timeout_s"
        ) from None
    num_cpus, wanted = int(ray.cluster_resources()["CPU"]), runtime.resources.num_workers
    num_workers = num_cpus if wanted == 1 else min(wanted, num_cpus)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = runtime.collective_timeout_s if has_deadline else -1
    rows = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map(
        _AsText,  # type: ignore[arg-type]  # a class: one instance per worker
        fn_constructor_kwargs={"work": work, "given": dict(given)},
        concurrency=min(num_workers, len(numbers)),
        num_cpus=1,
        max_restarts=MAX_WORKER_RESTARTS,
        max_task_retries=MAX_WORKER_RESTARTS,
        runtime_env={"env_vars": {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}},
    )
    try:
        for row in rows.iter_rows():
            if row["problem"]:
                raise (Interrupted if row["is_stop"] else DataError)(row["problem"])
            yield json.loads(row["answer"])
    except ray.data.exceptions.ExecutionTimeoutError as error:
        raise EnvironmentProblem(
            f"prepare: no block was finished within {runtime.collective_timeout_s:g} s; set a smaller "
            f"prepare.block_mb, or raise resources.collective_timeout_s, then {GO_ON}"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise_expected(error)


def _nothing() -> None: ...


class _AsText:
    """A worker whose answers, and what ends it (bad data, a stop), travel as text: Ray Data would make
    columns of the former, and adds lines of its own to the latter.
    """

    def __init__(self, work: Callable[..., Any], given: Mapping[str, Any]) -> None:
        self._work = work(**given)

    def __call__(self, row: Mapping[str, int]) -> dict[str, str | bool]:
        try:
            return {"answer": json.dumps(self._work(row)), "problem": "", "is_stop": False}
        except (DataError, Interrupted) as error:
            return {"answer": "", "problem": str(error), "is_stop": isinstance(error, Interrupted)}


def _counts(blocks: Sequence[_Block], reports: Sequence[BlockReport], config: PrepareConfig) -> Counts:
    """Of all rows. Raises DataError where a source has no document left, or had too many bad rows."""
    total = NO_ROWS
    for index, source in enumerate(config.data):
        own = [report for block, report in zip(blocks, reports, strict=True) if block.source == index]
        counts = sum((report.counts for report in own), NO_ROWS)
        if source.weight > 0:
            check_counts(source, counts, sum(report.num_documents for report in own))
            dropped = all_dropped(report.dropped for report in own)
            check_passed(source, sum(report.num_kept for report in own), dropped)
        total += counts
    return total


def _dropped(reports: Sequence[BlockReport], selection: Selection) -> dict[str, Dropped]:
    """Step -> what it left out, over all blocks and of all documents together."""
    return all_dropped((*(report.dropped for report in reports), selection.dropped))


def _steps(reports: Sequence[BlockReport], selection: Selection) -> list[dict[str, Any]]:
    """Per step: how many documents stayed and were dropped, by which rules, and a few that were dropped."""
    left = sum(report.num_documents for report in reports)
    steps = []
    for step, dropped in _dropped(reports, selection).items():
        left -= dropped.total
        rules = dict(sorted(dropped.counts.items(), key=lambda item: (-item[1], item[0])))
        examples = [{"rule": rule, "text": text} for rule, text in dropped.examples]
        steps.append(
            {"step": step, "kept": left, "dropped": dropped.total, "rules": rules, "examples": examples}
        )
    return steps


def _sources(
    blocks: Sequence[_Block], reports: Sequence[BlockReport], selection: Selection, corpus: Corpus
) -> list[dict[str, int]]:
    """Per source, by its index in prepare.data: the documents read, those that no step dropped, and what the
    training text takes of them, as often as it does.
    """
    sources = []
    for source in sorted({block.source for block in blocks}):
        is_own = corpus.source_of == source
        kept, train = is_own & selection.is_kept, selection.train[is_own[selection.train]]
        numbered = zip(blocks, reports, strict=True)
        sources.append(
            {
                "source": source,
                "documents": sum(one.num_documents for block, one in numbered if block.source == source),
                "documents_kept": int(kept.sum()),
                "chars_kept": int(corpus.chars[kept].sum()),
                "documents_train": len(train),
                "chars_train": int(corpus.chars[train].sum()),
            }
        )
    return sources


def _metrics(
    reports: Sequence[BlockReport],
    counts: Counts,
    selection: Selection,
    corpus: Corpus,
    shards: ShardCounts,
    chat: ChatTokenizer,
) -> dict[str, float]:
    dropped = _dropped(reports, selection)
    lengths = dropped.pop("length").counts
    num_chars = int(corpus.chars[selection.train].sum())
    return {
        "documents": sum(report.num_documents for report in reports),
        "documents_kept": selection.num_kept,
        "documents_heldout": len(selection.heldout),
        **{f"dropped_{rule}": lengths[rule] for rule in ("too_short", "too_long")},
        **{f"dropped_{step}": one.total for step, one in dropped.items()},
        "rows_skipped": counts.num_skipped,
        "rows_filtered": counts.num_filtered,
        "chars_train": num_chars,
        "tokens_train": shards.tokens_train,
        "tokens_dropped": shards.tokens_dropped,
        "tokens_repeated": shards.tokens_repeated,
        "tokens_heldout": shards.tokens_heldout,
        "chars_per_token": num_chars / max(1, shards.tokens_text),
        "packing_utilisation": shards.utilisation,
        "rows": shards.rows,
        "vocab_size": chat.vocab_size,
    }
