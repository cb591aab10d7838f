"""Fitting: a record -> the token ids a stage trains on, or the rule by which it is cut or left out.

    Conversation | Pair | Prompt --chat template--> ids --context_length--> Fitted

One policy per stage, for the recipes and for `rlhf check` alike: sft cuts the end of what is too long; reward
leaves such pairs out (or cuts the prompt's start, `reward.too_long: truncate`); ppo and evaluate leave out
prompts without room for a response. A source of which nothing is left is an error. Owns: that policy. Does
not own: rendering (chat), reading (readers).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, Literal, TypeVar

from stages.config import DataSource
from stages.data.chat import ChatTokenizer, PairIds, Rendered, truncate, truncate_pair
from stages.data.files import shown
from stages.data.readers import Rows, most_frequent
from stages.data.records import Conversation, Pair, Prompt
from stages.errors import DataError

E = TypeVar("E")
NO_ROOM = "no room left for a response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted(Generic[E]):
    """What became of one record."""

    example: E | None  # None: left out
    num_tokens: int  # before anything was cut; of a pair: prompt and longer response
    rule: str | None  # what was done to it; None: nothing


def check_rendering(chat: ChatTokenizer, conversation: Conversation) -> None:
    """Raise DataError when the chat template does not render this one, sft's first, as something to train."""
    if problems := chat.lint(chat.render(conversation.messages)):
        raise DataError(f"sft: the chat template does not render trainable turns: {'; '.join(problems)}")


def fit_conversation(
    chat: ChatTokenizer, conversation: Conversation, context_length: int
) -> Fitted[Rendered]:
    """Keep the first context_length tokens."""
    whole = chat.render(conversation.messages)
    cut = truncate(whole, context_length)
    rule = None
    if cut is None:
        rule = "no trained token within model.context_length"
    elif len(whole.ids) > context_length:
        rule = "cut to model.context_length"
    return Fitted(example=cut, num_tokens=len(whole.ids), rule=rule)


def fit_pair(
    chat: ChatTokenizer, pair: Pair, context_length: int, too_long: Literal["drop", "truncate"]
) -> Fitted[PairIds]:
    """Leave out what is too long, or cut the prompt's start, the same for both responses."""
    whole = chat.render_pair(pair.prompt, pair.chosen, pair.rejected)
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


def fit_prompt(
    chat: ChatTokenizer, prompt: Prompt, max_prompt_tokens: int, base_prompt: str | None = None
) -> Fitted[tuple[int, ...]]:
    """Leave out what leaves no room for a response (`ModelConfig.max_prompt_tokens`): as a chat, and for a
    base model too where `base_prompt` says how that is asked.
    """
    if base_prompt is not None:
        as_text = continuation_ids(chat, prompt, base_prompt)
        if len(as_text) > max_prompt_tokens:
            return Fitted(example=None, num_tokens=len(as_text), rule=NO_ROOM)
    ids = chat.prompt_ids(prompt.messages)
    if len(ids) <= max_prompt_tokens:
        return Fitted(example=ids, num_tokens=len(ids), rule=None)
    return Fitted(example=None, num_tokens=len(ids), rule=NO_ROOM)


def data_metrics(rows: Rows[Any], fitted: Sequence[Fitted[E]], name: str) -> dict[str, float]:
    """What became of a stage's rows, for its metrics; `name`: what one record is called, in the plural.

    `<name>_dropped` are the rows skipped and the records left out together; `<name>_cut` are still there.
    """
    left_out = sum(one.example is None for one in fitted)
    cut = sum(one.example is not None and one.rule is not None for one in fitted)
    return {
        f"{name}_dropped": float(rows.num_skipped + left_out),
        f"{name}_cut": float(cut),
        "rows_skipped": float(rows.num_skipped),
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
            raise DataError(
                f"{shown(source.path)}: no rows left of {size} ({rules}; the shortest has "
                f"{min(one.num_tokens for one in own)} tokens); raise model.context_length, or set weight: 0"
            )


def rules_applied(fitted: Iterable[Fitted[E]]) -> Counter[str]:
    """How many records each rule cut or left out."""
    return Counter(one.rule for one in fitted if one.rule is not None)
