"""prepare: documents in; tokenizer, packed token shards and statistics out.

    read -> normalise -> exact dedup -> length filter -> split by hash -> tokenizer -> pack -> shards

Everything is a function of the documents' contents and the settings: the same input gives the same bytes.
Owns the order of these steps and the statistics; does not own the formats (readers) or the layout of the
shards (shards).
"""

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.config import PrepareConfig, PrepareSettings
from stages.data.batches import content_share, stage_seed
from stages.data.chat import CHATML, END_OF_TEXT, PAD, SPECIAL_TOKENS, ChatTokenizer, read_template
from stages.data.readers import read_source, weighted
from stages.data.shards import write_shards
from stages.errors import DataError
from stages.runtime import Runtime

RECIPE_VERSION = 2

NUM_EXAMPLES = 5
"""Dropped documents shown per rule."""
EXAMPLE_CHARS = 200
ENCODE_BATCH = 1024
"""Documents tokenised at once."""


def run(
    settings: PrepareSettings, inputs: Mapping[str, Path], out_dir: Path, runtime: Runtime
) -> Mapping[str, float]:
    """Write tokenizer, shards, index.json and statistics.json to out_dir; return the counts.

    `inputs` may hold `model`: its tokenizer is taken instead of training one. Raises DataError, ModelError.
    """
    config = settings.prepare

    # 1. Read, normalise, drop repetitions and wrong lengths. Weights act later: their repetitions are wanted.
    corpus = _read(config)

    # 2. Hold out by content hash: a document stays on its side when others come or go.
    train_by_source, heldout = _split(corpus.kept, config.heldout_frac)
    train = [
        text
        for index, (source, texts) in enumerate(zip(config.data, train_by_source, strict=True))
        for text in weighted(texts, source.weight, stage_seed(settings.seed, "prepare", "weight", index))
    ]
    if not train:
        raise DataError("prepare.data: no document is left to train on; lower min_chars or add documents")

    # 3. The model's tokenizer, or one trained on the training text.
    template = settings.model.chat_template
    if "model" in inputs:
        chat = ChatTokenizer.load(inputs["model"], template)
    else:
        source = CHATML if template is None else read_template(template)
        chat = ChatTokenizer(train_tokenizer(train, config.vocab_size), template=source)
    out_dir.mkdir(parents=True, exist_ok=True)
    chat.save(out_dir)

    # 4. Token ids, packed to rows.
    counts = write_shards(
        out_dir,
        _encoded(chat, train),
        _encoded(chat, heldout),
        packing=config.packing,
        separator_id=chat.separator_id,
        vocab_size=chat.vocab_size,
        context_length=settings.model.context_length,
        shard_tokens=config.shard_tokens,
    )
    if not counts.rows:
        raise DataError(
            f"prepare.data: {counts.tokens_dropped} training tokens do not fill one row of "
            f"model.context_length {settings.model.context_length}; add documents or shorten the context"
        )

    # 5. Statistics.
    num_chars = sum(len(text) for text in train)
    metrics = {
        "documents": corpus.num_read,
        "documents_kept": sum(len(texts) for texts in corpus.kept),
        "documents_heldout": len(heldout),
        **{f"dropped_{rule}": dropped.count for rule, dropped in corpus.dropped.items()},
        "rows_skipped": corpus.num_skipped,
        "chars_train": num_chars,
        "tokens_train": counts.tokens_train,
        "tokens_dropped": counts.tokens_dropped,
        "tokens_repeated": counts.tokens_repeated,
        "tokens_heldout": counts.tokens_heldout,
        "chars_per_token": num_chars / max(1, counts.tokens_text),
        "rows": counts.rows,
        "packing_utilisation": counts.utilisation,
        "vocab_size": chat.vocab_size,
    }
    examples = {rule: dropped.examples for rule, dropped in corpus.dropped.items()}
    statistics = json.dumps({**metrics, "dropped_examples": examples}, indent=1, ensure_ascii=False)
    (out_dir / "statistics.json").write_text(statistics + "\n", encoding="utf-8")
    return {name: float(value) for name, value in metrics.items()}


@dataclass(slots=True, kw_only=True)
class _Dropped:
    """What one rule left out."""

    count: int = 0
    examples: list[str] = field(default_factory=list)  # the first few, shortened

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(text[:EXAMPLE_CHARS])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Corpus:
    """The documents that passed every rule, per source, and what did not."""

    kept: list[list[str]]
    dropped: dict[str, _Dropped]  # rule -> what it left out
    num_read: int
    num_skipped: int  # malformed rows


def _read(config: PrepareConfig) -> _Corpus:
    dropped = {rule: _Dropped() for rule in ("too_short", "too_long", "duplicate")}
    kept: list[list[str]] = []
    seen: set[bytes] = set()
    num_read = num_skipped = 0
    for source in config.data:
        kept.append([])
        if source.weight == 0:
            continue
        rows = read_source(source, "prepare")
        num_read += len(rows.records)
        num_skipped += rows.num_skipped
        for document in rows.records:
            text = normalise(document.text, config.unicode_form)
            rule = _broken_rule(text, seen, config)
            if rule is None:
                kept[-1].append(text)
            else:
                dropped[rule].add(text)
    return _Corpus(kept=kept, dropped=dropped, num_read=num_read, num_skipped=num_skipped)


def normalise(text: str, unicode_form: str | None) -> str:
    """Line ends to `\\n`, the Unicode normal form, no white space around the document."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return text if unicode_form is None else unicodedata.normalize(unicode_form, text)  # type: ignore[arg-type]


def _broken_rule(text: str, seen: set[bytes], config: PrepareConfig) -> str | None:
    if len(text) < config.min_chars:
        return "too_short"
    if len(text) > config.max_chars:
        return "too_long"
    digest = _hash(text)
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    return None


def _hash(text: str) -> bytes:
    return blake3(text.encode()).digest(16)


def _split(kept: Sequence[Sequence[str]], heldout_frac: float) -> tuple[list[list[str]], list[str]]:
    """Training documents per source, and the held-out ones: hash below heldout_frac, or the lowest."""

    lowest = min((content_share(text) for texts in kept for text in texts), default=0.0)
    first = max(heldout_frac, math.nextafter(lowest, 1))
    train = [[text for text in texts if content_share(text) >= first] for texts in kept]
    return train, [text for texts in kept for text in texts if content_share(text) < first]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text comes back as it was; digits stand alone; the special tokens have ids 0, 1, 2,
    3.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _encoded(chat: ChatTokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), ENCODE_BATCH):
        yield from chat.documents_ids(texts[start : start + ENCODE_BATCH])
