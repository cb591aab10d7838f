"""The settings that matter and that a config does not state: their values, and why those.

    config as stated --MATTER--> what is silent --Fit--> fitted to the given model, or else the default
                                                 `--> one table of `rlhf check`

Owns: which settings matter, the table. Does not own: the values (stages.config, fitted_defaults).
"""

import re
from collections.abc import Iterator, Mapping

from pipeline.experiment import ExperimentConfig
from pipeline.fitted_defaults import Choice, Fit
from pipeline.given_model import GivenModel
from pipeline.stage_table import STAGES
from pipeline.yaml_nodes import short
from rollout.ground.section import Section
from stages.config.prepare import PrepareConfig
from stages.config.training import TrainingConfig

STEPS = ("max_steps", "num_epochs")
SIZES = ("layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
MATTER: Mapping[str, tuple[str, ...]] = {
    "model": ("context_length", *SIZES),
    **{stage.name: stage.matter for stage in STAGES.values()},
    "rollout": ("engine", "num_engines", "max_num_seqs", "kv_cache_mib", "gpu_memory_frac"),
}
"""Section -> the settings that decide what is learned, how long it takes or whether it fits into memory."""

WHY_CHARS = 88
"""Of what a default is, from the manual."""


def unstated(config: ExperimentConfig, fitted: Fit) -> Iterator[Choice]:
    """Every setting of MATTER that `config`, as stated, leaves open, with the value of `fitted.config`."""
    choices = {choice.key: choice for choice in fitted.choices}
    if "seed" not in config.model_fields_set:
        yield _default(fitted.config, "seed", "seed")
    for name, matter in MATTER.items():
        section = getattr(config, name)
        if section is None or (name == "rollout" and not config.stages_with_engines()):
            continue
        for setting in matter:
            key = f"{name}.{setting}"
            if setting in section.model_fields_set or not _is_read(config, name, setting):
                continue
            if key == "model.context_length" and fitted.model is not None:
                yield Choice(key=key, value=config.model.context_length, why=_of_positions(fitted.model))
            else:
                yield choices[key] if key in choices else _default(getattr(fitted.config, name), setting, key)
    yield from _on_the_cpu(config)


def table(config: ExperimentConfig, fitted: Fit) -> Iterator[str]:
    """The lines of the table, without a heading: key, value, why."""
    rows = [(row.key, _shown(row.value), row.why) for row in unstated(config, fitted)]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for key, value, why in rows:
        yield f"{key:{widths[0]}}  {value:{widths[1]}}  {why}"


def fitted_line(fitted: Fit) -> str | None:
    """What a run says before it starts; None where nothing was fitted."""
    if fitted.model is None or not fitted.choices:
        return None
    values = ", ".join(f"{choice.key} {_shown(choice.value)}" for choice in fitted.choices)
    return f"not stated, so fitted to {fitted.model.named} ({fitted.model.size}): {values}"


def _default(section: Section, setting: str, key: str) -> Choice:
    about = " ".join((type(section).model_fields[setting].description or "").split())
    first = re.split(r"[.;] |\.$|(?<=.{20}): ", about, maxsplit=1)[0]
    return Choice(key=key, value=getattr(section, setting), why=short(f"default: {first}", WHY_CHARS))


def _of_positions(model: GivenModel) -> str:
    if model.num_positions is None:
        return "default, whatever the model takes: longer rows are cut or left out"
    return f"default: longer rows are cut or left out; the model was made for up to {model.num_positions}"


def _is_read(config: ExperimentConfig, name: str, setting: str) -> bool:
    """Whether a setting says anything beside the others that are stated."""
    section = getattr(config, name)
    if setting in SIZES:
        return config.model.path is None and config.pretrain is not None
    if isinstance(section, PrepareConfig) and setting == "vocab_size":
        return config.model.path is None and section.tokenizer is None
    if isinstance(section, TrainingConfig) and section.takes_rows:
        return setting not in ("batch_size", "micro_batch_size")
    goes_over_data = name in STAGES and not STAGES[name].syncs_what_it_trains  # else over what it samples
    if isinstance(section, TrainingConfig) and goes_over_data and setting in STEPS:
        return setting == ("num_epochs" if section.max_steps is None else "max_steps")
    if setting in ("kv_cache_mib", "gpu_memory_frac"):
        on_gpu = any(getattr(config.resources, stage).num_gpus_per_engine for stage in STAGES)
        return on_gpu == (setting == "gpu_memory_frac")
    if setting == "missing_eos_penalty":
        return bool(section.truncation == "penalty")
    return True


def _on_the_cpu(config: ExperimentConfig) -> Iterator[Choice]:
    stages = [
        stage
        for stage, row in STAGES.items()
        if row.has_workers and getattr(config, stage) is not None
        if "num_gpus" not in getattr(config.resources, stage).model_fields_set
    ]
    if stages:
        why = f"default: {', '.join(stages)} on the CPU"
        yield Choice(key="resources.<stage>.num_gpus", value=0, why=why)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value).replace("\n", "\\n")
