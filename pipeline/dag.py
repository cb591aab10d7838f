"""The graph of one config: which stages it has, what each takes, and the part of it that some targets need.

    prepare --> pretrain --> sft --> reward --> ppo --> evaluate     (with `model.path`: model instead of
                    |          |        `----->--^         ^          pretrain, or before it)
                    `----------+---------------------------'
    ExperimentConfig --select--> Selection(stages, outside)

Every stage is optional: an edge is there where both of its ends are.

Owns: edges and selection. Does not own: what a stage needs (stage_table), what names its artifact (identity),
who runs it (executor). Pure data: no Ray, no torch.
"""

from collections.abc import Collection
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.experiment import ExperimentConfig
from pipeline.stage_table import MODEL, STAGES, missing
from stages.runtime import POLICY, START


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The part of the graph that some targets need.

    Example: Selection(stages=("sft", "reward"), outside=("model",))
    """

    stages: tuple[str, ...]  # in the order of STAGES
    outside: tuple[str, ...]  # input keys that no stage of the selection makes


def needs(config: ExperimentConfig, stage: str, given: Collection[str] = ()) -> tuple[str, ...]:
    """Input keys of `stage`: stage names, and "model" for the directory that `model.path` names.

    `given`: keys that a user gives although no section makes them.
    """
    return tuple(need.key for need in STAGES[stage].needs(config, given))


def configured(config: ExperimentConfig) -> tuple[str, ...]:
    """The stages that have a section in the config."""
    return tuple(stage for stage in STAGES if getattr(config, stage) is not None)


def select(config: ExperimentConfig, targets: Collection[str], given: Collection[str] = ()) -> Selection:
    """`targets` and every stage they need, stopping at the input keys in `given`.

    Raises ConfigError when one of them has no section in the config.
    """
    wanted, outside = set(targets), set[str]()
    for stage in reversed(STAGES):
        if stage not in wanted:
            continue
        if getattr(config, stage) is None:
            users = [user for user in STAGES if user in wanted and stage in needs(config, user, given)]
            raise ConfigError(
                missing(stage, users[0]) if users else f"{stage}: no such section; add `{stage}:`"
            )
        for key in needs(config, stage, given):
            (outside if key == MODEL or key in given else wanted).add(key)
    return Selection(
        stages=tuple(stage for stage in STAGES if stage in wanted),
        outside=tuple(key for key in (*STAGES, MODEL) if key in outside),
    )


def check_can_run(config: ExperimentConfig, stages: Collection[str], given: Collection[str] = ()) -> None:
    """Raises ConfigError for a stage that can be planned but not run: nothing replaces an input it lacks."""
    for stage in stages:
        if (problem := STAGES[stage].lacks(needs(config, stage, given))) is not None:
            raise ConfigError(problem)


def trained_from(config: ExperimentConfig, selection: Selection) -> frozenset[str]:
    """Input keys of the models that the stages of `selection` train further, not of those they only use."""
    needs = (need for stage in selection.stages for need in STAGES[stage].needs(config, selection.outside))
    return frozenset(need.key for need in needs if need.role in (START, POLICY))


def until(config: ExperimentConfig, last: str | None) -> tuple[str, ...]:
    """The configured stages up to and including `last` in the order of the pipeline; all of them for None."""
    stages = configured(config)
    if last is None:
        return stages
    if last not in stages:
        raise ConfigError(f"{last}: no such section, so the run cannot end there; add `{last}:`")
    return stages[: stages.index(last) + 1]


def downstream(config: ExperimentConfig, stage: str) -> frozenset[str]:
    """`stage` and every configured stage that needs it, directly or not."""
    found = {stage}
    for other in configured(config):
        if found.intersection(needs(config, other)):
            found.add(other)
    return frozenset(found)


def levels(config: ExperimentConfig, stages: Collection[str]) -> list[tuple[str, ...]]:
    """`stages` in groups, one after another; those of a group may run at the same time."""
    depth: dict[str, int] = {}
    for stage in STAGES:
        if stage in stages:
            depth[stage] = 1 + max((depth[key] for key in needs(config, stage) if key in depth), default=0)
    return [tuple(stage for stage in depth if depth[stage] == level) for level in sorted(set(depth.values()))]


def side_by_side(config: ExperimentConfig, stages: Collection[str]) -> int:
    """How many of `stages` may run at the same time, at most: so many share the cores."""
    return max((len(level) for level in levels(config, stages)), default=1)
