"""Algorithms: which parts learn from a batch. The one place that chooses them by the config.

    settings --algorithm_of--> roles (models to load), credit, terms of the losses, rollout correction

Owns: that choice. Does not own: the parts (credit, terms), loading (roles), the loop (the recipe).
"""

from dataclasses import dataclass

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
            terms: list[Term] = [
                ClippedValue(config=config),
                ClippedPolicy(config=config, correction=settings.correction),
            ]
            if config.kl_placement != "reward" and config.reads_reference:
                terms.append(ReferenceKl(config=config))
            if config.entropy_coef != 0:
                terms.append(EntropyBonus(config=config))
            return Algorithm(
                roles=config.roles,
                credit=GeneralisedAdvantages(config=config),
                terms=tuple(terms),
                correction=settings.correction,
            )
