"""What the code of this project never does: reads a file's syntax tree, tells every breach with its line.

    source --> imports: local name -> dotted name --> every name, call and pair, resolved --> breaches

Attack surface, not taste: each of these turns data (a file, a message, a config) into code that runs. A name
is forbidden wherever it stands, called or not, whatever it was imported as. A module in a variable is not
followed.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

PICKLING = {"pickle", "cPickle", "_pickle", "pickle5", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUNNING = {"runpy", "code", "codeop"}
FORBIDDEN_MODULES = PICKLING | RUNNING
RUNS_TEXT = {"eval", "exec", "compile", "__import__", "__builtins__"}
UNSAFE_YAML = {"load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "UnsafeLoader"}
FORBIDDEN_ATTRIBUTES = PICKLING | UNSAFE_YAML | {"read_pickle", "to_pickle"}
FORBIDDEN_NAMES = {
    *(f"builtins.{name}" for name in RUNS_TEXT),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    "asyncio.create_subprocess_shell",
    *("yaml.Loader", "yaml.FullLoader", "yaml.CLoader"),
    *("torch.package", "torch.serialization.load", "torch.jit.load", "torch.hub"),
    *("jinja2.Template", "jinja2.Environment"),  # jinja2.sandbox has the ones for templates of others
    "tempfile.mktemp",
}
ONLY_CALLED = {"torch.load", "yaml.load"}
"""Their arguments make them safe, which only a call shows."""
STARTS_PROCESSES = re.compile(r"os\.(exec|spawn|posix_spawn)\w*")  # subprocess is the one way here
SENDS_PICKLES = re.compile(r"(all_gather|gather|scatter|broadcast|send|recv)_object(_list|s)?")
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "csh", "fish", "cmd", "cmd.exe", "powershell", "pwsh"}
INSECURE = "VLLM_ALLOW_INSECURE_SERIALIZATION"
MUST_BE_FALSE = {"shell", "trust_remote_code", "allow_pickle"}


def breaches(source: str) -> list[str]:
    """Each as `line: what`, in the order of the file.

    Example: breaches("import pickle") == ["1: pickle"]
    """
    tree = ast.parse(source)
    file = _File(
        imported=dict(_imports(tree)),
        called={node.func for node in ast.walk(tree) if isinstance(node, ast.Call)},
    )
    found = {(node.lineno, what) for node in ast.walk(tree) for what in file.breaches_of(node)}
    return [f"{line}: {what}" for line, what in sorted(found)]


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local name and what it stands for, of every import at any depth. Example: ("t", "torch")."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    root = alias.name.partition(".")[0]
                    yield (alias.asname, alias.name) if alias.asname else (root, root)
            case ast.ImportFrom(module=str(module), names=names):
                for alias in names:
                    yield alias.asname or alias.name, f"{module}.{alias.name}"


@dataclass(frozen=True)
class _File:
    """The rules, applied to nodes of one file."""

    imported: dict[str, str]
    called: set[ast.expr]  # expressions that stand for the function of a call

    def breaches_of(self, node: ast.AST) -> Iterator[str]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield from _of_module(alias.name)
            case ast.ImportFrom(module=str(module), names=names):
                yield from _of_module(module)
                for alias in names:
                    yield from _of_name(f"{module}.{alias.name}")
            case ast.Name(ctx=ast.Load()) if (name := self._name(node)) != node.id:
                yield from _of_name(name, is_called=node in self.called)
            case ast.Attribute():
                yield from _of_name(self._name(node), is_called=node in self.called)
            case ast.List(elts=[first, *_]) | ast.Tuple(elts=[first, *_]):
                yield from _of_program(first)
            case ast.Call():
                yield from self._of_call(node)
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant):
                        yield from _of_pair(key.value, value)
            case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=key))], value=value):
                yield from _of_pair(key, value)
            case ast.Assign(targets=[ast.Attribute(attr=key)], value=value):
                yield from _of_pair(key, value)

    def _name(self, node: ast.expr) -> str:
        """Dotted, as imported. Example: `t.load` -> "torch.load", `eval` -> "builtins.eval"."""
        root, dot, rest = ast.unparse(node).partition(".")
        return self.imported.get(root, f"builtins.{root}" if root in RUNS_TEXT else root) + dot + rest

    def _of_call(self, call: ast.Call) -> Iterator[str]:
        name = self._name(call.func)
        keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        if name == "torch.load" and not _is(keywords.get("weights_only"), True):
            yield "torch.load without weights_only=True"
        loader = keywords.get("Loader", ast.Constant(None))
        if name == "yaml.load" and self._name(loader) != "yaml.SafeLoader":
            yield "yaml.load without Loader=yaml.SafeLoader"
        reads_files = not (call.args and _is(call.args[0], None))
        if name.endswith("from_pretrained") and reads_files:
            if not _is(keywords.get("trust_remote_code"), False):
                yield "from_pretrained without trust_remote_code=False"
            if re.search(r"Model|auto_class", name) and not _is(keywords.get("use_safetensors"), True):
                yield "from_pretrained without use_safetensors=True"
        match name, call.args:
            case "getattr", [owner, ast.Constant(value=str(attribute)), *_]:
                yield from _of_name(f"{self._name(owner)}.{attribute}", is_called=False)
            case "setattr", [_, ast.Constant(value=key), value]:
                yield from _of_pair(key, value)
            case "importlib.import_module", [ast.Constant(value=str(module)), *_]:
                yield from _of_module(module)
            case _, [program, *_] if name.endswith("subprocess_exec"):
                yield from _of_program(program)
            case _, [key, value] if name.endswith((".setdefault", ".setenv", ".putenv")):
                yield from _of_pair(getattr(key, "value", None), value)
        for keyword, value in keywords.items():
            yield from _of_pair(keyword, value)


def _of_module(name: str) -> Iterator[str]:
    if name.partition(".")[0] in FORBIDDEN_MODULES:
        yield name
    else:
        yield from _of_name(name)


def _of_name(name: str, *, is_called: bool = True) -> Iterator[str]:
    """A dotted name that must not be used at all, or not without its arguments."""
    last = name.rpartition(".")[2]
    if (
        name in FORBIDDEN_NAMES
        or last in FORBIDDEN_ATTRIBUTES
        or STARTS_PROCESSES.fullmatch(name)
        or SENDS_PICKLES.fullmatch(last)
    ):
        yield name
    if name in ONLY_CALLED and not is_called:
        yield f"{name}, not called"


def _of_program(program: ast.expr) -> Iterator[str]:
    """The first word of what may be a command line."""
    match program:
        case ast.Constant(value=str(text)) if PurePath(text).name in SHELLS:
            yield f"{text}, a shell"


def _of_pair(key: object, value: ast.expr) -> Iterator[str]:
    """A keyword, a dict's entry, an attribute or an environment variable that may only be switched off."""
    if key in MUST_BE_FALSE and not _is(value, False):
        yield f"{key}={ast.unparse(value)}"
    if key == INSECURE and not _is(value, "0"):
        yield f"{key}={ast.unparse(value)}"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is type(value) and node.value == value
