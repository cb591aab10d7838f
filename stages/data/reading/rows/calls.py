"""Calls: the tools of a row and an assistant's calls of them, in the forms of any tool -> OpenAI's.

    tools | functions: list, one object, JSON text --tools_of--> ({type: function, function: {name, …}}, ...)
    tool_calls | function_call --calls_of--> ({type: function, function: {name, arguments: {…}}}, ...)

Owns these forms. Does not own which turn may call (turns) nor how a template writes a call (chat). In an
Arrow table every object has the keys of all objects of its column, null where it lacks them: there a key that
is null is left out. In JSON a null is a value like any other. Light import.
"""

import json
from collections.abc import Mapping
from typing import Any

from stages.data.reading.records import Tools
from stages.data.reading.rows.cells import Cells, RowError, as_text, unlike, unpacked
from stages.data.reading.rows.wording import described, listed, shortened

TOOLS = {"tools": ("tools", "functions")}
"""The field of what an assistant may call -> the columns looked for."""
CALL_KEYS = ("tool_calls", "function_call")
"""Keys of a message that hold its calls: OpenAI's, and OpenAI's before tools."""
_CALL = "a call {name, arguments}"
_TOOL = "a tool {type: function, function: {name, description, parameters}}"


def tools_of(cells: Cells) -> Tools:
    """What the row says its assistant may call. Raises RowError."""
    found = _tool_columns(cells)
    if len(found) > 1:
        raise RowError(f"{found[1][0]}: beside {found[0][0]}; keep one of them")
    return _as_tools(*found[0], cells) if found else ()


def tool_columns(cells: Cells) -> list[str]:
    """The columns that hold tools, sound or not."""
    return [column for column, _ in _tool_columns(cells)]


def _tool_columns(cells: Cells) -> list[tuple[str, Any]]:
    if not cells.has_field("tools"):
        return []
    if cells.is_renamed("tools"):
        columns = [cells.required("tools")]
    else:  # the older name is a common word: a text there is a column like any other
        known = [(column, cells.row[column]) for column in cells.columns_of("tools")]
        columns = [(name, value) for name, value in known if name == "tools" or not _is_plain_text(value)]
    return [(column, value) for column, value in columns if not _is_empty(value)]


def _is_plain_text(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] not in ("[", "{")


def _is_empty(value: Any) -> bool:
    found = unpacked(value)
    return found is None or found in ([], {}) or (isinstance(found, str) and found.strip() in ("", "null"))


def _as_tools(name: str, value: Any, cells: Cells) -> Tools:
    found = _read(value, cells)
    if isinstance(found, Mapping):
        return (_as_tool(found, name, cells),)
    if not isinstance(found, list):
        raise unlike(found, name, "tools as a list of JSON Schema functions, or its JSON text")
    return tuple(_as_tool(_read(tool, cells), f"{name}[{index}]", cells) for index, tool in enumerate(found))


def _as_tool(tool: Any, name: str, cells: Cells) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise unlike(tool, name, _TOOL)
    if "type" in tool and tool["type"] != "function":
        kind = tool["type"]
        raise _no_function(kind, name)
    function, inner = tool, name
    if "function" in tool:
        function, inner = _read(tool["function"], cells), f"{name}.function"
    if not isinstance(function, Mapping) or "name" not in function:
        if isinstance(function, Mapping):
            raise RowError(f"{inner}.name: missing; keys are {listed(function)}")
        raise unlike(function, inner, "a function {name, description, parameters}")
    _name_of(function, inner)
    whole = {key: value for key, value in function.items() if function is not tool or key != "type"}
    if "input_schema" in whole and "parameters" not in whole:
        raise RowError(f"{inner}.input_schema: not read; rename it parameters")
    if "parameters" in whole:
        whole["parameters"] = _object_of(whole["parameters"], f"{inner}.parameters", "a JSON Schema", cells)
    return {"type": "function", "function": _sound(whole, inner)}


def calls_of(message: Mapping[str, Any], name: str, cells: Cells) -> tuple[Mapping[str, Any], ...]:
    """The calls of a message under any of CALL_KEYS. Raises RowError."""
    found = [key for key in CALL_KEYS if key in message and not _is_empty(message[key])]
    if len(found) > 1:
        raise RowError(f"{name}.{found[1]}: beside {found[0]}; keep one of them")
    return () if not found else as_calls(message[found[0]], f"{name}.{found[0]}", cells)


def as_calls(value: Any, name: str, cells: Cells) -> tuple[Mapping[str, Any], ...]:
    """A call, a list of calls, or the JSON text of either. Raises RowError."""
    found = _read(value, cells)
    if isinstance(found, Mapping):
        return (_as_call(found, name, cells),)
    if not isinstance(found, list) or not found:
        raise unlike(found, name, f"{_CALL}, or a list of them")
    return tuple(_as_call(_read(call, cells), f"{name}[{index}]", cells) for index, call in enumerate(found))


def _as_call(call: Any, name: str, cells: Cells) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise unlike(call, name, _CALL)
    if "type" in call and call["type"] not in (None, "function"):
        kind = call["type"]
        raise _no_function(kind, name)
    function, inner = call, name
    if "function" in call:
        function, inner = _read(call["function"], cells), f"{name}.function"
        if not isinstance(function, Mapping):
            raise unlike(function, inner, _CALL)
    others = [key for key in function if key not in ("name", "arguments", "id", "type", "index")]
    if "name" not in function or ("arguments" not in function and others):
        key = "arguments" if "name" in function else "name"
        raise RowError(f"{inner}.{key}: missing; keys are {listed(function)}")
    read: dict[str, Any] = {
        "type": "function",
        "function": {
            "name": _name_of(function, inner),
            "arguments": _arguments_of(function, f"{inner}.arguments", cells),
        },
    }
    if "id" in call and call["id"] is not None:
        read = {"id": as_text(call["id"], f"{name}.id"), **read}
    return read


def _arguments_of(function: Mapping[str, Any], name: str, cells: Cells) -> Mapping[str, Any]:
    return _object_of(function["arguments"], name, "an object", cells) if "arguments" in function else {}


def _no_function(kind: Any, name: str) -> RowError:
    shown = shortened(kind) if isinstance(kind, str) else described(kind)
    return RowError(f"{name}.type: only functions are read, not {shown}")


def _name_of(function: Mapping[str, Any], name: str) -> str:
    text = as_text(function["name"], f"{name}.name")
    if not text.strip():
        raise RowError(f"{name}.name: empty")
    return text


def _object_of(value: Any, name: str, what: str, cells: Cells) -> Mapping[str, Any]:
    """An object, its JSON text, or null for an empty one."""
    found = _read(value, cells)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise unlike(found, name, f"{what}, or its JSON text")
    return _sound(found, name)


def _sound(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object whose text UTF-8 can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError(f"{name}: half a surrogate pair in it; it is no text") from None
    except RecursionError:
        raise RowError(f"{name}: nested too deeply") from None
    return value


def _read(value: Any, cells: Cells) -> Any:
    """The value that a cell or key holds, itself or as JSON text, without what an Arrow table pads."""
    return unpacked(value) if isinstance(value, str) else _without_nulls(value) if cells.is_padded else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
