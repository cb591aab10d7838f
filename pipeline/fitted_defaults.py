"""Settings that follow from the model that is given, where a config states none.

    config + GivenModel --fit--> Fit(config with each of them stated, choices with their reasons)

A model of 7 B parameters is ruined by what a million from scratch need. So where a model is given, a silent
config gets the field's learning rates, a precision for the device, and micro-batches (or recomputed
activations) that stay within a memory budget. A setting that is stated is never changed; `null` is silence.

Owns: these rules. Does not own: the learning rates of the stages (stage_table), the defaults of a chain from
scratch (beside their fields in stages.config), reading the size (given_model), the bytes (placement). Light
import.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import placement
from pipeline.architecture import Architecture
from pipeline.config_fields import field_at
from pipeline.experiment import ExperimentConfig
from pipeline.given_model import GivenModel
from pipeline.stage_table import STAGES
from stages.config.training import FITTED, TrainingConfig

LEARNING_RATES: Mapping[str, float] = {
    f"{stage.name}.{setting}": rate for stage in STAGES.values() for setting, rate in stage.rates.items()
}
"""Setting -> the rate for a given model of 1 B parameters or more."""
FULL_SIZE = 1e9
"""Parameters from which on these learning rates hold. Below, they grow with the root of FULL_SIZE over the
parameters: Adam's best rate falls as 1 / width (Yang et al. 2022, arXiv 2203.03466), and parameters grow with
the square of the width. SmolLM2-135M gets 2.7 times the rate, Qwen2.5-0.5B 1.4 times.
"""
HIGH = 5
"""Times the rate that a given model would get: a stated one above that is remarked upon."""
BF16_SIZE = 1e8
"""Parameters from which on a given model trains in bf16 on a GPU."""
MICRO_BATCHES = (16, 8, 4, 2, 1)
"""Sequences per forward that are tried, in this order."""
GPU_BYTES, CPU_BYTES = 8 * 2**30, 2 * 2**30
"""What forward and backward of one micro-batch may hold, beside weights, gradients and moments: a tenth of
the memory of an 80 GB GPU; a quarter of that on a CPU, whose machine has other things in memory too.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One setting that the config does not state.

    Example: Choice(key="sft.lr", value=2e-5, why="for 1 B parameters and more")
    """

    key: str  # dotted
    value: Any
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A config in which every setting that follows from the model is stated."""

    config: ExperimentConfig
    model: GivenModel | None  # None: from scratch
    choices: tuple[Choice, ...]  # in the order of the config; none from scratch


def fit(config: ExperimentConfig, model: GivenModel | None) -> Fit:
    """`config` with what it leaves open fitted to `model`; as it is where none is given."""
    if model is None:
        return Fit(config=config, model=None, choices=())
    choices: list[Choice] = []
    for stage in STAGES:
        if not isinstance(getattr(config, stage), TrainingConfig):
            continue
        for rules in (_rates, _precision, _forwards):  # the bytes of a forward depend on the precision
            chosen = list(rules(config, stage, model))
            config = _stating(config, stage, chosen)
            choices += chosen
    return Fit(config=config, model=model, choices=tuple(choices))


def learning_rate(key: str, num_parameters: int | None, *, at_most: float) -> float:
    """The peak learning rate `key` ("sft.lr") for a given model: two digits, never above `at_most`, and never
    larger for a larger model. An unknown size counts as FULL_SIZE.
    """
    full = LEARNING_RATES[key]
    if num_parameters is None or num_parameters >= FULL_SIZE:
        return full
    return min(at_most, float(f"{full * math.sqrt(FULL_SIZE / num_parameters):.2g}"))


def high_rates(fitted: Fit) -> Iterator[tuple[str, str]]:
    """The learning rates far above what the model would get where none is stated: key, and a remark on it.

    Example: ("sft.lr", "0.001 is 50 times the 2e-05 that model.path org/name (7.24B parameters) would get;
    null leaves it open")
    """
    if (model := fitted.model) is None:
        return
    for key in LEARNING_RATES:
        stage, _, name = key.partition(".")
        if (section := getattr(fitted.config, stage)) is None:
            continue
        stated, scratch = getattr(section, name), type(section).model_fields[name].default
        would_get = learning_rate(key, model.num_parameters, at_most=scratch)
        if stated > HIGH * would_get:
            yield (
                key,
                f"{stated:g} is {stated / would_get:.0f} times the {would_get:g} that {model.named} "
                f"({model.size}) would get; null leaves it open",
            )


def rule(stage: str, name: str) -> str | None:
    """How `<stage>.<name>` is fitted to a given model, for the manual; None for what is not."""
    key, field = f"{stage}.{name}", field_at((stage, name))
    if name not in FITTED or field is None:
        return None
    if key in LEARNING_RATES:
        return (
            f"{LEARNING_RATES[key]:g}, below 1 B parameters times sqrt(1 B / parameters), at most "
            f"{field.default:g}"
        )
    return {
        "precision": "bf16 on a GPU from 0.1 B parameters on, else fp32",
        "micro_batch_size": (
            f"the largest of {', '.join(map(str, MICRO_BATCHES))} whose forward and backward hold "
            f"{CPU_BYTES >> 30} GiB at most on a CPU, {GPU_BYTES >> 30} on a GPU; never more than batch_size"
        ),
        "gradient_checkpointing": "true where one sequence alone would hold more than a micro-batch may",
    }[name]


def _rates(config: ExperimentConfig, stage: str, model: GivenModel) -> Iterator[Choice]:
    section, count = getattr(config, stage), model.num_parameters
    for name in _silent(section):
        key = f"{stage}.{name}"
        if key not in LEARNING_RATES:
            continue
        full, scratch = LEARNING_RATES[key], type(section).model_fields[name].default
        value = learning_rate(key, count, at_most=scratch)
        if count is None:
            why = "as for 1 B parameters and more: its size is not known here"
        elif count >= FULL_SIZE:
            why = "for 1 B parameters and more"
        elif value == scratch:
            why = "as from scratch: the model is that small"
        else:
            why = f"{full:g} x sqrt(1 B / parameters)"
        yield Choice(key=key, value=value, why=why)


def _precision(config: ExperimentConfig, stage: str, model: GivenModel) -> Iterator[Choice]:
    if "precision" not in _silent(getattr(config, stage)):
        return
    key, count = f"{stage}.precision", model.num_parameters
    if not placement.resources_of(config, stage).num_gpus:
        yield Choice(key=key, value="fp32", why=f"on the CPU (resources.{stage}.num_gpus is 0)")
    elif STAGES[stage].syncs_what_it_trains and config.rollout.engine == "hf":
        yield Choice(key=key, value="fp32", why="rollout.engine hf is the fp32 reference")
    elif count is not None and count < BF16_SIZE:
        yield Choice(key=key, value="fp32", why="below 0.1 B parameters")
    else:
        yield Choice(key=key, value="bf16", why="on a GPU")


def _forwards(config: ExperimentConfig, stage: str, model: GivenModel) -> Iterator[Choice]:
    """Sequences per forward, and whether activations are recomputed: the largest forward within the budget,
    and recomputation only where not even one sequence fits without.
    """
    section = getattr(config, stage)
    sizes, recomputations = _open_sizes(section), _open_recomputations(section)
    has_choice = {
        "micro_batch_size": _is_size_open(section),
        "gradient_checkpointing": len(recomputations) > 1,
    }
    if model.architecture is None:
        is_large = model.num_parameters is None or model.num_parameters >= FULL_SIZE
        limit = 1 if is_large else 4
        values = {
            "micro_batch_size": next((size for size in sizes if size <= limit), sizes[-1]),
            "gradient_checkpointing": is_large,
        }
        reasons = dict.fromkeys(values, f"{model.size}, and no config.json tells the sizes of its layers")
    else:
        values, reasons = _within_budget(config, stage, model.architecture, sizes, recomputations)
    for name, value in values.items():
        if has_choice[name]:
            yield Choice(key=f"{stage}.{name}", value=value, why=reasons[name])


def _within_budget(
    config: ExperimentConfig,
    stage: str,
    architecture: Architecture,
    sizes: list[int],
    recomputations: list[bool],
) -> tuple[dict[str, Any], dict[str, str]]:
    """The two settings of the largest forward that fits, and their reasons."""
    budget = GPU_BYTES if placement.resources_of(config, stage).num_gpus else CPU_BYTES
    section: TrainingConfig = getattr(config, stage)

    def held(size: int, recomputes: bool) -> float:
        tried = {"micro_batch_size": size, "gradient_checkpointing": recomputes}
        changed = section.model_copy(update=tried)
        return placement.forward_bytes(config.model_copy(update={stage: changed}), stage, architecture)

    tries = [(size, recomputes) for recomputes in recomputations for size in sizes]
    size, recomputes = next((each for each in tries if held(*each) <= budget), tries[-1])
    of_budget = f"a forward and backward holds {_gib(held(size, recomputes))} of {budget >> 30} GiB"
    if held(size, recomputes) > budget:
        of_budget = (
            f"no less is possible: {_gib(held(size, recomputes))} GiB, where {budget >> 30} were meant"
        )
    at_once = "a row" if section.takes_rows else min(size, section.batch_size)
    without = f"without it, {at_once} at once would hold {_gib(held(size, False))} GiB"
    return (
        {"micro_batch_size": size, "gradient_checkpointing": recomputes},
        {"micro_batch_size": of_budget, "gradient_checkpointing": without if recomputes else of_budget},
    )


def _open_sizes(section: TrainingConfig) -> list[int]:
    """The sizes of a micro-batch that may be chosen from; one, where it is stated or not read."""
    if not _is_size_open(section):
        return [section.micro_batch_size]
    sizes = dict.fromkeys(min(size, section.batch_size) for size in MICRO_BATCHES)
    tried = {size: section.model_copy(update={"micro_batch_size": size}) for size in sizes}
    return [size for size, changed in tried.items() if changed.torn_packs() is None]


def _is_size_open(section: TrainingConfig) -> bool:
    return "micro_batch_size" in _silent(section) and not section.takes_rows


def _open_recomputations(section: TrainingConfig) -> list[bool]:
    is_open = "gradient_checkpointing" in _silent(section)
    return [False, True] if is_open else [section.gradient_checkpointing]


def _silent(section: TrainingConfig) -> list[str]:
    """The settings that are fitted and that the config states nothing for."""
    known = type(section).model_fields
    return [name for name in FITTED if name in known and name not in section.model_fields_set]


def _stating(config: ExperimentConfig, stage: str, choices: list[Choice]) -> ExperimentConfig:
    """`config` with these values, which count as stated from here on."""
    stated = {choice.key.removeprefix(f"{stage}."): choice.value for choice in choices}
    return config.model_copy(update={stage: getattr(config, stage).model_copy(update=stated)})


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"
