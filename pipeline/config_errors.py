"""How an error of the config models is worded: one line - where, what, how to fix it.

    pydantic's error + the tree with positions --explained--> `demo.yaml:12: sft.lrr: no such setting; ...`

Owns: the one line of every invalid setting. Does not own: the settings (experiment, stages.config), positions
(yaml_source), validation itself (config), what an unknown key may mean (suggestions).
"""

import re

from pydantic_core import ErrorDetails

from pipeline.config_fields import bounds, choices, field_at
from pipeline.errors import ConfigError
from pipeline.foreign_settings import NAMES_A_MODEL
from pipeline.suggestions import suggestion
from pipeline.yaml_nodes import KeyPath, Node, describe, dotted, short

WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "dict": "a group of settings",
    "model": "a group of settings",
}
"""First word of pydantic's error type -> what it expected."""


def explained(error: ErrorDetails, tree: Node) -> ConfigError:
    """Pydantic's error as one line, at the position of the key it is about."""
    path = error["loc"]
    if error["type"] != "value_error":
        node = tree.nearest(path)
        return ConfigError(f"{node.origin.label}: {dotted(path)}: {_reason(error, tree)}")
    message = error["msg"].removeprefix("Value error, ")
    named: list[KeyPath]
    if path:  # a check within a section: the message names its fields
        named = [(*path, word) for word in re.findall(r"\w+", message)]
        message = f"{dotted(path)}: {message}"
    else:  # a check across sections: the message starts with the key it blames
        named = [tuple(word.split(".")) for word in re.findall(r"^\w+(?:\.\w+)*|\w+(?:\.\w+)+", message)]
    blamed = tree.nearest(next((key for key in named if _is_stated(key, tree)), path or named[0]))
    return ConfigError(f"{blamed.origin.label}: {short(message, 400)}")


def _reason(error: ErrorDetails, tree: Node) -> str:
    """What is wrong, and what would be right."""
    kind, path = error["type"], error["loc"]
    node = tree.nearest(path)
    got = describe(node)
    if kind == "extra_forbidden":
        return "no such setting" + suggestion(path, tree)
    field = field_at(path)
    if kind == "missing":
        about = f" ({' '.join(field.description.split())})" if field is not None and field.description else ""
        return f"missing; add `{path[-1]}:`{about}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if field is not None and kind.startswith(("greater_", "less_", "too_long", "string_too_long")):
        return f"{got} is out of range; must be {' and '.join(bounds(field))}"
    if field is not None and kind == "literal_error":
        allowed = ["null" if choice is None else repr(choice) for choice in choices(field.annotation)]
        return f"must be {' or '.join(allowed)}, not {got}"
    if kind == "int_parsing_size":
        return f"{got} does not fit into 64 bits"
    if kind == "list_type" and isinstance(node.value, dict):
        return "must be a list; start each item with '- '"
    if kind == "model_type" and isinstance(node.value, str) and dotted(path) in NAMES_A_MODEL:
        return f"must be a group of settings, not {got}; did you mean 'model.path'?"
    wanted = WANTED.get(kind.split("_")[0])
    return f"must be {wanted}, not {got}" if wanted else short(error["msg"], 200)


def _is_stated(path: KeyPath, tree: Node) -> bool:
    """Whether `path` names a setting that the config states."""
    return field_at(path) is not None and tree.nearest(path[:-1]).child(path[-1]) is not None
