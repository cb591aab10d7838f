"""The import rules of DESIGN.md: who may import whom, and what has to import lightly."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import recipe_lock

from stages.training.metrics import METRICS

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "stages", "rollout")
RECIPES = {"prepare", "pretrain", "sft", "reward", "ppo", "evaluate"}
MAY_IMPORT_RAY = {
    "pipeline/executor.py",
    "pipeline/ray_session.py",
    "stages/training/distributed.py",
    "stages/rl/source.py",
    "stages/prepare.py",
    "rollout/pool.py",
}
HEAVY = {"torch", "ray", "transformers", "vllm", "datasets"}
LIGHT_MODULES = (
    "rollout.config",
    "rollout.errors",
    "rollout.api",
    "rollout.ground.section",
    "rollout.ground.errors",
    "rollout.ground.durable",
    "stages.errors",
    "stages.runtime",
    "stages.data.reading.readers",
    "pipeline.config",
    "pipeline.suggestions",
    "pipeline.fitted_defaults",
    "pipeline.unstated",
    "pipeline.experiment",
    "pipeline.stage_table",
    "pipeline.dag",
    "pipeline.identity",
    "pipeline.headline",
    "pipeline.artifacts",
    "pipeline.planning",
    "pipeline.stage_task",
    "pipeline.ray_session",
    "pipeline.executor",
    "pipeline.janitor",
    "pipeline.signals",
    "pipeline.supervisor",
    "pipeline.progress",
    "pipeline.report",
    "pipeline.doctor",
    "pipeline.cli",
)
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
CONFIG_MODULES = tuple(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if recipe_lock.is_config(path)
)


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                raise AssertionError(f"{path}:{node.lineno}: a relative import; write the whole name")


def packages_of(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_arrows_point_from_pipeline_to_stages_to_rollout(path: Path):
    package, imported = path.relative_to(ROOT).parts[0], packages_of(path)
    above = PACKAGES[: PACKAGES.index(package)]
    assert not imported.intersection(above), f"{package} must not import {imported.intersection(above)}"
    assert "tests" not in imported


def test_recipes_never_import_each_other():
    for recipe in RECIPES:
        others = {f"stages.{other}" for other in RECIPES - {recipe}}
        assert not others.intersection(imports(ROOT / "stages" / f"{recipe}.py")), recipe


def test_nothing_but_the_stage_table_knows_the_recipes():
    for path in FILES:
        if path.relative_to(ROOT) not in {Path("stages") / f"{recipe}.py" for recipe in RECIPES}:
            known = {f"stages.{recipe}" for recipe in RECIPES}.intersection(imports(path))
            assert not known, f"{path}: imports {known}"


def test_objectives_import_torch_and_the_standard_library_only():
    for path in (ROOT / "stages/objectives").glob("*.py"):
        for name in imports(path):
            package = name.partition(".")[0]
            allowed = package == "torch" or package in sys.stdlib_module_names
            assert allowed or name.startswith("stages.objectives"), f"{path}: {name}"


def test_ray_is_imported_in_six_files_only():
    users = {str(path.relative_to(ROOT)) for path in FILES if "ray" in packages_of(path)}
    assert users <= MAY_IMPORT_RAY


def test_vllm_is_imported_in_the_vllm_files_only():
    for path in FILES:
        if "vllm" in packages_of(path):
            assert path.parent.name == "rollout" and path.name.startswith("vllm_"), path


def test_nothing_is_called_utils():
    absent = {"utils", "common", "base", "helpers"}
    assert not [path for path in FILES if absent.intersection({path.stem, path.parent.name})]


@pytest.mark.process
@pytest.mark.parametrize("module", sorted({*LIGHT_MODULES, *CONFIG_MODULES}))
def test_light_modules_load_nothing_heavy(module: str):
    command = f"import sys, {module}; print(sorted(set({sorted(HEAVY)}) & sys.modules.keys()))"
    answer = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout == "[]\n"


def test_the_files_of_a_config_package_are_configs():
    assert {"rollout.config", "stages.config.ppo", "stages.config.data", "pipeline.config"} <= {
        *CONFIG_MODULES
    }


STAGES = "|".join(sorted(RECIPES))
OF_A_STAGE = re.compile(rf"(?:{STAGES})|.*?(?<![\w./-])(?:{STAGES})[./]\S.*", re.DOTALL)
"""A string that equals a stage's name, or holds `<stage>.` or `<stage>/` at the start of a word."""
KNOW_STAGES = (
    "pipeline/stage_table.py",
    "pipeline/experiment.py",
    "stages/config/",  # sections follow one another: reward's normaliser is sampled as ppo samples
)
NAME_STAGES_FOR_A_REASON = {
    "pipeline/foreign_settings.py": "a manual: what other tools call the settings of each section",
    "pipeline/config_docs.py": "a manual: docs/configuration.md opens with examples",
    "pipeline/cli.py": "help: an example of KEY=VALUE",
    "pipeline/yaml_source.py": "help: an example of KEY=VALUE",
    "stages/evaluate.py": "samples.jsonl: `reward` is the score of the reward model",
    "stages/data/reading/rows/ranked.py": "users' columns: `reward` is a score",
    "stages/data/reading/rows/guesses.py": "users' columns",
    "stages/data/reading/contradictions.py": "users' columns",
}
VALUES = {("kl_placement", "reward")}
"""Values of settings that happen to be called like a stage: `kl_placement: reward`."""
ALGORITHMS = re.compile(
    r"(?<![a-z])(grpo|rloo|reinforce|remax|dapo|gspo|cispo|kto|ipo|orpo|simpo)(?![a-z])", re.IGNORECASE
)
NAME_ALGORITHMS = (
    "stages/rl/algorithms.py",
    "stages/config/ppo.py",
    "pipeline/foreign_settings.py",  # a manual, as above
    "stages/data/reading/schemas.py",  # users' columns: `kto_tag` is a label
)


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """The string literals that a program works with: no docstrings, no seeds' names, no metric keys."""
    left_out: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str()) as docstring):
                left_out.add(id(docstring))
            case ast.Call(func=ast.Name(id="stage_seed"), args=names):
                left_out.update(map(id, names))
            case ast.Compare(left=ast.Attribute(attr=setting), comparators=[ast.Constant() as value]):
                left_out.update([id(value)] if (setting, value.value) in VALUES else [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in left_out or node.value in METRICS:
                continue
            yield node


def names_of_stages(path: Path) -> list[str]:
    """Where a file names a stage; a recipe may name its own."""
    own = rf"(?<![\w./-]){path.stem}(?=[./]\S|$)" if path.parent == ROOT / "stages" else "(?!)"
    texts = ((node.lineno, re.sub(own, "", str(node.value))) for node in strings(ast.parse(path.read_text())))
    return [f"{path}:{line}: {text!r}" for line, text in texts if OF_A_STAGE.fullmatch(text)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_stage_table_knows_stages_by_name(path: Path):
    """Others get names as data: a stage, the key of its section (`config.KEY`), a column of the table."""
    name = str(path.relative_to(ROOT))
    if not name.startswith(KNOW_STAGES) and name not in NAME_STAGES_FOR_A_REASON:
        assert not names_of_stages(path)


def test_what_may_name_stages_does():
    for name in NAME_STAGES_FOR_A_REASON:
        assert names_of_stages(ROOT / name), f"{name}: take it off the list"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_algorithms_are_named_in_one_place(path: Path):
    """Docstrings and comments may cite: they are no part of the syntax tree that is looked at."""
    if not str(path.relative_to(ROOT)).startswith(NAME_ALGORITHMS):
        tree = ast.parse(path.read_text())
        named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        named |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        named |= {str(node.value) for node in strings(tree)}
        assert not {text for text in named if ALGORITHMS.search(text)}
