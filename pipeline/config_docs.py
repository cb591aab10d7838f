"""docs/configuration.md, from the model tree: `python -m pipeline.config_docs` writes it, a test guards it.

Owns: the manual's form. Does not own: a word of its content about a setting, which stands beside the field.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.config_fields import bounds, choices, section_of
from pipeline.experiment import STAGE_FIELDS, ExperimentConfig
from pipeline.fitted_defaults import rule
from rollout.ground.section import Section, is_execution

PATH = Path(__file__).parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

One YAML file is one experiment. This page is generated from the models that read it
(`python -m pipeline.config_docs`); `rlhf schema` prints them as JSON Schema, for completion in an editor.

- **Build on another file** with `base: other.yaml`. Mappings merge key by key, lists are replaced.
  `pretrain: null` removes an inherited section; `pretrain:` with nothing after it is that section, with
  defaults.
- **Override on the command line** with `key=value`: `sft.lr=1e-4`, `sft.data.0.path=my.jsonl` (items count
  from 0; the next number adds one), `model.path=null`. Values are YAML.
- **Defaults** are those of a chain from scratch. Where a model is given (`model.path`, or somebody else's
  model as `--input`), settings marked *fitted* follow from its size and the device instead, unless they are
  stated; `null` takes back what a base states. `rlhf check` prints every value that was chosen, and why.
  [Sources](operations.md#defaults-for-a-given-model).
- **Scalars** follow YAML 1.2: `1e-5` is a number. There are no tags; anchors are fine.
- **Paths** in a file are relative to that file, on the command line to the working directory. `outputs` alone
  is always relative to the working directory.
- **A stage** is part of the run if it has a section.
- **Settings marked \u2020** do not change a result: changing one re-runs no stage.
- **A mistake** ends the command with exit code 2 and one line, such as
  `demo.yaml:12: sft.lrr: no such setting; did you mean 'lr'?`; a missing dataset with exit code 3. The names
  that TRL, transformers, axolotl, LLaMA-Factory, OpenRLHF, verl and vLLM have for a setting are known to it.
"""

TYPE_NAMES = {
    int: "integer",
    float: "number",
    bool: "`true`, `false`",
    str: "text",
    Path: "path",
    NoneType: "null",
}


def markdown() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_sections()]).rstrip() + "\n"


def _sections() -> Iterator[str]:
    yield from _table("Top level", "", ExperimentConfig)
    shared: dict[type[Section], list[str]] = {}
    for name, section in _inner(ExperimentConfig):
        yield from _table(f"`{name}`", section.__doc__ or "", section, stage=name)
        for inner_name, inner in _inner(section):
            where = "<stage>" if inner_name in STAGE_FIELDS else inner_name
            shared.setdefault(inner, []).append(f"{name}.{where}")
    for section, users in shared.items():
        title = ", ".join(f"`{user}`" for user in dict.fromkeys(users))
        yield from _table(title, section.__doc__ or "", section)


def _inner(section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    for name, field in section.model_fields.items():
        if (inner := section_of(field.annotation)) is not None:
            yield name + (".<i>" if get_origin(field.annotation) is list else ""), inner


def _table(title: str, about: str, section: type[Section], *, stage: str = "") -> Iterator[str]:
    yield f"## {title}\n"
    if about:
        yield f"{_sentence(about)}\n"
    yield "| key | type | default | bounds | what it does |"
    yield "|---|---|---|---|---|"
    for name, field in section.model_fields.items():
        if section is ExperimentConfig and section_of(field.annotation) is not None:
            continue  # has a heading of its own
        mark = " \u2020" if is_execution(field) else ""
        about = " ".join((field.description or "").split())
        default = _default(field) + _fitted(stage, name)
        cells = [_type(field), default, ", ".join(bounds(field)), about]
        yield f"| `{name}`{mark} | {' | '.join(map(_cell, cells))} |"
    yield ""


def _sentence(docstring: str) -> str:
    """A section's docstring on one line, without the key and dash that open it."""
    line = " ".join(docstring.split())
    if line.startswith("`") and "` - " in line:
        line = line.split("` - ", 1)[1]
    return line[:1].upper() + line[1:]


def _cell(text: str) -> str:
    """Text for a cell of a table; what is between backticks is not interpreted, but for the bar."""
    parts = text.replace("|", "\\|").split("`")
    parts[::2] = [part.replace("<", "&lt;").replace(">", "&gt;") for part in parts[::2]]
    return "`".join(parts)


def _type(field: FieldInfo) -> str:
    if options := choices(field.annotation):
        return ", ".join(f"`{'null' if option is None else option}`" for option in options)
    return _type_name(field.annotation)


def _type_name(annotation: Any) -> str:
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation]
    if get_origin(annotation) is list:
        return "list"
    if get_origin(annotation) is dict or section_of(annotation) is annotation:
        return "mapping"
    return " or ".join(_type_name(inner) for inner in get_args(annotation))


def _fitted(stage: str, name: str) -> str:
    """What takes the place of the default where a model is given."""
    fitted = rule(stage, name)
    return f"; fitted to a given model: {fitted}" if fitted is not None else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "its defaults"
    if value is None:
        return "none"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
    return "`" + text.replace("\n", "\\n") + "`"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(markdown(), encoding="utf-8")
    sys.stdout.write(f"{PATH}\n")
