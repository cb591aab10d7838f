"""Does RECIPE_VERSION still tell the truth? A digest of the first-party code behind each recipe, locked.

    stages/ppo.py --imports, transitively--> syntax trees without docstrings --blake3--> recipe_versions.json

A change of meaning without a new RECIPE_VERSION would reuse artifacts of the old code. `make recipe-lock`
rewrites the lock; it refuses to where the code changed and the version did not, unless told that no result
changes (FORCE=1).
"""

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from blake3 import blake3

from pipeline import identity, stage_table

ROOT = Path(__file__).parents[1]
LOCK = Path(__file__).with_name("recipe_versions.json")
FIRST_PARTY = ("stages", "rollout")
LOADED_BY_NAME: Mapping[str, tuple[str, ...]] = {
    "rollout.vllm_engine": ("rollout.vllm_plugin", "rollout.vllm_receiver")
}
"""Modules that vLLM imports in its own processes, through the entry point of pyproject.toml."""


def current(root: Path = ROOT) -> dict[str, dict[str, int | str]]:
    """Stage -> recipe version and code digest, as the source is now."""
    return {
        name: {
            "version": identity.recipe_version(stage.recipe.entry),
            "digest": code_digest(stage.recipe.entry, root),
        }
        for name, stage in stage_table.STAGES.items()
    }


def code_digest(entry: str, root: Path) -> str:
    """Digest of the meaning of a recipe's code and of everything first-party that it imports."""
    modules: dict[str, str] = {}
    waiting = [entry.partition(":")[0]]
    while waiting:
        module = waiting.pop()
        path = _source(module, root)
        if module in modules or path is None:
            continue
        modules[module], imported = _read(path.read_text(), is_config=is_config(path))
        waiting += [*imported, *LOADED_BY_NAME.get(module, ())]
    return blake3(json.dumps(sorted(modules.items())).encode()).hexdigest()[:32]


def is_config(path: Path) -> bool:
    """Whether a file states settings: a module `config`, or one of a package of that name."""
    return "config" in {path.stem, path.parent.name}


def stale(locked: Mapping[str, Mapping[str, int | str]]) -> list[str]:
    """Stages whose code changed while their version did not."""
    return [
        stage
        for stage, now in current().items()
        if stage in locked and locked[stage]["version"] == now["version"] and locked[stage] != now
    ]


def read_lock() -> dict[str, dict[str, int | str]]:
    """The committed lock; empty before the first one."""
    lock: dict[str, dict[str, int | str]] = json.loads(LOCK.read_text()) if LOCK.exists() else {}
    return lock


def main(arguments: list[str]) -> int:
    """Rewrite the lock; the exit code."""
    changed = stale(read_lock())
    if changed and "--force" not in arguments:
        print(
            f"code behind {', '.join(changed)} changed: raise RECIPE_VERSION in stages/<stage>.py where "
            "results change, then run this again; with FORCE=1 if none does",
            file=sys.stderr,
        )
        return 1
    LOCK.write_text(json.dumps(current(), indent=2) + "\n")
    print(f"{LOCK.relative_to(ROOT)}: written")
    return 0


def _source(module: str, root: Path) -> Path | None:
    if module.partition(".")[0] not in FIRST_PARTY:
        return None
    path = root / Path(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache  # recipes share most of their code
def _read(source: str, *, is_config: bool) -> tuple[str, tuple[str, ...]]:
    """What the digest covers of a file, and the names that it imports."""
    tree = ast.parse(source)
    imported = tuple(_imports(tree))
    return _meaning(tree, is_config=is_config), imported


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)


def _meaning(tree: ast.Module, *, is_config: bool) -> str:
    """The tree without docstrings; of a config only its properties: stated values are in the fingerprint."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [item for item in body if not _is_text(item)]  # type: ignore[attr-defined]  # has a body
    if is_config:
        properties = [
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _is_property(node)
        ]
        return "\n".join(ast.dump(node) for node in properties)
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
    return False


def _is_property(function: ast.FunctionDef) -> bool:
    return any(isinstance(item, ast.Name) and item.id == "property" for item in function.decorator_list)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
