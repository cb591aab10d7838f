"""Overview of one dataset, as its stage will see it: for a look before a run, without running anything.

    DataSource --readers--> records --fitting | filter--> lengths, rules that cut or drop, an example's mask
                                    --chat template--> rows that it does not take

Counts tokens of the first SAMPLE_CHARS characters, because all of it was read before (validation). Owns:
these figures. Does not own: how they are shown (pipeline.preview), or any rule.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, Literal

import numpy as np

from stages.config.data import DataFormat, DataSource
from stages.config.prepare import PrepareConfig
from stages.data.chat.ids import Rendered
from stages.data.chat.messages import Talk
from stages.data.chat.templates import Refused
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.corpus.filtering import STEPS, Dropped, Filter, check_passed
from stages.data.fitting import (
    Fitted,
    Refusals,
    check_left,
    check_rendering,
    fit_conversations,
    fit_pairs,
    fit_prompts,
    rules_applied,
)
from stages.data.reading.readers import read_whole
from stages.data.reading.records import Conversation, Document, Pair, Prompt
from stages.data.reading.schemas import Kind, Record
from stages.data.validation import Validated

SAMPLE_CHARS = 10_000_000
"""Of the records whose lengths and rules are counted."""
RENDERED_CHARS = 100_000_000
"""Of the records behind these that the chat template is tried on."""
RENDERED_AT_ONCE = 512
EXAMPLE_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a stage allows a record to be."""

    context_length: int  # tokens
    max_prompt_tokens: int  # that leave room for a scored response; all of the context if none is asked for
    base_prompt: str | None  # of evaluate: how a base model is asked, which has to fit too
    pairs_too_long: Literal["drop", "truncate"]
    group_column: str | None  # of reward
    normaliser_prompt_tokens: int | None  # of reward, as max_prompt_tokens: for the normaliser's responses
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
    num_rendered: int  # records that the chat template was tried on
    num_refused: int  # rows among them that it does not take, under on_bad_row: skip
    unread_keys: Mapping[str, int]  # key of a message that nobody reads -> how often it is there
    num_shared_prompts: int  # pairs whose prompt is what both texts begin with
    shared_prompt: str  # the first of these
    num_sampled: int  # records that the figures below are of
    unit: Literal["tokens", "characters"]  # characters where no tokenizer is known yet
    median: int
    p95: int
    max: int
    rules: Counter[str]  # rule -> records it cuts or leaves out
    num_examples: int  # to train on, of the sampled conversations; 0: of others
    normaliser_prompts: tuple[int, int] | None  # of the sampled pairs' prompts: (that leave room, all)
    example: tuple[Span, ...]  # the first one; nothing is trained in it where no tokenizer is known


def overview(
    source: DataSource, kind: Kind, found: Validated, chat: ChatTokenizer | None, limits: Limits
) -> Overview:
    """Read the start of `source` as records of that kind; `found`: what is in all of it.

    Raises DataError where the start is all and nothing of it is left, and where the template does not render
    its first row; ModelError.
    """
    reader = read_whole(source, kind, limits.group_column if kind == "pairs" else None)
    sample = _sample(reader)
    assert reader.schema is not None, "a source with a record has a schema"
    if chat is None:
        seen = _Figures(lengths=[_chars(record) for record in sample])
        example = [Span(text=_shortened("\n".join(_turns(sample[0]))), trained=False)]
    elif isinstance(sample[0], Document):
        is_all = len(sample) == found.num_records
        seen = _documents(sample, chat, limits, left_of=source if is_all else None)
        example = [Span(text=_shortened(sample[0].text), trained=True)]
    else:
        seen = _rendered(source, sample, reader, found, chat, limits)
        example = list(_example(sample[seen.first], chat)) if seen.lengths else []
    median, p95 = np.percentile(seen.lengths or [0], [50, 95])
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
        num_rendered=seen.num_rendered,
        num_refused=seen.num_refused,
        num_sampled=len(seen.lengths),
        unit="characters" if chat is None else "tokens",
        median=int(median),
        p95=int(p95),
        max=max(seen.lengths, default=0),
        rules=seen.rules,
        num_examples=seen.num_examples,
        normaliser_prompts=seen.normaliser_prompts,
        example=tuple(example),
    )


def first_texts(source: DataSource, config: PrepareConfig) -> list[str]:
    """The first SAMPLE_CHARS characters of a source of documents, as prepare's first step leaves them."""
    by_length = Filter(config.model_copy(update={"languages": [], "quality": []}), ())
    dropped = {step: Dropped() for step in STEPS}
    kept = (
        Document(text=text)
        for document in read_whole(source, "documents")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """Of a sample."""

    lengths: list[int]  # of records that are not refused
    rules: Counter[str] = field(default_factory=Counter)
    num_rendered: int = 0
    num_refused: int = 0
    num_examples: int = 0
    normaliser_prompts: tuple[int, int] | None = None
    first: int = 0  # index of the first record that is not refused


def _documents(
    sample: list[Any], chat: ChatTokenizer, limits: Limits, *, left_of: DataSource | None
) -> _Figures:
    """Something must be `left_of` a source that is looked at whole."""
    texts = [document.text for document in sample]
    lengths = [len(ids) for ids in chat.documents_ids(texts, np.dtype(np.uint32))]
    return _Figures(lengths=lengths, rules=_dropped(texts, limits, left_of))


def _rendered(
    source: DataSource,
    sample: list[Any],
    others: Iterator[Any],
    found: Validated,
    chat: ChatTokenizer,
    limits: Limits,
) -> _Figures:
    """The sample in tokens; of the `others` only whether the template takes them. Raises DataError where it
    takes fewer than it must, or nothing is left.
    """
    refusals = Refusals(source)
    fitted: list[Fitted[Any]] = []
    good: list[int] = []
    for index, (record, one) in enumerate(zip(sample, _fitted(sample, chat, limits), strict=True)):
        if isinstance(one, Refused):
            refusals.add(record, one)
        else:
            fitted.append(one)
            good.append(index)
    num_others = 0
    chars = 0
    while batch := list(islice(others, RENDERED_AT_ONCE if chars < RENDERED_CHARS else 0)):
        num_others += len(batch)
        chars += sum(map(_chars, batch))
        for record, refused in zip(batch, _refusals(batch, chat), strict=True):
            if refused is not None:
                refusals.add(record, refused)
    refusals.check(found.counts, len(sample) + num_others - refusals.number)
    if isinstance(sample[0], Conversation):
        check_rendering(chat, fitted)
    if not num_others and len(sample) == found.num_records:
        check_left([(source, len(fitted))], fitted)
    return _Figures(
        lengths=[one.num_tokens for one in fitted],
        rules=rules_applied(fitted),
        num_rendered=len(sample) + num_others,
        num_refused=refusals.number,
        num_examples=sum(len(one.example) for one in fitted if one.example is not None)
        if isinstance(sample[0], Conversation)
        else 0,
        normaliser_prompts=_normaliser_prompts(fitted, limits.normaliser_prompt_tokens),
        first=next((at for at, one in zip(good, fitted, strict=True) if one.example is not None), 0),
    )


def _normaliser_prompts(fitted: list[Fitted[Any]], longest: int | None) -> tuple[int, int] | None:
    """How many of the prompts of pairs leave room for the normaliser's responses, and how many there are."""
    if longest is None:
        return None
    prompts = {one.example.prompt for one in fitted if one.example is not None}
    return sum(len(prompt) <= longest for prompt in prompts), len(prompts)


def _refusals(records: list[Any], chat: ChatTokenizer) -> Iterator[Refused | None]:
    """Why the chat template does not take each record; None: it does."""
    talks = [list(_talks(record)) for record in records]
    found = chat.refusals([talk for several in talks for talk in several])
    for several in talks:
        yield next(filter(None, [next(found) for _ in several]), None)


def _talks(record: Record) -> Iterator[Talk]:
    match record:
        case Pair(prompt=prompt, chosen=chosen, rejected=rejected, tools=tools):
            yield Talk(messages=(*prompt, *chosen), tools=tools)
            yield Talk(messages=(*prompt, *rejected), tools=tools)
        case Conversation(messages=messages, tools=tools) | Prompt(messages=messages, tools=tools):
            yield Talk(messages=messages, tools=tools)


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


def _fitted(records: list[Any], chat: ChatTokenizer, limits: Limits) -> Iterator[Fitted[Any] | Refused]:
    match records[0]:
        case Conversation():
            return fit_conversations(chat, records, limits.context_length)
        case Pair():
            return fit_pairs(chat, records, limits.context_length, limits.pairs_too_long)
        case Prompt():
            return fit_prompts(chat, records, limits.max_prompt_tokens, limits.base_prompt)
    raise AssertionError("documents are not fitted")


def _example(record: Record, chat: ChatTokenizer) -> Iterator[Span]:
    """The record decoded from its ids, special tokens visible, by what is trained of it."""
    match record:
        case Conversation():
            (examples,) = chat.examples(list(_talks(record)))
            for number, example in enumerate(() if isinstance(examples, Refused) else examples):
                if number:
                    yield Span(text="\n", trained=False)
                yield from _spans(example, chat)
        case Pair(prompt=prompt, chosen=chosen, rejected=rejected, tools=tools):
            yield Span(text="chosen: ", trained=False)
            yield from _spans(chat.render((*prompt, *chosen), tools), chat)
            yield Span(text="\nrejected: ", trained=False)
            yield from _spans(chat.render((*prompt, *rejected), tools), chat)
        case Prompt(messages=messages, tools=tools):
            yield Span(text=_shortened(_decoded(chat.prompt_ids(messages, tools), chat)), trained=False)


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
