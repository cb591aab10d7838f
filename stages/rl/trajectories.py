"""Trajectories: what a policy did with one prompt, turn by turn, and how it was scored.

    prompt --engine--> Rollout --> Turn --all turns of one sample--> Trajectory --all of a step--> Batch

Owns: these records. Two masks say which tokens count. The *layout* of a pack says which tokens follow the
prompt: log-probs and values are laid out by it. What is *learned from* is a part of it, because a rule may
leave a whole response out. Does not own: drawing (source), packing and masks (experience). No torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rollout.api import FinishReason, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One response of the policy, and all that it had read before it.

    Example: Turn(prompt_ids=(5, 9), response_ids=(11, 2), logprobs=(-0.7, -0.1), weight_versions=(3, 3),
                  finish_reason="stop")
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # T tokens, the stop token included when there was one
    logprobs: tuple[float, ...]  # T, nats, by the engine, under the distribution sampled from
    weight_versions: tuple[int, ...]  # T, the weights that drew each token
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One sample of one prompt.

    Samples with the same `place` in a batch form a group. The index of the prompt cannot say which group a
    sample belongs to, because a small dataset fills a batch by using prompts more than once.
    """

    id: str  # unique in its batch
    prompt_index: int  # which prompt of the dataset
    place: int  # of its prompt in the batch, from 0
    sample: int  # of its prompt at that place, from 0
    seed: int  # that the engine sampled with
    turns: tuple[Turn, ...]
    row: Mapping[str, Any]  # the further columns of the user's row
    scores: Mapping[str, float | None]  # by source; None: that source gave none. Empty until scored

    @property
    def turn(self) -> Turn:
        """The only turn."""
        (turn,) = self.turns
        return turn

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return len(self.turn.prompt_ids) + len(self.turn.response_ids)

    @property
    def weight_versions(self) -> frozenset[int]:
        """Of all tokens that the policy drew."""
        return frozenset(drawn for turn in self.turns for drawn in turn.weight_versions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The trajectories that one step learns from, sorted by place and then by sample."""

    position: int  # in the order of batches; beyond the step once batches were left out
    trajectories: tuple[Trajectory, ...]
    is_replayed: bool  # out of the journal, with the scores that were committed


def versions_of(trajectories: Iterable[Trajectory]) -> set[int]:
    """The weights that drew any of their tokens."""
    return {version for trajectory in trajectories for version in trajectory.weight_versions}


def turn_of(rollout: Rollout) -> Turn:
    """What the engine sampled, as a turn."""
    return Turn(
        prompt_ids=rollout.prompt_ids,
        response_ids=rollout.response_ids,
        logprobs=rollout.logprobs,
        weight_versions=rollout.weight_versions,
        finish_reason=rollout.finish_reason,
    )
