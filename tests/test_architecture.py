"""The import rules of DESIGN.md: who may import whom, and what has to import lightly.

rollout <- stages <- pipeline        stages: config, objectives <- data <- training <- rl <- recipes
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import recipe_lock

from stages.training.metrics import METRICS

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "stages", "rollout")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
RECIPES = ("prepare", "pretrain", "sft", "reward", "ppo", "evaluate")
FLOORS = (
    ("stages.config", "stages.errors", "stages.objectives", "stages.runtime"),
    ("stages.bundles", "stages.data", "stages.engines"),
    ("stages.training",),
    ("stages.rl",),
    ("stages.generate", *(f"stages.{recipe}" for recipe in RECIPES)),
)
"""Floors of `stages`, from the ground: a module imports from its own floor or from below it."""
FLOORS_OF_DATA = (
    ("stages.data.batches", "stages.data.pack_plans"),
    ("stages.data.reading",),
    ("stages.data.chat",),
    ("stages.data.corpus",),
    ("stages.data",),
)
"""Floors of `stages.data`: numbers, rows, conversations, documents, and what puts them together."""
MAY_IMPORT_RAY = {
    "pipeline/executor.py",
    "pipeline/ray_session.py",
    "stages/training/distributed.py",
    "stages/rl/source.py",
    "stages/data/corpus/workers.py",
    "rollout/pool.py",
}
HEAVY = ("torch", "ray", "transformers", "vllm", "datasets")
LIGHT_MODULES = (
    "rollout.api",
    "rollout.engines",
    "rollout.errors",
    "rollout.ground.section",
    "rollout.ground.errors",
    "rollout.ground.durable",
    "rollout.loop",
    "rollout.vllm_plugin",
    "stages.errors",
    "stages.runtime",
    "stages.objectives.schedules",
    "stages.training.checkpoint_record",
    "stages.data.batches",
    "stages.data.reading.readers",
    "stages.data.chat.template_process",
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
HEAVIER_MODULES = (
    ("rollout.weight_file", {"torch"}),
    ("rollout.weight_sync", {"torch", "transformers"}),
    ("rollout.parity", {"torch", "transformers"}),
    ("rollout.pool", {"torch", "ray"}),
    ("rollout.hf_engine", {"torch", "transformers"}),
)
"""What may be loaded, of what is heavy."""


def module_of(path: Path) -> str:
    """The dotted name of a file; of a package for its `__init__`."""
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports anywhere, also inside functions."""
    return frozenset(_imports(path))


def _imports(path: Path) -> Iterator[str]:
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
    """First names of what a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def lies_in(module: str, package: str) -> bool:
    """Whether a dotted name is a package's, or one below it."""
    return module == package or module.startswith(f"{package}.")


def floor_of(module: str, floors: Sequence[Sequence[str]]) -> int:
    """Where a module is among floors; the longest package that it lies in decides."""
    found = [(package, floor) for floor, packages in enumerate(floors) for package in packages]
    holding = [(len(package), floor) for package, floor in found if lies_in(module, package)]
    assert holding, f"{module} is on no floor; give it one"
    return max(holding)[1]


def climbing(package: str, floors: Sequence[Sequence[str]]) -> list[str]:
    """Imports below `package` that lead from one floor to a higher one."""
    return [
        f"{module} imports {name}"
        for path in FILES
        if lies_in(module := module_of(path), package) and module != package
        for name in sorted(imports(path))
        if lies_in(name, package) and name != package and floor_of(name, floors) > floor_of(module, floors)
    ]


def test_the_arrows_point_from_pipeline_to_stages_to_rollout():
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in FILES
        for other in packages_of(path)
        if other in {*PACKAGES[: PACKAGES.index(path.relative_to(ROOT).parts[0])], "tests"}
    ]
    assert not wrong


def test_in_stages_the_arrows_point_from_the_recipes_to_the_ground():
    assert not climbing("stages", FLOORS)


def test_rows_know_no_template_and_templates_no_documents():
    assert not climbing("stages.data", FLOORS_OF_DATA)


def test_the_ground_of_all_packages_imports_nothing_of_them():
    for path in FILES:
        own = {name for name in imports(path) if name.partition(".")[0] in PACKAGES}
        if lies_in(module_of(path), "rollout.ground"):
            assert all(lies_in(name, "rollout.ground") for name in own), path
        elif lies_in(module_of(path), "stages.config"):
            allowed = ("stages.config", "rollout.config", "rollout.ground")
            assert all(any(lies_in(name, one) for one in allowed) for name in own), path


def test_recipes_never_import_each_other():
    for recipe in RECIPES:
        others = {f"stages.{other}" for other in RECIPES if other != recipe}
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
            assert allowed or lies_in(name, "stages.objectives"), f"{path}: {name}"


def test_ray_is_imported_where_work_is_started_on_it_only():
    assert {str(path.relative_to(ROOT)) for path in FILES if "ray" in packages_of(path)} == MAY_IMPORT_RAY


def test_vllm_is_imported_in_the_vllm_files_only():
    for path in FILES:
        if "vllm" in packages_of(path):
            assert path.parent.name == "rollout" and path.name.startswith("vllm_"), path


def test_nothing_is_called_utils():
    absent = {"utils", "common", "base", "helpers"}
    assert not [path for path in FILES if absent.intersection({path.stem, path.parent.name})]


@pytest.mark.process
def test_modules_load_nothing_heavier_than_they_need():
    """One process imports all light modules in turn, and a fork of it each heavier one."""
    configs = [module_of(path) for path in FILES if recipe_lock.is_config(path)]
    assert {"rollout.config", "stages.config", "stages.config.ppo", "pipeline.config"} <= {*configs}
    program = f"""
import importlib, os, sys

def load(module, allowed):
    importlib.import_module(module)
    if heavy := {{*{HEAVY}}} & sys.modules.keys() - allowed:
        sys.exit(f"{{module}} loads {{', '.join(sorted(heavy))}}")

for module in {[*configs, *LIGHT_MODULES]}:
    load(module, set())
for module, allowed in {HEAVIER_MODULES}:
    if (child := os.fork()) == 0:
        load(module, allowed)
        sys.exit()
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(1)
"""
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


NAMES = "|".join(sorted(RECIPES))
OF_A_STAGE = re.compile(rf"(?:{NAMES})|.*?(?<![\w./-])(?:{NAMES})[./]\S.*", re.DOTALL)
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


def test_only_the_stage_table_knows_stages_by_name():
    """Others get names as data: a stage, the key of its section (`config.KEY`), a column of the table."""
    for path in FILES:
        name = str(path.relative_to(ROOT))
        if not name.startswith(KNOW_STAGES) and name not in NAME_STAGES_FOR_A_REASON:
            assert not names_of_stages(path)


def test_what_may_name_stages_does():
    for name in NAME_STAGES_FOR_A_REASON:
        assert names_of_stages(ROOT / name), f"{name}: take it off the list"


def test_algorithms_are_named_in_one_place():
    """Docstrings and comments may cite: they are no part of the syntax tree that is looked at."""
    for path in FILES:
        if not str(path.relative_to(ROOT)).startswith(NAME_ALGORITHMS):
            tree = ast.parse(path.read_text())
            named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            named |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            named |= {str(node.value) for node in strings(tree)}
            assert not {text for text in named if ALGORITHMS.search(text)}, path
