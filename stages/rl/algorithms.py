"""Algorithms: which parts learn from a batch. The one place that chooses them by the config.

    settings --algorithm_of--> roles (models to load), credit, terms of the losses, rollout correction

Owns: that choice. Does not own: the parts (credit, terms), loading (roles), the loop (the recipe).
"""

from dataclasses import dataclass
from typing import Any

from stages.config.correction import Correction
from stages.config.ppo import PPOConfig, PPOSettings, Role
from stages.objectives.kl import AdaptiveKl, FixedKl, KlController
from stages.rl.credit import Credit, GeneralisedAdvantages
from stages.rl.terms import ClippedPolicy, ClippedValue, EntropyBonus, ReferenceKl, Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """The parts of an algorithm, for the recipe's loop."""

    roles: tuple[Role, ...]  # models that are loaded, in this order
    credit: Credit
    terms: tuple[Term, ...]  # those of one model are added up in this order
    correction: Correction  # for what the engine computes differently than the trainer


def kl_controller(config: PPOConfig) -> KlController:
    """What says how much the KL weighs, batch by batch."""
    if config.kl_controller == "fixed":
        return FixedKl(coef=config.kl_coef)
    return AdaptiveKl(coef=config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)


def algorithm_of(settings: PPOSettings) -> Algorithm:
    """The parts that the config names."""
    match settings.ppo:
        case PPOConfig() as config:
            of_policy: dict[str, Any] = {"config": config, "active_from": config.value_warmup_steps}
            terms: list[Term] = [
                ClippedValue(config=config, active_from=0),
                ClippedPolicy(**of_policy, correction=settings.correction),
            ]
            if config.kl_placement != "reward" and config.reads_reference:
                terms.append(ReferenceKl(**of_policy))
            if config.entropy_coef != 0:
                terms.append(EntropyBonus(**of_policy))
            return Algorithm(
                roles=config.roles,
                credit=GeneralisedAdvantages(config=config),
                terms=tuple(terms),
                correction=settings.correction,
            )
