"""The updates of one iteration: E epochs of optimizer steps over one batch of experience.

    experiences (packs) --shuffled per epoch--> minibatches --terms per model, value first--> optimizer steps

Owns: the order of minibatches, who trains on which pack, the counts of each step, the metrics of the updates.
Does not own: the losses (terms), the models and their optimizers (roles). Which packs exist was decided once,
before the anchor forward; they are shuffled here and never torn. Every rank holds all packs, and the packs of
each step are shared out between the ranks.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add, or_
from typing import Self, TypeVar

import torch

from stages.config.ppo import PPOConfig, Role
from stages.data.batches import permutation, stage_seed
from stages.rl.experience import Experience
from stages.rl.terms import StepCounts, Term
from stages.training import ranks
from stages.training.health import Health
from stages.training.trainable import Outputs, StepResult, TermLoss, Trainable

T = TypeVar("T")

UPDATED: tuple[Role, ...] = ("value", "policy")
"""Models in the order in which each minibatch updates them."""
LOGGED: Mapping[Role, Mapping[str, str]] = {
    "policy": {"loss": "ppo/policy_loss", "grad_norm": "ppo/policy_grad_norm", "lr": "ppo/lr"},
    "value": {"loss": "ppo/value_loss", "grad_norm": "ppo/value_grad_norm"},
}
"""What is logged of each model's steps, and the names of METRICS for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSteps:
    """How many optimizer steps a run takes: what learning rates are scheduled over."""

    packs_per_step: int
    per_epoch: int
    per_iteration: int  # over one batch
    iterations: int

    @classmethod
    def of(cls, config: PPOConfig) -> Self:
        """As the sizes of `config` say."""
        packs_per_step = config.batch_size // config.pack_size
        num_packs = math.ceil(config.responses_per_step / config.pack_size)
        per_epoch = math.ceil(num_packs / packs_per_step)
        return cls(
            packs_per_step=packs_per_step,
            per_epoch=per_epoch,
            per_iteration=config.num_epochs * per_epoch,
            iterations=config.max_steps,
        )

    def total(self, *, active_from: int) -> int:
        """Of a model that is trained from iteration `active_from` (0-based) on."""
        return (self.iterations - active_from) * self.per_iteration


class Learner:
    """The models of an algorithm under training.

    Example: learner = Learner(models.trained, algorithm.terms, config, seed=0, health=health)
             metrics = learner.update(step, experiences)
    """

    def __init__(
        self,
        trained: Mapping[Role, Trainable],
        terms: Sequence[Term],
        config: PPOConfig,
        *,
        seed: int,
        health: Health,
    ) -> None:
        self.trained = trained
        self.health = health
        self.has_moved = False  # whether this process has updated the policy
        self._terms = terms
        self._config = config
        self._seed = seed
        self._steps = UpdateSteps.of(config)

    @property
    def policy_active_from(self) -> int:
        """The first iteration (0-based) in which the policy is trained."""
        return first_active(self._terms, "policy")

    @property
    def keeps_anchor(self) -> bool:
        """Whether the policy moves before the last update of a batch: later ones need its first log-probs."""
        return self._steps.per_iteration > 1

    def update(self, step: int, experiences: Sequence[Experience]) -> dict[str, float]:
        """All optimizer steps of iteration `step` (0-based); metrics averaged over those that were taken.
        Raises RollBack when too many of them are bad.
        """
        seen: list[Mapping[str, float]] = []
        first_extremes: Mapping[str, float] = {}
        for number, packs in self._numbered_batches(step, experiences):
            counts = StepCounts.of(packs, self._config)
            if counts.num_tokens == 0:
                self._leave_out()
                continue
            mine = [pack if is_mine else _empty(pack) for pack, is_mine in ranks.shared_out(packs)]
            for role, terms in self._active(step):
                result = self.trained[role].take_step(
                    number - first_active(self._terms, role) * self._steps.per_iteration,
                    mine,
                    reduce(or_, [term.reads for term in terms]),
                    _sum_of(terms, counts),
                    self.health.accepting(f"{role} loss", step),
                )
                if not result.taken:
                    self.health.skipped(step, mine)
                    continue
                self.has_moved |= role == "policy"
                seen.append(_metrics_of(role, result))
                first_extremes = first_extremes or result.extremes
        return {**_means(seen), **first_extremes}

    def _numbered_batches(
        self, step: int, experiences: Sequence[Experience]
    ) -> Iterator[tuple[int, Sequence[Experience]]]:
        """The packs of each optimizer step of an iteration, with the number of that step in the run."""
        for epoch in range(self._config.num_epochs):
            seed = stage_seed(self._seed, "ppo", "minibatches", step, epoch)
            batches = minibatches(experiences, packs_per_step=self._steps.packs_per_step, seed=seed)
            first = (step * self._config.num_epochs + epoch) * self._steps.per_epoch
            yield from enumerate(batches, start=first)

    def _active(self, step: int) -> Iterator[tuple[Role, Sequence[Term]]]:
        """The models that learn in iteration `step`, in order, each with the terms of its loss."""
        for role in UPDATED:
            terms = [term for term in self._terms if term.trains == role and term.active_from <= step]
            if terms:
                yield role, terms

    def _leave_out(self) -> None:
        key = self._config.KEY
        self.health.leave_out(
            f"every response of a batch was cut off, and so left out; raise {key}.max_response_tokens, "
            f"or set {key}.truncation: penalty"
        )


def _metrics_of(role: Role, result: StepResult) -> dict[str, float]:
    """Of a step that was taken."""
    figures = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
    return {
        **{name: float(share) for name, share in result.sums.items()},
        **{key: figures[figure] for figure, key in LOGGED[role].items()},
    }


def first_active(terms: Sequence[Term], role: Role) -> int:
    """The first iteration (0-based) in which the model of `role` is trained."""
    return min(term.active_from for term in terms if term.trains == role)


def minibatches(packs: Sequence[T], *, packs_per_step: int, seed: int) -> list[list[T]]:
    """The packs of an epoch in a seeded order, `packs_per_step` to an optimizer step: packs are shuffled,
    never torn.
    """
    order = [packs[int(index)] for index in permutation(len(packs), seed)]
    return [order[start : start + packs_per_step] for start in range(0, len(order), packs_per_step)]


def _sum_of(terms: Sequence[Term], counts: StepCounts) -> Callable[[Experience, Outputs], TermLoss]:
    """The loss of one model: its terms, added up in their order."""

    def loss_of(pack: Experience, now: Outputs) -> TermLoss:
        return reduce(add, [term(pack, now, counts) for term in terms])

    return loss_of


def _empty(pack: Experience) -> Experience:
    """A pack that takes part in the forwards and adds nothing to loss or gradient."""
    return replace(pack, mask_BT=torch.zeros_like(pack.mask_BT))


def _means(seen: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each name the mean over the steps that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for metrics in seen:
        for name, value in metrics.items():
            values[name].append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}
