"""Identity: what names an artifact. The settings its recipe may read, what their files hold, and its inputs.

    Selection --plan--> {stage: Node(settings, inputs, contents, fingerprint)} --check_contents--> still so?

Owns: fingerprints, the digests of files that settings name, which settings a recipe gets. Does not own: edges
(dag), what a row means (stages.data), artifacts on the disk (artifacts). Imports no torch and no recipe.
"""

import ast
import importlib.util
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import blake3

from pipeline.dag import Selection
from pipeline.experiment import ExperimentConfig
from pipeline.stage_table import STAGES, Recipe, Stage
from rollout.ground.section import Section, sections_in
from stages.config.data import DataSource
from stages.config.stage import StageSettings
from stages.data.reading.files import shown
from stages.data.reading.hub import hub_commit, is_hub_id
from stages.data.reading.readers import content_digest, files_of
from stages.errors import DataError

SCHEMA_VERSION = 2
"""Of artifacts and fingerprints: a bump makes every artifact of an older version unknown."""
FINGERPRINT_CHARS = 16
Stamp = tuple[tuple[int, int, int], ...]
"""Of each of some files its size, and when its content and its entry changed (ns). Nobody sets the last."""
CHANGED = "changed since the run was planned; run the same command again"
"""What is wrong with a file or a directory that a stage was planned on and found otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One stage of a planned run, with everything that identifies its artifact."""

    stage: str
    recipe: Recipe
    settings: StageSettings
    recipe_version: int
    inputs: Mapping[str, str]  # input key -> fingerprint
    roles: Mapping[str, str]  # what the recipe calls an input -> its key
    contents: Mapping[str, str]  # dotted key of a file the settings name -> digest of its content
    stamps: Mapping[str, Stamp]  # of the same keys, as they were when the digests were taken
    fingerprint: str


class _Content(NamedTuple):
    """A file that the settings name, or a source of several."""

    key: str  # dotted
    path: str
    files: tuple[Path, ...]  # none of a hub dataset: its commit says all
    digest: Callable[[], str]  # of what it holds now; DataError

    def stamp(self) -> Stamp:
        """Size and times of each file. A file that is not there has none; its digest says so."""
        stats = (file.stat() for file in self.files if file.exists())
        return tuple((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def plan(config: ExperimentConfig, selection: Selection, outside: Mapping[str, str]) -> dict[str, Node]:
    """The selected stages with their fingerprints, in the order of STAGES.

    `outside` gives the fingerprint of every key of `selection.outside`. Reads the datasets (digests); raises
    DataError when one is missing.
    """
    known = dict(outside)
    nodes: dict[str, Node] = {}
    for stage in selection.stages:
        needs = STAGES[stage].needs(config, selection.outside)
        inputs = {need.key: known[need.key] for need in needs}
        roles = {need.role: need.key for need in needs}
        nodes[stage] = node = _node(STAGES[stage], _pinned(settings_for(config, stage)), inputs, roles)
        known[stage] = node.fingerprint
    return nodes


def check_contents(node: Node, *, trusting_stamps: bool = False) -> None:
    """Read the files that the node's settings name again. Raises DataError naming what is no longer what was
    planned.

    `trusting_stamps`: a file whose size and times are those of the plan is not read. A stage that has yet to
    read its files needs no more: it asks for every byte once it has read them.
    """
    now = {content.key: content for content in _contents(node.settings)}
    for key, content in now.items():
        if trusting_stamps and key in node.stamps and content.stamp() == node.stamps[key]:
            continue
        if content.digest() != node.contents.get(key):
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
    also_reads = STAGES[stage].also_reads
    for path, section in sections_in(settings_for(config, stage)):
        if isinstance(section, DataSource) and section.weight > 0:
            name, *place = map(str, path)
            yield ".".join([also_reads.get(name, name), *place]), section


def datasets(config: ExperimentConfig, stages: Collection[str]) -> dict[str, dict[str, DataSource]]:
    """The `data_sources` of all `stages`, each once, by the stage as which they are read, in that order."""
    sources = {key: source for stage in stages for key, source in data_sources(config, stage)}
    return {
        stage: {key: source for key, source in sources.items() if key.startswith(f"{stage}.")}
        for stage in STAGES
        if any(key.startswith(f"{stage}.") for key in sources)
    }


def directory_name(stage: str, fingerprint: str) -> str:
    """Name of an artifact's directory, of its unfinished work and of its lock."""
    return f"{stage}-{fingerprint}"


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


def _node(stage: Stage, settings: StageSettings, inputs: Mapping[str, str], roles: Mapping[str, str]) -> Node:
    version = recipe_version(stage.recipe.entry)
    named = list(_contents(settings))
    stamps = {content.key: content.stamp() for content in named}  # before the digests: they are as old
    contents = {content.key: content.digest() for content in named}
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
        recipe=stage.recipe,
        settings=settings,
        recipe_version=version,
        inputs=inputs,
        roles=roles,
        contents=contents,
        stamps=stamps,
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
        case dict():
            pinned_values = {key: _pinned(item) for key, item in value.items()}
            unchanged = all(pinned_values[key] is item for key, item in value.items())
            return value if unchanged else pinned_values
    return value


def _contents(settings: StageSettings) -> Iterator[_Content]:
    """Every file that the settings name. Raises DataError."""
    for path, section in sections_in(settings):
        key = ".".join(map(str, path))
        if isinstance(section, DataSource) and section.weight > 0:
            files = () if is_hub_id(section.path) else files_of(section)
            yield _Content(key, shown(section.path), files, partial(content_digest, section))
        for inner, place, counted in section.files():
            name = ".".join(map(str, (*path, *inner)))
            if not counted:
                yield _file_content(name, place)
            for file in counted:
                if file == counted[0] or (place / file).is_file():
                    yield _file_content(f"{name}.{file}", place / file)


def _file_content(key: str, path: Path) -> _Content:
    return _Content(key, shown(path), (path,), partial(_file_digest, key, path))


def _file_digest(key: str, path: Path) -> str:
    try:
        return blake3.blake3(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {key}: {error.strerror}; give the path of a readable file") from error
