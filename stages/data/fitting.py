"""Fitting: a record -> the token ids a stage trains on, or the rule by which it is cut or left out.

    Conversation | Pair | Prompt --chat template--> ids --context_length--> Fitted, or Refused: a bad row

One policy per stage, for the recipes and for `rlhf check` alike: sft cuts the end of what is too long; reward
leaves such pairs out (or cuts the prompt's start, `reward.too_long: truncate`); ppo and evaluate leave out
prompts without room for a response. A source of which nothing is left is an error. Owns: that policy. Does
not own: rendering (chat), reading (readers).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Generic, Literal, TypeVar

from stages.config.data import DataSource
from stages.data.chat.ids import PairIds, Rendered, truncate, truncate_pair
from stages.data.chat.messages import Talk
from stages.data.chat.templates import Refused
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.reading.files import shown
from stages.data.reading.readers import Counts, Rows, check_counts, most_frequent
from stages.data.reading.records import Conversation, Pair, Prompt
from stages.errors import DataError

E = TypeVar("E")
R = TypeVar("R", Conversation, Pair, Prompt)
REFUSED = "the chat template refuses it"
NO_ROOM = "no room left for a response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted(Generic[E]):
    """What became of one record."""

    example: E | None  # None: left out
    num_tokens: int  # before anything was cut; of a pair: prompt and longer response
    rule: str | None  # what was done to it; None: nothing


class Refusals:
    """The rows of a source that the chat template does not take: as bad as malformed ones."""

    def __init__(self, source: DataSource) -> None:
        self._source = source
        self._places: set[str] = set()
        self._first = ""

    @property
    def number(self) -> int:
        """Of rows, however often each is taken."""
        return len(self._places)

    def add(self, record: Conversation | Pair | Prompt, refused: Refused) -> None:
        """Raises DataError unless such rows are skipped."""
        problem = f"{record.place or shown(self._source.path)}: {refused.words}"
        if self._source.on_bad_row == "error":
            raise DataError(problem)
        self._places.add(record.place or str(id(record)))
        self._first = self._first or problem

    def check(self, counts: Counts, num_kept: int) -> None:
        """Raise DataError where these and the malformed rows are more than the cap allows, or all there are.
        `counts`: of reading the source.
        """
        skipped = counts.num_skipped + self.number
        first = counts.first_problem or self._first
        check_counts(self._source, replace(counts, num_skipped=skipped, first_problem=first), num_kept)


def fit_rows(rows: Rows[R], fit: Callable[[Sequence[R]], Iterator[Fitted[E] | Refused]]) -> list[Fitted[E]]:
    """What `fit` makes of every record, in order. Raises DataError for rows that the template refuses, as
    `on_bad_row` and `max_skipped_frac` of their source say.
    """
    found: list[Fitted[E]] = []
    for (source, size), counts in zip(rows.sizes, rows.counts, strict=True):
        records = rows.records[len(found) : len(found) + size]
        refusals = Refusals(source)
        for record, one in zip(records, fit(records), strict=True):
            if isinstance(one, Refused):
                refusals.add(record, one)
                one = Fitted(example=None, num_tokens=0, rule=REFUSED)
            found.append(one)
        if refusals.number:
            refusals.check(counts, size)
    return found


def check_rendering(chat: ChatTokenizer, fitted: Sequence[Fitted[tuple[Rendered, ...]]]) -> None:
    """Raise DataError when the chat template does not render the first conversation with something to
    train on as it should.
    """
    first = next((one.example for one in fitted if one.example is not None and one.rule is None), None)
    if first is not None and (problems := chat.lint(first[-1])):
        raise DataError(f"sft: the chat template does not render trainable turns: {'; '.join(problems)}")


def fit_conversations(
    chat: ChatTokenizer, conversations: Sequence[Conversation], context_length: int
) -> Iterator[Fitted[tuple[Rendered, ...]] | Refused]:
    """Keep the first context_length tokens of each example: see `ChatTokenizer.examples`."""
    talks = [Talk(messages=one.messages, tools=one.tools) for one in conversations]
    for examples in chat.examples(talks):
        yield examples if isinstance(examples, Refused) else _cut(examples, context_length)


def _cut(examples: tuple[Rendered, ...], context_length: int) -> Fitted[tuple[Rendered, ...]]:
    if not examples:
        return Fitted(example=None, num_tokens=0, rule="no turn is marked to be trained")
    num_tokens = max(len(example.ids) for example in examples)
    if num_tokens <= context_length:
        return Fitted(example=examples, num_tokens=num_tokens, rule=None)
    cut = (truncate(example, context_length) for example in examples)
    kept = tuple(example for example in cut if example is not None)
    if not kept:
        return Fitted(
            example=None, num_tokens=num_tokens, rule="no trained token within model.context_length"
        )
    return Fitted(example=kept, num_tokens=num_tokens, rule="cut to model.context_length")


def fit_pairs(
    chat: ChatTokenizer, pairs: Sequence[Pair], context_length: int, too_long: Literal["drop", "truncate"]
) -> Iterator[Fitted[PairIds] | Refused]:
    """Leave out what is too long, or cut the prompt's start, the same for both responses."""
    talks = [(Talk(messages=pair.prompt, tools=pair.tools), pair.chosen, pair.rejected) for pair in pairs]
    for whole in chat.pairs(talks):
        yield whole if isinstance(whole, Refused) else _fit_pair(whole, context_length, too_long)


def _fit_pair(whole: PairIds, context_length: int, too_long: Literal["drop", "truncate"]) -> Fitted[PairIds]:
    num_tokens = len(whole.prompt) + max(len(whole.chosen), len(whole.rejected))
    if num_tokens <= context_length and whole.chosen != whole.rejected:
        return Fitted(example=whole, num_tokens=num_tokens, rule=None)
    if too_long == "drop" and num_tokens > context_length:
        return Fitted(example=None, num_tokens=num_tokens, rule="longer than model.context_length")
    cut = truncate_pair(whole.prompt, whole.chosen, whole.rejected, context_length)
    rule = "no difference left within model.context_length" if cut is None else "prompt's start cut"
    return Fitted(example=cut, num_tokens=num_tokens, rule=rule)


def continuation_ids(chat: ChatTokenizer, prompt: Prompt, base_prompt: str) -> tuple[int, ...]:
    """How a base model is asked: what the user says last, as a plain text to go on with."""
    return chat.continuation_ids(base_prompt.replace("{prompt}", prompt.messages[-1].content))


def fit_prompts(
    chat: ChatTokenizer, prompts: Sequence[Prompt], max_prompt_tokens: int, base_prompt: str | None = None
) -> Iterator[Fitted[tuple[int, ...]] | Refused]:
    """Leave out what leaves no room for a response (`ModelConfig.max_prompt_tokens`): as a chat, and for a
    base model too where `base_prompt` says how that is asked.
    """
    talks = [Talk(messages=prompt.messages, tools=prompt.tools) for prompt in prompts]
    for prompt, ids in zip(prompts, chat.prompts(talks), strict=True):
        if isinstance(ids, Refused):
            yield ids
            continue
        as_text = () if base_prompt is None else continuation_ids(chat, prompt, base_prompt)
        longest = len(as_text) if len(as_text) > max_prompt_tokens else len(ids)
        if longest > max_prompt_tokens:
            yield Fitted(example=None, num_tokens=longest, rule=NO_ROOM)
        else:
            yield Fitted(example=ids, num_tokens=longest, rule=None)


def data_metrics(rows: Rows[Any], fitted: Sequence[Fitted[E]], name: str) -> dict[str, float]:
    """What became of a stage's rows, for its metrics; `name`: what one record is called, in the plural.

    `<name>_dropped` are the rows skipped and the records left out together; `<name>_cut` are still there.
    Records of rows that the template refuses are rows skipped.
    """
    left_out = sum(one.example is None for one in fitted)
    refused = sum(one.rule == REFUSED for one in fitted)
    cut = sum(one.example is not None and one.rule is not None for one in fitted)
    return {
        f"{name}_dropped": float(rows.num_skipped + left_out),
        f"{name}_cut": float(cut),
        "rows_skipped": float(rows.num_skipped + refused),
        "rows_filtered": float(rows.num_filtered),
        **unread_metrics(rows),
    }


def unread_metrics(rows: Rows[Any]) -> dict[str, float]:
    """How often each key of a message was there that nobody reads, the most frequent ones; nothing where all
    are read.
    """
    return {f"unread_message_key/{key}": float(num) for key, num in most_frequent(rows.unread_keys)}


def check_left(sizes: Sequence[tuple[DataSource, int]], fitted: Sequence[Fitted[Any]]) -> None:
    """Raise DataError where all records of a source are left out. `sizes`: how many of `fitted` are whose, in
    order.
    """
    ends = accumulate(size for _, size in sizes)
    for (source, size), end in zip(sizes, ends, strict=True):
        own = fitted[end - size : end]
        if all(one.example is None for one in own):
            rules = ", ".join(f"{rule}: {count}" for rule, count in sorted(rules_applied(own).items()))
            shortest = min((one.num_tokens for one in own if one.num_tokens), default=0)
            raise DataError(
                f"{shown(source.path)}: no rows left of {size} ({rules}; the shortest has "
                f"{shortest} tokens); raise model.context_length, or set weight: 0"
            )


def rules_applied(fitted: Iterable[Fitted[E]]) -> Counter[str]:
    """How many records each rule cut or left out."""
    return Counter(one.rule for one in fitted if one.rule is not None)
