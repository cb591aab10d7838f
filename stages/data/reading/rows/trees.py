"""Trees: OpenAssistant's conversation trees -> one conversation, preference pairs, or the first prompt.

    prompt: {text, role, replies: [{text, role, rank, replies}]} --> Conversation | (Pair, ...) | Prompt

Owns which replies count and which thread is followed. Does not own margins (ranked). Light import.

sft takes the best thread: at every level the reply of the lowest rank, the first in the file where ranks are
absent or equal, down to the last assistant turn; a person's follow-ups are not ranked, so the first that was
answered. One thread per tree, so that no turn is trained twice (the choice of Guanaco: QLoRA,
arXiv:2305.14314). reward takes every two ranked answers to one turn, with the conversation so far as the
prompt. Replies that are deleted or failed their review are left out, and what hangs on them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.data.reading.records import Conversation, Message, Messages, Pair, Prompt
from stages.data.reading.rows.cells import Cells, RowError, as_text, filled
from stages.data.reading.rows.ranked import Rated, pairs_of
from stages.data.reading.rows.turns import as_role
from stages.data.reading.rows.wording import described, listed

_LARGEST_RANK = 10**9


@dataclass(slots=True, kw_only=True)
class _Reply:
    """A turn of the tree, with the replies to it that count, in file order."""

    message: Message
    rank: int | None  # among its siblings; lower is better; None: not ranked
    replies: list["_Reply"] = field(default_factory=list)
    is_answered: bool = False  # the assistant's, or one of its replies is


def holds_tree(cells: Cells) -> bool:
    """Whether the prompt is a turn with replies."""
    if cells.column("prompt") is None:
        return False
    prompt = cells.required("prompt")[1]
    return isinstance(prompt, Mapping) and "replies" in prompt


def tree_conversation(cells: Cells) -> tuple[Conversation, ...]:
    """The best thread; none where nothing was answered. Raises RowError."""
    root = _tree(cells)
    if root is None or not root.is_answered:
        return ()
    thread, reply = [root.message], root
    while candidates := [reply for reply in reply.replies if reply.is_answered]:
        reply = min(candidates, key=lambda one: _LARGEST_RANK + 1 if one.rank is None else one.rank)
        thread.append(reply.message)
    return (Conversation(messages=tuple(thread)),)


def tree_pairs(cells: Cells) -> tuple[Pair, ...]:
    """The pairs of every level, from the root down. Raises RowError."""
    root = _tree(cells)
    return () if root is None else tuple(pair for level in _levels(root) for pair in pairs_of(*level, cells))


def tree_prompt(cells: Cells) -> tuple[Prompt, ...]:
    """What the person asked first. Raises RowError."""
    root = _tree(cells)
    return () if root is None else (Prompt(messages=(root.message,), row=cells.rest("prompt")),)


def _levels(root: _Reply) -> Iterator[tuple[Messages, list[Rated]]]:
    """(conversation so far, the assistant's replies to it) of every turn that has any."""
    waiting: list[tuple[Messages, _Reply]] = [((), root)]
    while waiting:
        before, reply = waiting.pop()
        thread = (*before, reply.message)
        if reply.message.role != "assistant":
            yield thread, [_rated(one) for one in reply.replies if one.message.role == "assistant"]
        waiting += [(thread, one) for one in reversed(reply.replies)]


def _rated(reply: _Reply) -> Rated:
    return Rated(messages=(reply.message,), merit=None if reply.rank is None else -float(reply.rank))


def _tree(cells: Cells) -> _Reply | None:
    """The tree without what is left out; None where that is all of it. No recursion: trees may be deep."""
    column, value = cells.required("prompt")
    if not isinstance(value, Mapping):
        raise RowError(f"{column}: expected a turn {{text, role, replies}}, got {described(value)}")
    root = _reply(value, column) if _counts(value, column) else None
    if root is None:
        return None
    if root.message.role != "user":
        raise RowError(f"{column}.role: starts with the assistant: no prompt")
    order: list[_Reply] = []
    waiting = [(root, value, column)]
    while waiting:
        reply, source, name = waiting.pop()
        order.append(reply)
        for child, child_name in _children(source, name):
            reply.replies.append(_reply(child, child_name))
            waiting.append((reply.replies[-1], child, child_name))
    for reply in reversed(order):  # children before their parents
        below = any(child.is_answered for child in reply.replies)
        reply.is_answered = below or reply.message.role == "assistant"
    return root


def _children(source: Mapping[str, Any], name: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    if "replies" not in source or source["replies"] is None:
        return
    if not isinstance(source["replies"], list):
        raise RowError(f"{name}.replies: expected a list of turns, got {described(source['replies'])}")
    for index, child in enumerate(source["replies"]):
        child_name = f"{name}.replies[{index}]"
        if not isinstance(child, Mapping):
            raise RowError(f"{child_name}: expected a turn {{text, role, replies}}, got {described(child)}")
        if _counts(child, child_name):
            yield child, child_name


def _counts(source: Mapping[str, Any], name: str) -> bool:
    """Not deleted, and not failed in review; a turn that nobody has reviewed counts."""
    for key, unwanted in (("deleted", True), ("review_result", False)):
        if key in source and source[key] is not None:
            if not isinstance(source[key], bool):
                raise RowError(f"{name}.{key}: expected true or false, got {described(source[key])}")
            if source[key] is unwanted:
                return False
    return True


def _reply(source: Mapping[str, Any], name: str) -> _Reply:
    for key in ("text", "role"):
        if key not in source:
            raise RowError(f"{name}.{key}: missing; keys are {listed(source)}")
    role = as_role(source["role"], f"{name}.role")
    text = as_text(source["text"], f"{name}.text")
    filled(text, f"{name}.text", "response" if role == "assistant" else "prompt")
    return _Reply(message=Message(role=role, content=text), rank=_rank(source, name))


def _rank(source: Mapping[str, Any], name: str) -> int | None:
    if "rank" not in source or source["rank"] is None:
        return None
    rank = source["rank"]
    if isinstance(rank, bool) or not isinstance(rank, int) or abs(rank) > _LARGEST_RANK:
        raise RowError(f"{name}.rank: expected a whole number, got {described(rank)}")
    return rank
