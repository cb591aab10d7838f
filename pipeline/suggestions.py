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
from pipeline.stage_table import STAGES
from pipeline.yaml_nodes import KeyPath, Node, dotted

NUM_NAMED = 3
"""Settings that a line names, and entries of a section of another tool."""
STAGE = "<stage>"
DATA = "data"
"""Setting of most stages that lists their datasets."""
TELL_NOTHING = ("path", "model", "name", "type")
"""Names of entries that mean something only with the section of another tool that they stand in."""


def suggestion(path: KeyPath, tree: Node) -> str:
    """What follows `no such setting` for the unknown key at `path` of the config `tree`.

    Example: suggestion(("sft", "learning_rate"), tree) == "; did you mean 'lr'?"
    """
    node, stated = tree.nearest(path[:-1]).child(path[-1]), _stated_stages(tree)
    entries = [] if node is None or not isinstance(node.value, dict) else [*_entries(path, node, stated)]
    is_group = _word(path[-1]) in GROUPS.split()
    if is_group and entries:
        return "; " + ", ".join(entries[:NUM_NAMED])
    if (meaning := _meaning(path)) is not None:
        return _worded(meaning, path, stated)
    if places := _elsewhere(path, stated):
        return _offered(places, path)
    if not is_group and (near := _near(path)):
        return f"; did you mean {_listed(near)}?"
    if entries:
        return "; " + ", ".join(entries[:NUM_NAMED])
    return "; docs/configuration.md lists them all"


def places_of(setting: str, path: KeyPath, stated: Collection[str]) -> list[str]:
    """How the line about a key at `path` names `setting` (from the root, `<stage>` for any that has it).

    Just its name in the section that it belongs to; else in the stages that the config has (`stated`), else
    in all. For a key of evaluate, data are its prompts.
    Example: places_of("<stage>.lr", ("lr",), {"sft", "ppo"}) == ["sft.lr", "ppo.lr"]
    """
    if (of_data := _data_field(path)) != DATA:
        setting = setting.replace(f"{STAGE}.{DATA}", f"{path[0]}.{of_data}")
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
    if not meaning.settings:
        return f"; {meaning.note}"
    places = [place for setting in meaning.settings for place in places_of(setting, path, stated)]
    return _offered(places, path) + _in_brackets(meaning.note)


def _offered(places: Collection[str], path: KeyPath) -> str:
    """Advice, or for a key of a stage whose only likenesses are settings of others, that they are."""
    others = {STAGE, *STAGE_FIELDS} - {path[0]}
    are_of_others = all("." in place and place.partition(".")[0] in others for place in places)
    if path[0] in STAGE_FIELDS and are_of_others:
        return f"; nothing like it in {path[0]}, only {_listed(places)}"
    return f"; did you mean {_listed(places)}?"


def _in_brackets(note: str) -> str:
    return f" ({note})" if note else ""


def _meaning(path: KeyPath) -> Meaning | None:
    """Of the longest end of `path` that other tools have a word for."""
    words = [_word(key) for key in path if isinstance(key, str)]
    ends = (".".join(words[index:]) for index in range(len(words)))
    return next((MEANINGS[end] for end in ends if end in MEANINGS), None)


def _data_field(path: KeyPath) -> str:
    """The setting that lists the datasets of the stage that a key belongs to."""
    stage = STAGES.get(str(path[0]))
    return DATA if stage is None or stage.data is None else stage.data.field


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
    in_data = (path[0], _data_field(path), 0, key)
    if has_setting(in_data):
        return [dotted(in_data)]
    fields = ExperimentConfig.model_fields.items()
    sections = [(name, section) for name, field in fields if (section := section_of(field.annotation))]
    return [f"{name}.{key}" for name, section in sections if key in section.model_fields]


def _entries(path: KeyPath, node: Node, stated: Collection[str]) -> Iterator[str]:
    """The known entries of a section that does not exist here; settings before notes.

    Example: ["its 'n' is 'ppo.samples_per_prompt'", "its 'shuffle': data is read once, ...; remove it"]
    """
    notes: dict[str, list[str]] = {}
    for below in _leaves(path, node):
        name = repr(dotted(below[len(path) :]))
        meaning = _meaning_of_entry(below)
        if meaning is not None and not meaning.settings:
            notes.setdefault(meaning.note, []).append(name)
            continue
        if meaning is not None:
            found = [place for setting in meaning.settings for place in places_of(setting, below, stated)]
        else:
            found = _spelled_out(below) or ([] if below[-1] in TELL_NOTHING else _elsewhere(below, stated))
        if found:
            yield f"its {name} is {_listed(found)}{_in_brackets('' if meaning is None else meaning.note)}"
    for note, names in notes.items():
        yield f"its {' and '.join(names[:NUM_NAMED])}: {note}"


def _meaning_of_entry(path: KeyPath) -> Meaning | None:
    """The meaning of the entry itself; if its name says nothing, that of the section it is in.

    Example: of `reward_model.path`, that of `reward_model`
    """
    if (meaning := _meaning(path)) is not None or path[-1] not in TELL_NOTHING:
        return meaning
    above = (_meaning(path[:length]) for length in range(len(path) - 1, 0, -1))
    return next((meaning for meaning in above if meaning is not None), None)


def _spelled_out(path: KeyPath) -> list[str]:
    """The setting that the end of `path` is, as it is written from the root.

    Example: _spelled_out(("actor_rollout_ref", "model", "path")) == ["model.path"]
    """
    ends = (path[start:] for start in range(1, len(path) - 1))
    return next(([dotted(end)] for end in ends if has_setting(end)), [])


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
