"""The user's scoring function: the one piece of code a config may name.

    {type: python, path: score.py, function: score} --load_judge--> judge(prompt, response, row) -> scores

Owns: importing it from its file and checking what it returns. Light import.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.config.score import ScoreFunction
from stages.errors import DataError

PART_NAME = re.compile(r"[\w.-]{1,64}")
"""Parts become names of metrics."""

Judge = Callable[[str, str, Mapping[str, Any]], dict[str, float]]


def load_judge(config: ScoreFunction, *, key: str) -> Judge:
    """The function of `config`, wrapped so that it always gives `score` in [0, 1] and numeric components.

    Raises DataError when the file or the function is not there, when it raises, or when it returns something
    else.
    """
    where = f"{config.path}: {config.function}"
    spec = importlib.util.spec_from_file_location("user_score", config.path)
    if spec is None or spec.loader is None or not config.path.is_file():
        raise DataError(f"{config.path}: no such Python file; set {key}.path")
    module = importlib.util.module_from_spec(spec)
    _guarded(where, spec.loader.exec_module, module, beside=config.path.parent)
    if config.function not in vars(module):
        raise DataError(f"{where}: no such function in it; set {key}.function")
    function = vars(module)[config.function]

    names: set[str] = set()  # of the first result: every later one has the same parts

    def judge(prompt: str, response: str, row: Mapping[str, Any]) -> dict[str, float]:
        parts = _checked(where, _guarded(where, function, prompt, response, row, beside=config.path.parent))
        names.update(parts if not names else ())
        if parts.keys() != names:
            odd = ", ".join(sorted(names ^ parts.keys()))
            raise DataError(
                f"{where}: {odd}: in some results and not in others; always return the same parts"
            )
        return parts

    return judge


def _guarded(where: str, function: Callable[..., Any], *arguments: Any, beside: Path) -> Any:
    """Call the user's code; whatever it raises is the user's to mend, in one line."""
    try:
        return function(*arguments)
    except Exception as error:  # the one boundary to code that is not ours
        hint = _hint(error, beside)
        raise DataError(f"{where}: raised {type(error).__name__}: {error}{hint}") from error


def _hint(error: Exception, beside: Path) -> str:
    """For an import of what lies beside the user's file: nothing is imported from there."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if name is None or not ((beside / f"{name}.py").is_file() or (beside / name).is_dir()):
        return ""
    return (
        f"; {name} lies beside it, and modules are not looked for there: write one file, or put {beside} "
        "on PYTHONPATH (a change of what is imported makes no stage anew)"
    )


def _checked(where: str, result: Any) -> dict[str, float]:
    parts = dict(result) if isinstance(result, Mapping) else {"score": result}
    if "score" not in parts:
        raise DataError(f"{where}: returned no 'score', only {', '.join(map(str, parts))}")
    for name, value in parts.items():
        if not isinstance(name, str) or not PART_NAME.fullmatch(name):
            raise DataError(f"{where}: a part is called {name!r}; use letters, digits, '.', '_' and '-'")
        if isinstance(value, str) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{where}: {name} is {value!r}; return finite numbers")
    if not 0 <= parts["score"] <= 1:
        raise DataError(f"{where}: score is {parts['score']!r}; return a number in [0, 1]")
    return {name: float(value) for name, value in parts.items()}
