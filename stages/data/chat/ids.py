"""What a conversation or a pair becomes, and how it is cut to a number of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """Token ids of a conversation, and which are trained: assistant content and end-of-turn tokens."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]  # True: a token the assistant has to produce


@dataclass(frozen=True, slots=True, kw_only=True)
class PairIds:
    """A preference pair as token ids; both responses follow the same prompt ids."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def trained_runs(rendered: Rendered) -> list[list[int]]:
    """The trained tokens of each assistant turn."""
    pairs = zip(rendered.ids, rendered.mask, strict=True)
    return [
        [token for token, _ in run] for trained, run in groupby(pairs, key=lambda pair: pair[1]) if trained
    ]


def truncate(rendered: Rendered, max_tokens: int) -> Rendered | None:
    """Keep the first max_tokens tokens (sft's policy); None when no trained token is left."""
    if not any(rendered.mask[:max_tokens]):
        return None
    return Rendered(ids=rendered.ids[:max_tokens], mask=rendered.mask[:max_tokens])


def truncate_pair(
    prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int], max_len: int
) -> PairIds | None:
    """Make prompt + either response fit max_len tokens by cutting the prompt's start, the same for both.

    A response longer than max_len loses its own start: its end, where a reward model reads, is always kept.
    None when what is left of the two is the same: the difference was cut away.
    """
    chosen, rejected = tuple(chosen_ids[-max_len:]), tuple(rejected_ids[-max_len:])
    if chosen == rejected:
        return None
    room = max_len - max(len(chosen), len(rejected))
    prompt = tuple(prompt_ids[max(0, len(prompt_ids) - room) :])
    return PairIds(prompt=prompt, chosen=chosen, rejected=rejected)
