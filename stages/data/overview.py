"""Overview of one dataset, as its stage will see it: for a look before a run, without running anything.

    DataSource --readers--> records --fitting | filter--> lengths, rules that cut or drop, an example's mask

Reads the first SAMPLE_CHARS characters, for all of it was read before (validation). Owns: these figures. Does
not own: how they are shown (pipeline.preview), or any rule.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from stages.config import DataFormat, DataSource, PrepareConfig
from stages.data.chat import ChatTokenizer, Rendered
from stages.data.corpus import STEPS, Dropped, Filter, check_passed
from stages.data.fitting import (
    Fitted,
    check_left,
    check_rendering,
    fit_conversation,
    fit_pair,
    fit_prompt,
    rules_applied,
)
from stages.data.readers import read_whole
from stages.data.records import Conversation, Document, Pair, Prompt
from stages.data.schemas import Record, StageName
from stages.data.validation import Validated

SAMPLE_CHARS = 10_000_000
"""Of the records whose lengths and rules are counted."""
EXAMPLE_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a stage allows a record to be."""

    context_length: int  # tokens
    max_prompt_tokens: (
        int  # that leave room for a scored response; all of the context where none is asked for
    )
    base_prompt: str | None  # of evaluate: how a base model is asked, which has to fit too
    pairs_too_long: Literal["drop", "truncate"]
    group_column: str | None  # of reward
    prepare: PrepareConfig | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of the example, decoded: all of it trained, or none."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One dataset in figures."""

    format: DataFormat
    columns: dict[str, str]  # field -> the column it is read from
    num_rows: int
    num_records: int
    num_skipped: int  # malformed, under on_bad_row: skip
    num_filtered: int  # rows without a record
    unread_keys: Mapping[str, int]  # key of a message that nobody reads -> how often it is there
    num_shared_prompts: int  # pairs whose prompt is what both texts begin with
    shared_prompt: str  # the first of these
    num_sampled: int  # records that the figures below are of
    unit: Literal["tokens", "characters"]  # characters where no tokenizer is known yet
    median: int
    p95: int
    max: int
    rules: Counter[str]  # rule -> records it cuts or leaves out
    example: tuple[Span, ...]  # the first one; nothing is trained in it where no tokenizer is known


def overview(
    source: DataSource, stage: StageName, found: Validated, chat: ChatTokenizer | None, limits: Limits
) -> Overview:
    """Read the start of `source` as `stage` would; `found`: what is in all of it. Raises DataError where the
    start is all, and nothing of it is left, and where the template does not render its first row; ModelError.
    """
    reader = read_whole(source, stage, limits.group_column if stage == "reward" else None)
    sample = _sample(reader)
    assert reader.schema is not None, "a source with a record has a schema"
    if chat is None:
        lengths, rules = [_chars(record) for record in sample], Counter[str]()
        example = [Span(text=_shortened("\n".join(_turns(sample[0]))), trained=False)]
    else:
        is_all = len(sample) == found.num_records
        lengths, rules = _figures(sample, chat, limits, left_of=source if is_all else None)
        example = list(_example(sample[0], chat, limits))
    median, p95 = np.percentile(lengths, [50, 95])
    return Overview(
        format=reader.schema.format,
        columns=reader.columns_seen,
        num_rows=found.counts.num_rows,
        num_records=found.num_records,
        num_skipped=found.counts.num_skipped,
        num_filtered=found.counts.num_filtered,
        unread_keys=found.counts.unread_keys,
        num_shared_prompts=found.counts.num_shared_prompts,
        shared_prompt=_shortened(found.counts.shared_prompt),
        num_sampled=len(sample),
        unit="characters" if chat is None else "tokens",
        median=int(median),
        p95=int(p95),
        max=max(lengths),
        rules=rules,
        example=tuple(example),
    )


def first_texts(source: DataSource, config: PrepareConfig) -> list[str]:
    """The first SAMPLE_CHARS characters of a source of documents, as prepare's first step leaves them."""
    by_length = Filter(config.model_copy(update={"languages": [], "quality": []}), ())
    dropped = {step: Dropped() for step in STEPS}
    kept = (
        Document(text=text)
        for document in read_whole(source, "prepare")
        for text in by_length([document.text], dropped)
    )
    return [document.text for document in _sample(kept)]


def _sample(records: Iterator[Record]) -> list[Any]:
    """The first records, SAMPLE_CHARS together."""
    sample: list[Record] = []
    chars = 0
    for record in records:
        sample.append(record)
        chars += _chars(record)
        if chars >= SAMPLE_CHARS:
            break
    return sample


def _chars(record: Record) -> int:
    match record:
        case Document(text=text):
            return len(text)
        case Pair(prompt=prompt, chosen=chosen, rejected=rejected):
            return sum(len(message.content) for message in (*prompt, *chosen, *rejected))
    return sum(len(message.content) for message in record.messages)


def _turns(record: Record) -> Iterator[str]:
    """The record in words, where no tokenizer can render it."""
    match record:
        case Document(text=text):
            yield text
        case Pair(prompt=prompt, chosen=chosen, rejected=rejected):
            for title, messages in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
                yield f"{title}: " + " / ".join(f"{message.role}: {message.content}" for message in messages)
        case Conversation(messages=messages) | Prompt(messages=messages):
            yield from (f"{message.role}: {message.content}" for message in messages)


def _figures(
    sample: list[Any], chat: ChatTokenizer, limits: Limits, *, left_of: DataSource | None
) -> tuple[list[int], Counter[str]]:
    """Lengths in tokens, and how many records each rule cuts or leaves out; something must be `left_of` a
    source that is looked at whole.
    """
    if isinstance(sample[0], Document):
        texts = [document.text for document in sample]
        lengths = [len(ids) for ids in chat.documents_ids(texts, np.dtype(np.uint32))]
        return lengths, _dropped(texts, limits, left_of)
    fitted = [_fitted(record, chat, limits) for record in sample]
    if left_of is not None:
        check_left([(left_of, len(fitted))], fitted)
    return [one.num_tokens for one in fitted], rules_applied(fitted)


def _dropped(texts: list[str], limits: Limits, left_of: DataSource | None) -> Counter[str]:
    """What the steps that look at one document at a time would leave out."""
    assert limits.prepare is not None, "documents are read by prepare alone"
    dropped = {step: Dropped() for step in STEPS}
    kept = Filter(limits.prepare, ())(texts, dropped)
    if left_of is not None:
        check_passed(left_of, len(kept), dropped)
    return Counter(
        {f"{step}: {rule}": count for step, one in dropped.items() for rule, count in one.counts.items()}
    )


def _fitted(record: Record, chat: ChatTokenizer, limits: Limits) -> Fitted[Any]:
    match record:
        case Conversation():
            return fit_conversation(chat, record, limits.context_length)
        case Pair():
            return fit_pair(chat, record, limits.context_length, limits.pairs_too_long)
        case Prompt():
            return fit_prompt(chat, record, limits.max_prompt_tokens, limits.base_prompt)
    raise AssertionError("documents are not fitted")


def _example(record: Record, chat: ChatTokenizer, limits: Limits) -> Iterator[Span]:
    """The record decoded from its ids, special tokens visible, by what is trained of it."""
    match record:
        case Document(text=text):
            yield Span(text=_shortened(text), trained=True)
        case Conversation(messages=messages):
            check_rendering(chat, record)
            yield from _spans(chat.render(messages), chat)
        case Pair(prompt=prompt, chosen=chosen, rejected=rejected):
            yield Span(text="chosen: ", trained=False)
            yield from _spans(chat.render((*prompt, *chosen)), chat)
            yield Span(text="\nrejected: ", trained=False)
            yield from _spans(chat.render((*prompt, *rejected)), chat)
        case Prompt(messages=messages):
            yield Span(text=_shortened(_decoded(chat.prompt_ids(messages), chat)), trained=False)


def _spans(rendered: Rendered, chat: ChatTokenizer) -> Iterator[Span]:
    """What each run of ids adds to the text before it: alone, some tokenizers drop its first space."""
    end = 0
    for trained, run in groupby(rendered.mask):
        before = _decoded(rendered.ids[:end], chat)
        end += len(list(run))
        text = _decoded(rendered.ids[:end], chat).removeprefix(before)
        yield Span(text=_shortened(text), trained=trained)


def _decoded(ids: Sequence[int], chat: ChatTokenizer) -> str:
    return str(
        chat.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _shortened(text: str) -> str:
    return text if len(text) <= EXAMPLE_CHARS else f"{text[:EXAMPLE_CHARS]}\u2026"
