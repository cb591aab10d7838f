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

from pipeline.stage_table import STAGES
from stages.training.metrics import METRICS

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "stages", "rollout")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
RECIPES = tuple(STAGES)
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
OF_A_STAGE = re.compile(rf"(?:{NAMES})|.*?(?<![\w./-])(?:{NAMES})[./].*", re.DOTALL)
"""A string that equals a stage's name, or holds `<stage>.` or `<stage>/` at the start of a word."""
KNOW_STAGES = ("pipeline/stage_table.py", "pipeline/experiment.py")
NAME_STAGES_FOR_A_REASON = {
    # manuals: what other tools call the settings of each section, and how docs/configuration.md opens
    ("pipeline/foreign_settings.py", "# optimiser"),
    ("pipeline/foreign_settings.py", "pretrain"),
    ("pipeline/config_docs.py", "# Configuration"),
    # help: an example of KEY=VALUE
    ("pipeline/cli.py", "Settings that win over the file: sft.lr=1e-4"),
    ("pipeline/yaml_source.py", ": expected KEY=VALUE, as in sft.lr=1e-4"),
    # values of kl_placement and of init_from
    ("stages/config/ppo.py", "reward"),
    ("stages/config/reward.py", "sft"),
    ("stages/config/reward.py", "pretrain"),
    # the reward model's normaliser is sampled as ppo samples
    ("stages/config/reward.py", "ppo.max_response_tokens"),
    # samples.jsonl: the score of the reward model
    ("stages/evaluate.py", "reward"),
    # users' columns: `reward` is a score
    ("stages/data/reading/rows/ranked.py", "reward"),
    ("stages/data/reading/rows/guesses.py", "reward"),
    ("stages/data/reading/contradictions.py", "reward"),
}
"""(file, first line of the string)."""
VALUES = {("kl_placement", "reward")}
"""Values of settings that happen to be called like a stage: `kl_placement: reward`."""
ALGORITHMS = re.compile(
    r"(?<![a-z])(grpo|rloo|reinforce|remax|dapo|gspo|cispo|kto|ipo|orpo|simpo)(?![a-z])", re.IGNORECASE
)
CASE_BOUNDARY = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
"""Where a word of `useGRPOLoss` ends."""
NAME_ALGORITHMS = (
    "stages/rl/algorithms.py",
    "stages/config/ppo.py",
    "pipeline/foreign_settings.py",  # a manual, as above
    "stages/data/reading/schemas.py",  # users' columns: `kto_tag` is a label
)


def strings(tree: ast.Module) -> Iterator[str]:
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
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield from () if node.value in METRICS else (node.value,)


def identifiers(tree: ast.Module) -> Iterator[str]:
    """Every name that a program binds, reads, imports or passes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            continue
        for _, value in ast.iter_fields(node):
            yield from (name for name in (value if isinstance(value, list) else [value]) if type(name) is str)


def stages_in(tree: ast.Module, own: str | None = None) -> set[str]:
    """First lines of the strings that name a stage other than `own`."""
    its_own = re.compile("(?!)" if own is None else rf"(?<![\w./-]){own}(?=[./]|$)")
    found = {text for text in strings(tree) if OF_A_STAGE.fullmatch(its_own.sub("", text))}
    return {text.lstrip("\n").partition("\n")[0] for text in found}


def algorithms_in(tree: ast.Module, stem: str) -> set[str]:
    """Names and strings of a file `stem`.py that hold the name of an algorithm."""
    named = {stem, *identifiers(tree), *strings(tree)}
    return {text for text in named if ALGORITHMS.search(CASE_BOUNDARY.sub("_", text))}


def test_only_the_stage_table_knows_stages_by_name():
    """Others get names as data: a stage, the key of its section (`config.KEY`), a column of the table. A
    recipe and a file of the config may name their own.
    """
    found: set[tuple[str, str]] = set()
    for path in FILES:
        name = str(path.relative_to(ROOT))
        has_own = path.parent in (ROOT / "stages", ROOT / "stages/config")
        if name not in KNOW_STAGES:
            tree = ast.parse(path.read_text())
            found |= {(name, text) for text in stages_in(tree, path.stem if has_own else None)}
    assert found - NAME_STAGES_FOR_A_REASON == set()
    assert NAME_STAGES_FOR_A_REASON - found == set(), "no longer there: take it off the list"


@pytest.mark.parametrize(
    "program", ['x = "sft"', 'x = f"ppo/{role}"', 'x = "ppo/"', 'x = "set sft.lr"', 'x = {"ppo": 1}']
)
def test_a_stage_is_found_in_any_string(program: str):
    assert stages_in(ast.parse(program))


@pytest.mark.parametrize(
    "program", ['"""About sft."""', 'stage_seed(1, "ppo")', 'x = "the ppo stage"', 'x = "outputs/sft.txt"']
)
def test_what_is_no_stage_is_not_found(program: str):
    assert not stages_in(ast.parse(program))


def test_algorithms_are_named_in_one_place():
    """Docstrings and comments may cite: they are no part of the syntax tree that is looked at."""
    for path in FILES:
        if not str(path.relative_to(ROOT)).startswith(NAME_ALGORITHMS):
            assert not algorithms_in(ast.parse(path.read_text()), path.stem), path


@pytest.mark.parametrize(
    "program",
    [
        "def grpo_advantages(): ...",
        "async def rloo(): ...",
        "class GRPOLoss: ...",
        "def f(grpo=1): ...",
        "f(use_grpo=True)",
        "GRPOTerm()",
        "loss.useGspo",
        "from stages.rl import grpo",
        "from stages.rl.grpo import advantages",
        "import stages.rl as dapo",
        'type = "grpo"',
        "match x:\n    case [*kto]: ...",
        "def f():\n    global remax",
    ],
)
def test_an_algorithm_is_found_under_any_name(program: str):
    assert algorithms_in(ast.parse(program), "terms")


def test_an_algorithm_is_found_in_the_name_of_a_file_and_in_no_other_word():
    assert algorithms_in(ast.parse(""), "grpo_terms") == {"grpo_terms"}
    assert not algorithms_in(ast.parse('"""GRPO."""\nreinforced = "unipod"  # grpo'), "terms")
