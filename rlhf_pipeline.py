"""Where this project's processes start. Nobody else's module has this name; many have a `pipeline`.

    rlhf --> main() --------------------> text_is_utf_8(), own_packages_first() --> pipeline.cli
    python -m pipeline.cli --> pipeline --^      `--environment--> every process that the command starts

Owns: that `pipeline`, `stages` and `rollout` are the ones beside this file, in this process and in those that
inherit its environment, that none of these looks for modules in the directory it was started in, and that
files are UTF-8. Imports the standard library only: nothing of ours is safe to import before.
"""

import codecs
import locale
import os
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent)
PACKAGES = ("pipeline", "stages", "rollout")
DEPENDENCIES = (
    "torch", "transformers", "tokenizers", "huggingface_hub", "datasets", "pyarrow", "numpy", "peft",
    "safetensors", "ray", "vllm", "pydantic", "typer", "rich", "yaml", "jinja2", "blake3", "filelock",
    "psutil", "py3langid", "rensa",
)  # fmt: skip
"""What the packages import, by module."""
ENVIRONMENT_PROBLEM = 4
STARTED_AS_MODULE = ("-m", "-c")
"""What `sys.argv[0]` is while Python looks for a module to run, or runs a text: `sys.path[0]` is here."""


def main() -> None:
    """Entry point of the console script."""
    text_is_utf_8()
    own_packages_first()
    from pipeline.cli import main as command

    command()


def text_is_utf_8() -> None:
    """In a locale that is not UTF-8 this process starts itself again in Python's UTF-8 mode: files are UTF-8,
    whatever the terminal is. Outputs keep their encoding; what that lacks is no error in children either.
    """
    if sys.stdout is not None:
        os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:backslashreplace"
    if not sys.flags.utf8_mode and codecs.lookup(locale.getencoding()).name != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def own_packages_first() -> None:
    """From now on nobody else's `pipeline`, `stages` or `rollout` is imported, here and in children.

    Leaves the order of `sys.path` alone where this project is installed among other packages and nothing
    is in the way. Exits with code 4 and one line where that cannot be had: such a module is loaded, or
    one on PYTHONPATH stands in for a package that ours import.
    """
    _end_with(*_loaded_from_elsewhere(), *_in_place_of_dependencies())
    if not sys.flags.safe_path and sys.argv[0] in STARTED_AS_MODULE:
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"  # else `python -c` and `-m` look into it in children as well
    if sysconfig.get_path("purelib") != ROOT or any(map(_in_the_way, PACKAGES)):
        sys.path[:] = [ROOT, *(entry for entry in sys.path if entry != ROOT)]
        os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *_others_on_path()])


def _end_with(*problems: str) -> None:
    for problem in problems:
        print(problem, file=sys.stderr)
        sys.exit(ENVIRONMENT_PROBLEM)


def _others_on_path() -> list[str]:
    """PYTHONPATH without us, and without the working directory as which Python reads an empty entry."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [entry for entry in entries if entry not in ("", ROOT)]


def _loaded_from_elsewhere() -> Iterator[str]:
    """A line for each module that was imported by the name of one of our packages and is somebody else's."""
    for name in PACKAGES:
        module = sys.modules.get(name)
        places = list(getattr(module, "__path__", ())) or [
            str(getattr(module, "__file__", "a built-in module"))
        ]
        if module is not None and Path(ROOT, name) not in [Path(place).resolve() for place in places]:
            yield (
                f"{places[0]}: was imported as `{name}`, which is a package of rlhf; rename it, take its "
                "directory off PYTHONPATH, or start with the command `rlhf`"
            )


def _in_place_of_dependencies() -> Iterator[str]:
    """Modules of the user's, not packages that are installed there: those have their metadata beside them."""
    for entry in _others_on_path():
        for name in DEPENDENCIES:
            for module in (Path(entry, f"{name}.py"), Path(entry, name, "__init__.py")):
                if module.is_file() and not any(Path(entry).glob("*-info")):
                    yield (
                        f"{module}: would be imported in place of the package `{name}`; rename it, or "
                        f"take {entry} off PYTHONPATH"
                    )


def _in_the_way(name: str) -> bool:
    """Whether another module of this name is found first. A directory without `__init__.py` counts too."""
    found = PathFinder.find_spec(name, sys.path)
    return found is not None and found.origin != os.path.join(ROOT, name, "__init__.py")


if getattr(sys.modules["__main__"].__spec__, "name", "").startswith("pipeline."):
    # `python -m pipeline.cli` beside a `pipeline/`: an editable install finds our cli below theirs
    _end_with(*_loaded_from_elsewhere())

if __name__ == "__main__":
    main()
