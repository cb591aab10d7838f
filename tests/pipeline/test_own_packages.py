"""`pipeline`, `stages` and `rollout` are common words: nobody else's module is imported in our place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_chain import FAKE_CLI, IMPORTABLE, Chain

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "pipeline.cli"]
COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'rlhf'; from rlhf_pipeline import main; main()"]
"""What the installed command does. (The one that lies beside this Python may be of another checkout.)"""


def theirs(directory: Path, *names: str) -> Path:
    """Modules of somebody else's that say so when they are imported. Returns where they say it."""
    said = directory / "imported.txt"
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"import sys\nopen({str(said)!r}, 'a').write(f'{{__file__}} by {{sys.orig_argv}}\\n')\n"
        )
    return said


def answer(
    command: list[str], *arguments: str, cwd: Path, path: str = str(ROOT)
) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "names", [("rollout.py", "stages/__init__.py"), ("stages/rows.txt", "rollout/notes.txt")]
)
@pytest.mark.parametrize("where", ["working directory", "PYTHONPATH"])
def test_started_as_a_module_the_command_has_its_own_packages(
    tmp_path: Path, names: tuple[str, ...], where: str
):
    said = theirs(tmp_path, *names)
    path = str(ROOT) if where == "working directory" else os.pathsep.join([str(tmp_path), str(ROOT)])
    ended = answer(CLI, "schema", cwd=tmp_path if where == "working directory" else ROOT, path=path)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.startswith("{")
    assert not said.exists()


def test_the_command_has_its_own_packages_beside_a_pipeline_on_the_path(tmp_path: Path):
    said = theirs(tmp_path, "pipeline/__init__.py", "stages.py", "rollout/__init__.py")
    ended = answer(COMMAND, "schema", cwd=tmp_path, path=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.startswith("{")
    assert not said.exists()


def test_what_is_loaded_already_is_named_and_nothing_starts(tmp_path: Path):
    theirs(tmp_path, "rollout.py")
    (tmp_path / "sitecustomize.py").write_text("import rollout\n")
    ended = answer(COMMAND, "schema", cwd=tmp_path, path=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (4, "", 1)
    assert ended.stderr.startswith(f"{tmp_path / 'rollout.py'}: was imported as `rollout`")


def test_children_get_our_packages_and_no_working_directory(tmp_path: Path):
    """Of any kind: `python -c`, as multiprocessing starts them, and `-m`, as vLLM does."""
    said = theirs(tmp_path, "rollout.py", "stages/__init__.py", "json.py", "types.py")
    program = (
        "import rlhf_pipeline, subprocess, sys; rlhf_pipeline.own_packages_first()\n"
        "child = 'import json, types, rollout, stages; print(rollout.__file__)'\n"
        "subprocess.run([sys.executable, '-c', child], check=True)\n"
        "subprocess.run([sys.executable, '-m', 'json.tool', '/dev/null'], stderr=subprocess.DEVNULL)\n"
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/start.py").write_text(program)
    ended = answer([sys.executable, str(tmp_path / "elsewhere/start.py")], cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, f"{ROOT / 'rollout/__init__.py'}\n"), ended.stderr
    assert not said.exists()


def test_a_run_on_ray_imports_nothing_of_the_working_directory_or_theirs_on_the_path(
    chain: Chain, tmp_path_factory
):
    on_path = tmp_path_factory.mktemp("on_path")
    said = [
        theirs(
            chain.directory,
            "rollout.py",
            "stages/__init__.py",
            "pipeline.py",
            "json.py",
            "ray.py",
            "torch.py",
        ),
        theirs(on_path, "rollout/__init__.py", "stages.py", "pipeline/__init__.py"),
    ]
    start = tmp_path_factory.mktemp("start") / "start.py"
    start.write_text(f"import rlhf_pipeline\nrlhf_pipeline.own_packages_first()\n{FAKE_CLI}")
    ended = answer(
        [sys.executable, str(start)],
        *("run", "demo.yaml", "pipeline.executor=ray", "--until", "prepare"),
        cwd=chain.directory,
        path=os.pathsep.join([str(on_path), IMPORTABLE]),
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert [path.read_text() for path in said if path.exists()] == []


@pytest.mark.parametrize("module", ["datasets/__init__.py", "torch.py", "yaml.py"])
def test_a_module_on_the_path_in_place_of_a_package_is_named_and_nothing_starts(tmp_path: Path, module: str):
    said = theirs(tmp_path, module)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for command in (COMMAND, CLI):
        ended = answer(command, "schema", cwd=ROOT, path=path)
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (4, "", 1)
        assert ended.stderr.startswith(f"{tmp_path / module}: would be imported in place of the package")
    assert not said.exists()


def test_packages_that_are_installed_on_the_path_are_left_alone(tmp_path: Path):
    theirs(tmp_path, "datasets/__init__.py")
    (tmp_path / "datasets-5.2.0.dist-info").mkdir()
    ended = answer(COMMAND, "schema", cwd=ROOT, path=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("command", [COMMAND, CLI])
def test_files_are_utf_8_in_every_locale_and_outputs_what_the_locale_says(tmp_path: Path, command: list[str]):
    (tmp_path / "wörter.yaml").write_bytes("# →\nname: demo\nsft: {lörning: 1}\n".encode())
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    path = os.environ | environment | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, "check", "wörter.yaml"], cwd=tmp_path, env=path, capture_output=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"w?rter.yaml:3: sft.l?rning: no such setting"), ended.stderr


@pytest.mark.parametrize("files", [("pipeline/__init__.py",), ()])
def test_a_pipeline_in_the_working_directory_that_python_imports_first_is_named(
    tmp_path: Path, files: tuple[str, ...]
):
    """An editable install finds our `pipeline.cli` below theirs, which Python has imported by then."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        parent = name.rpartition('.')[0]\n"
        f"        within = {str(ROOT)!r} + '/' + parent.replace('.', '/') if parent else {str(ROOT)!r}\n"
        "        return PathFinder.find_spec(name, [within])\n"
        "sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, Finder)\n"
    )
    (tmp_path / "work/pipeline").mkdir(parents=True)
    theirs(tmp_path / "work", "rollout.py", *files)
    ended = answer(CLI, "schema", cwd=tmp_path / "work", path=str(tmp_path / "site"))
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (4, "", 1), ended.stderr
    assert ended.stderr.startswith(f"{tmp_path / 'work/pipeline'}: was imported as `pipeline`")
