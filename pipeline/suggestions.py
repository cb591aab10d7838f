"""What a user may have meant by a key that is no setting: the end of the line `no such setting; ...`.

    unknown key --> a word of another tool? (foreign_settings) --> a near spelling? --> a setting elsewhere?
                      `--> a section of another tool: the same for what stands in it

Owns: looking a key up, and the wording. Does not own: the words (foreign_settings), the settings (models).
"""

import difflib
import re
from collections.abc import Collection, Iterator

from pipeline.config_fields import has_setting, section_at, section_of
from pipeline.experiment import STAGE_FIELDS, ExperimentConfig
from pipeline.foreign_settings import GROUPS, MEANINGS, Meaning
from pipeline.yaml_source import KeyPath, Node, dotted

NUM_NAMED = 3
"""Settings that a line names, and entries of a section of another tool."""
STAGE = "<stage>"


def suggestion(path: KeyPath, tree: Node) -> str:
    """What follows `no such setting` for the unknown key at `path` of the config `tree`.

    Example: suggestion(("sft", "learning_rate"), tree) == "; did you mean 'lr'?"
    """
    node, stated = tree.nearest(path[:-1]).child(path[-1]), _stated_stages(tree)
    entries = [] if node is None or not isinstance(node.value, dict) else [*_entries(path, node, stated)]
    is_group = _word(path[-1]) in GROUPS.split()
    if is_group and entries:
        return f"; {', '.join(entries[:NUM_NAMED])}"
    if (meaning := _meaning(path)) is not None:
        return _worded(meaning, path, stated)
    if near := _elsewhere(path, stated) or (not is_group and _near(path)):
        return f"; did you mean {_listed(near)}?"
    if entries:
        return f"; {', '.join(entries[:NUM_NAMED])}"
    return "; docs/configuration.md lists them all"


def places_of(setting: str, path: KeyPath, stated: Collection[str]) -> list[str]:
    """How the line about a key at `path` names `setting` (from the root, `<stage>` for any that has it).

    Just its name in the section that it belongs to; else in the stages that the config has (`stated`), else
    in all.
    Example: places_of("<stage>.lr", ("lr",), {"sft", "ppo"}) == ["sft.lr", "ppo.lr"]
    """
    *above, name = setting.split(".")
    here = section_at(path[:-1])
    for stage in _stages_with(setting, STAGE_FIELDS):
        if here is not None and here is section_at(_keys([part.replace(STAGE, stage) for part in above])):
            return [name]
    if not above and len(path) > 1:
        return [f"{name}, at the left margin"]
    if STAGE not in setting:
        return [setting]
    chosen = _stages_with(setting, [str(path[0])] if path[0] in stated else [])
    chosen = chosen or _stages_with(setting, stated) or _stages_with(setting, STAGE_FIELDS)
    places = [setting.replace(STAGE, stage) for stage in chosen]
    return places if len(places) <= NUM_NAMED else [setting]


def _worded(meaning: Meaning, path: KeyPath, stated: Collection[str]) -> str:
    places = [place for setting in meaning.settings for place in places_of(setting, path, stated)]
    if not places:
        return f"; {meaning.note}"
    return f"; did you mean {_listed(places)}?" + (f" ({meaning.note})" if meaning.note else "")


def _meaning(path: KeyPath) -> Meaning | None:
    """Of the longest end of `path` that other tools have a word for."""
    words = [_word(key) for key in path if isinstance(key, str)]
    ends = (".".join(words[index:]) for index in range(len(words)))
    return next((MEANINGS[end] for end in ends if end in MEANINGS), None)


def _near(path: KeyPath) -> list[str]:
    """A setting of the same section that is spelled nearly so."""
    section = section_at(path[:-1])
    names = [] if section is None else list(section.model_fields)
    return difflib.get_close_matches(str(path[-1]).lower(), names, n=1, cutoff=0.7)


def _elsewhere(path: KeyPath, stated: Collection[str]) -> list[str]:
    """Where a setting of this name is, if the key is only at a wrong place."""
    key = str(path[-1])
    if key in ExperimentConfig.model_fields:
        return places_of(key, path, stated)
    if _stages_with(f"{STAGE}.{key}", STAGE_FIELDS):
        return places_of(f"{STAGE}.{key}", path, stated)
    if has_setting(of_data := (path[0], "data", 0, key)):
        return [dotted(of_data)]
    fields = ExperimentConfig.model_fields.items()
    sections = [(name, section) for name, field in fields if (section := section_of(field.annotation))]
    return [f"{name}.{key}" for name, section in sections if key in section.model_fields]


def _entries(path: KeyPath, node: Node, stated: Collection[str]) -> Iterator[str]:
    """What stands in a section that is none here, as far as it is known.

    Example: ["its 'n' is 'ppo.samples_per_prompt'"]
    """
    for below in _leaves(path, node):
        meaning = _meaning(below)
        settings = () if meaning is None else meaning.settings
        found = [place for setting in settings for place in places_of(setting, below, stated)]
        if not found and meaning is None:
            found = _elsewhere(below, stated)
        if found:
            yield f"its {dotted(below[len(path) :])!r} is {_listed(found)}"


def _leaves(path: KeyPath, node: Node) -> Iterator[KeyPath]:
    if not isinstance(node.value, dict):
        yield path
        return
    for key, child in node.value.items():
        yield from _leaves((*path, key), child)


def _stages_with(setting: str, stages: Collection[str]) -> list[str]:
    """Those of `stages` that have `setting`; for one that names no stage, any of them."""
    if STAGE not in setting:
        return list(stages)
    keys = setting.split(".")
    return [
        stage
        for stage in stages
        if stage in STAGE_FIELDS and has_setting(_keys([key.replace(STAGE, stage) for key in keys]))
    ]


def _stated_stages(tree: Node) -> list[str]:
    entries = tree.value if isinstance(tree.value, dict) else {}
    return [stage for stage in STAGE_FIELDS if stage in entries and entries[stage].value is not None]


def _keys(names: Collection[str]) -> KeyPath:
    return tuple(int(name) if name.isdigit() else name for name in names)


def _word(key: str | int) -> str:
    """As the table spells it. Example: _word("learning-rate") == _word("learningRate") == "learning_rate"."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", str(key))
    return split.strip("-_").replace("-", "_").lower()


def _listed(names: Collection[str]) -> str:
    return " or ".join(repr(name) for name in list(dict.fromkeys(names))[:NUM_NAMED])
