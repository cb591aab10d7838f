"""What differs between a run's last config and the one it is given now: what a person has to know to resume.

    runs/<name>/config.yaml --last_config--> before --.
                    the config of this command: now --`--identity_of, compare--> [Change] --listed--> one line

Owns: which settings count, how they are compared and worded, which stages they reach. Does not own: whether
a run may go on with them (cli). Counted is what fingerprints cover: paths, intervals, workers and deadlines
are no change.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import dag
from pipeline.config import load
from pipeline.experiment import ExperimentConfig
from pipeline.stage_table import STAGES
from pipeline.yaml_nodes import short

NUM_NAMED = 5
"""Changes that the line names before it only counts them."""
VALUE_CHARS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One setting that is not what it was.

    Example: str(Change(key="sft.lr", before=0.001, now=0.002)) == "sft.lr 0.001 -> 0.002"
    """

    key: str  # dotted
    before: Any  # ABSENT, or plain JSON
    now: Any

    def __str__(self) -> str:
        if self.before is ABSENT or self.now is ABSENT:
            return f"{self.key} {'added' if self.before is ABSENT else 'removed'}"
        return f"{self.key} {_shown(self.before)} -> {_shown(self.now)}"


class _Absent:
    """The value of a setting that one of the two configs does not have."""


ABSENT = _Absent()


def last_config(path: Path) -> ExperimentConfig | None:
    """The resolved config that a run left in the file `path`; None when there is no such file.

    Raises ConfigError when it is no config of this version.
    """
    return load(path).config if path.is_file() else None


def between(before: ExperimentConfig, now: ExperimentConfig) -> list[Change]:
    """The settings that can change a result and are not what they were."""
    return compare(identity_of(before), identity_of(now))


def reached(before: ExperimentConfig, now: ExperimentConfig) -> frozenset[str]:
    """The stages of `now` whose own settings or inputs changed, and every stage that needs one of them."""
    changed = [stage for stage in dag.configured(now) if not _same_stage(before, now, stage)]
    return frozenset(other for stage in changed for other in dag.downstream(now, stage))


def identity_of(config: ExperimentConfig) -> dict[str, Any]:
    """The settings of `config` that the fingerprint of one of its stages covers, as plain JSON types.

    Example: {"seed": 0, "model": {"context_length": 256}, "prepare": {...}}
    """
    identity: dict[str, Any] = {}
    for stage in dag.configured(config):
        for section, value in config.settings_of(stage).identity().items():
            if section in STAGES[stage].also_reads:
                continue  # it belongs to another section
            if isinstance(value, dict):
                value = identity.get(section, {}) | value  # prepare reads a part of `model:`, others all
            identity[section] = value
    return identity


def compare(before: Any, now: Any, key: str = "") -> list[Change]:
    """The outermost keys at which two trees of plain JSON differ, in the order of `before`.

    Example: compare({"a": 1, "b": [1]}, {"a": 1, "b": [1, 2]}) == [Change(key="b.1", before=ABSENT, now=2)]
    """
    if type(before) is type(now) and isinstance(before, dict | list):
        children = ((f"{key}.{name}" if key else name, *pair) for name, *pair in _pairs(before, now))
        return [change for name, left, right in children for change in compare(left, right, name)]
    return [] if before == now else [Change(key=key, before=before, now=now)]


def listed(changes: Sequence[Change]) -> str:
    """The first few changes and a count of the others. Example: "sft.lr 0.001 -> 0.002; seed 0 -> 1"."""
    more = f"; and {len(changes) - NUM_NAMED} more" if len(changes) > NUM_NAMED else ""
    return "; ".join(map(str, changes[:NUM_NAMED])) + more


def _same_stage(before: ExperimentConfig, now: ExperimentConfig, stage: str) -> bool:
    if stage not in dag.configured(before) or dag.needs(before, stage) != dag.needs(now, stage):
        return False
    return before.settings_of(stage).identity() == now.settings_of(stage).identity()


def _pairs(before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Child key, and its value on either side."""
    left, right = _children(before), _children(now)
    for name in dict.fromkeys((*left, *right)):
        yield name, left.get(name, ABSENT), right.get(name, ABSENT)


def _children(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {str(index): item for index, item in enumerate(value)}


def _shown(value: Any) -> str:
    return short(value if isinstance(value, str) else json.dumps(value), VALUE_CHARS)
