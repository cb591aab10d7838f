"""The graph: which stages there are, what each needs, and the fingerprint that names each one's artifact.

    prepare --> pretrain --> sft --> reward --> ppo --> evaluate     (with `model.path`: model instead of
                    |          |        `----->--^         ^          pretrain, or before it)
                    `----------+---------------------------'
    ExperimentConfig --select--> Selection --plan--> {stage: Node(fingerprint)}

Owns: the stage table, the edges, identity. Pure data: no Ray, no torch, no recipe is imported here.
Does not own: where artifacts live (artifacts), who runs a stage (executor).
"""

import ast
import importlib.util
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import blake3

from pipeline.errors import ConfigError
from pipeline.experiment import ExperimentConfig
from rollout.ground.section import Section
from stages.config.data import DataSource
from stages.config.evaluate import EvaluateSettings
from stages.config.model import ModelConfig
from stages.config.ppo import PPOSettings
from stages.config.prepare import PrepareConfig, PrepareSettings
from stages.config.pretrain import PretrainSettings
from stages.config.reward import RewardSettings
from stages.config.score import ScoreFunction
from stages.config.sft import SFTSettings
from stages.config.stage import StageSettings
from stages.data.reading.files import shown
from stages.data.reading.hub import hub_commit, is_hub_id
from stages.data.reading.readers import content_digest
from stages.data.reading.schemas import SCHEMAS, StageName
from stages.errors import DataError

SCHEMA_VERSION = 2
"""Of artifacts and fingerprints: a bump makes every artifact of an older version unknown."""
FINGERPRINT_CHARS = 16
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What makes a tokenizer; the first is always there."""
CHANGED = "changed since the run was planned; run the same command again"
"""What is wrong with a file or a directory that a stage was planned on and found otherwise."""
MODEL = "model"
"""Input key of the directory that `model.path` names; every other input key is the name of a stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One row of the stage table."""

    name: str
    entry: str  # "module:function" of the recipe, imported only where the stage runs
    settings: type[StageSettings]  # what the recipe may read, hence what is fingerprinted


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(name="prepare", entry="stages.prepare:run", settings=PrepareSettings),
        Stage(name="pretrain", entry="stages.pretrain:run", settings=PretrainSettings),
        Stage(name="sft", entry="stages.sft:run", settings=SFTSettings),
        Stage(name="reward", entry="stages.reward:run", settings=RewardSettings),
        Stage(name="ppo", entry="stages.ppo:run", settings=PPOSettings),
        Stage(name="evaluate", entry="stages.evaluate:run", settings=EvaluateSettings),
    )
}
"""In an order in which every stage comes after all it may need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The part of the graph that some targets need.

    Example: Selection(stages=("sft", "reward"), outside=("model",))
    """

    stages: tuple[str, ...]  # in the order of STAGES
    outside: tuple[str, ...]  # input keys that no stage of the selection makes


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One stage of a planned run, with everything that identifies its artifact."""

    stage: str
    entry: str
    settings: StageSettings
    recipe_version: int
    inputs: Mapping[str, str]  # input key -> fingerprint
    contents: Mapping[str, str]  # dotted key of a file the settings name -> digest of its content
    fingerprint: str


class _Content(NamedTuple):
    """What a file, or a source of several, holds that the settings name."""

    key: str  # dotted
    path: str
    digest: str


def needs(config: ExperimentConfig, stage: str) -> tuple[str, ...]:
    """Input keys of `stage`: stage names, and "model" for the directory that `model.path` names."""
    model = () if config.model.path is None else (MODEL,)
    held_out = () if config.prepare is None else ("prepare",)
    start = MODEL if config.pretrain is None and model else "pretrain"
    reward_starts_from_sft = config.reward is None or config.reward.init_from == "sft"
    edges: dict[str, tuple[str, ...]] = {
        "prepare": model,
        "pretrain": ("prepare", *model),
        "sft": (start,),
        "reward": ("sft" if reward_starts_from_sft else start,),
        "ppo": ("sft", "reward"),
        "evaluate": (*held_out, start, "sft", "reward", "ppo"),
    }
    return edges[stage]


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
            users = [user for user in STAGES if user in wanted and stage in needs(config, user)]
            raise ConfigError(
                f"{stage}: no such section, which {users[0]} needs; add `{stage}:`, or give "
                f"`rlhf {users[0]}` --input {stage}=DIR"
                if users
                else f"{stage}: no such section; add `{stage}:`"
            )
        for key in needs(config, stage):
            (outside if key == MODEL or key in given else wanted).add(key)
    return Selection(
        stages=tuple(stage for stage in STAGES if stage in wanted),
        outside=tuple(key for key in (*STAGES, MODEL) if key in outside),
    )


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


def plan(config: ExperimentConfig, selection: Selection, outside: Mapping[str, str]) -> dict[str, Node]:
    """The selected stages with their fingerprints, in the order of STAGES.

    `outside` gives the fingerprint of every key of `selection.outside`. Reads the datasets (digests); raises
    DataError when one is missing.
    """
    known = dict(outside)
    nodes: dict[str, Node] = {}
    for stage in selection.stages:
        inputs = {key: known[key] for key in needs(config, stage)}
        nodes[stage] = node = _node(STAGES[stage], _pinned(settings_for(config, stage)), inputs)
        known[stage] = node.fingerprint
    return nodes


def check_contents(node: Node) -> None:
    """Read the files that the node's settings name again. Raises DataError naming what is no longer what was
    planned.
    """
    now = {content.key: content for content in _contents(node.settings)}
    for key, content in now.items():
        if content.digest != node.contents.get(key):
            raise DataError(f"{content.path}: {key}: {CHANGED}")
    for key in node.contents.keys() - now.keys():
        raise DataError(f"{key}: {CHANGED}")


def settings_for(config: ExperimentConfig, stage: str) -> StageSettings:
    """The sections of the config that the recipe of `stage` may read."""
    sections = STAGES[stage].settings
    return sections(**{name: getattr(config, name) for name in sections.model_fields})


def data_sources(config: ExperimentConfig, stage: str) -> Iterator[tuple[str, DataSource]]:
    """Dotted key and source of every dataset that a stage reads (none of weight 0), e.g. ("sft.data.0", ...).

    The first part of the key is the stage by whose schemas it is read: prepare reads evaluate's prompts too.
    """
    for key, section in _sections(settings_for(config, stage)):
        if isinstance(section, DataSource) and section.weight > 0:
            yield key.replace("evaluation_prompts.", "evaluate.prompts."), section


def datasets(config: ExperimentConfig, stages: Collection[str]) -> dict[StageName, dict[str, DataSource]]:
    """The `data_sources` of all `stages`, each once, by the stage as which they are read, in that order."""
    sources = {key: source for stage in stages for key, source in data_sources(config, stage)}
    return {
        stage: {key: source for key, source in sources.items() if key.startswith(f"{stage}.")}
        for stage in SCHEMAS
        if any(key.startswith(f"{stage}.") for key in sources)
    }


def directory_name(stage: str, fingerprint: str) -> str:
    """Name of an artifact's directory, of its unfinished work and of its lock."""
    return f"{stage}-{fingerprint}"


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


@cache
def recipe_version(entry: str) -> int:
    """`RECIPE_VERSION` of a recipe, read from its source: importing a recipe imports torch."""
    module = entry.partition(":")[0]
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, (
        f"{module}: no such module (entry {entry} of the stage table)"
    )
    for statement in ast.parse(Path(spec.origin).read_text()).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="RECIPE_VERSION")], value=ast.Constant(value=int(version))):
                return version
    raise AssertionError(f"{spec.origin}: no line `RECIPE_VERSION = <integer>`")


def _node(stage: Stage, settings: StageSettings, inputs: Mapping[str, str]) -> Node:
    version = recipe_version(stage.entry)
    contents = {content.key: content.digest for content in _contents(settings)}
    identity = {
        "schema": SCHEMA_VERSION,
        "stage": stage.name,
        "recipe_version": version,
        "settings": settings.identity(),
        "inputs": inputs,
        "contents": contents,
    }
    return Node(
        stage=stage.name,
        entry=stage.entry,
        settings=settings,
        recipe_version=version,
        inputs=inputs,
        contents=contents,
        fingerprint=_digest(identity),
    )


def _digest(identity: Mapping[str, Any]) -> str:
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return blake3.blake3(canonical.encode()).hexdigest()[:FINGERPRINT_CHARS]


def _pinned(value: Any) -> Any:
    """`value` with the commit that each hub dataset means now, so that every process reads the same rows."""
    match value:
        case DataSource():
            is_read = value.weight > 0 and is_hub_id(value.path)
            return value.model_copy(update={"revision": hub_commit(value)}) if is_read else value
        case Section():
            fields = {name: getattr(value, name) for name in type(value).model_fields}
            pinned = {name: _pinned(item) for name, item in fields.items()}
            changed = {name: item for name, item in pinned.items() if item is not fields[name]}
            return value.model_copy(update=changed) if changed else value
        case list():
            pinned_items = [_pinned(item) for item in value]
            unchanged = all(new is old for new, old in zip(pinned_items, value, strict=True))
            return value if unchanged else pinned_items
    return value


def _contents(settings: StageSettings) -> Iterator[_Content]:
    """Every file that the settings name, as it is now. Raises DataError."""
    for key, section in _sections(settings):
        match section:
            case DataSource():
                if section.weight > 0:
                    yield _Content(key, shown(section.path), content_digest(section))
            case ScoreFunction():
                yield _file_content(f"{key}.path", section.path)
            case PrepareConfig(tokenizer=Path() as directory):
                for name in TOKENIZER_FILES:
                    if name == TOKENIZER_FILES[0] or (directory / name).is_file():
                        yield _file_content(f"{key}.tokenizer.{name}", directory / name)
            case ModelConfig(chat_template=Path() as template):
                yield _file_content(f"{key}.chat_template", template)


def _file_content(key: str, path: Path) -> _Content:
    try:
        return _Content(key, shown(path), blake3.blake3(path.read_bytes()).hexdigest())
    except OSError as error:
        raise DataError(f"{path}: {key}: {error.strerror}; give the path of a readable file") from error


def _sections(value: Any, key: str = "") -> Iterator[tuple[str, Section]]:
    """Every section below `value`, with its dotted key, depth first."""
    if isinstance(value, Section):
        if key:
            yield key, value
        items: Any = ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return
    for name, item in items:
        yield from _sections(item, f"{key}.{name}" if key else str(name))
