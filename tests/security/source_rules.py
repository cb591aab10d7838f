"""What the code of this project never does: reads a file's syntax tree, tells every breach with its line.

Attack surface, not taste: each of these turns data (a file, a message, a config) into code that runs.
"""

import ast
import re
from collections.abc import Iterator

PICKLING = {"pickle", "cPickle", "_pickle", "pickle5", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
UNSAFE_YAML = {"load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "UnsafeLoader"}
FORBIDDEN_NAMES = {
    *(f"builtins.{name}" for name in RUNS_TEXT),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *("yaml.Loader", "yaml.FullLoader", "yaml.CLoader"),
    *("torch.package", "torch.serialization.load", "torch.jit.load"),
    *("jinja2.Template", "jinja2.Environment"),  # jinja2.sandbox has the ones for templates of others
    "tempfile.mktemp",
}
SENDS_PICKLES = re.compile(r"(all_gather|gather|scatter|broadcast|send|recv)_object(_list|s)?")
INSECURE = "VLLM_ALLOW_INSECURE_SERIALIZATION"
MUST_BE_FALSE = {"shell", "trust_remote_code", "allow_pickle"}


def breaches(source: str) -> list[str]:
    """Each as `line: what`, in the order of the file.

    Example: breaches("import pickle") == ["1: pickle"]
    """
    tree = ast.parse(source)
    found = [(node.lineno, what) for node in ast.walk(tree) for what in _breaches_of(node)]
    return [f"{line}: {what}" for line, what in sorted(found)]


def _breaches_of(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names if alias.name.partition(".")[0] in PICKLING)
        case ast.ImportFrom(module=str(module), names=names):
            if module.partition(".")[0] in PICKLING:
                yield module
            for alias in names:
                yield from _of_name(f"{module}.{alias.name}")
        case ast.Attribute():
            yield from _of_name(ast.unparse(node))
        case ast.Call():
            yield from _of_call(node)
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant):
                    yield from _of_pair(key.value, value)
        case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=key))], value=value):
            yield from _of_pair(key, value)
        case ast.Assign(targets=[ast.Attribute(attr=key)], value=value):
            yield from _of_pair(key, value)


def _of_name(name: str) -> Iterator[str]:
    """A dotted name that must not be used at all, however it got here."""
    last = name.rpartition(".")[2]
    if last in PICKLING | UNSAFE_YAML or name in FORBIDDEN_NAMES or SENDS_PICKLES.fullmatch(last):
        yield name


def _of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    if name in RUNS_TEXT:
        yield f"{name}()"
    if name == "torch.load" and not _is(keywords.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    reads_files = not (call.args and _is(call.args[0], None))
    if name.endswith("from_pretrained") and reads_files:
        if not _is(keywords.get("trust_remote_code"), False):
            yield "from_pretrained without trust_remote_code=False"
        if re.search(r"Model|auto_class", name) and not _is(keywords.get("use_safetensors"), True):
            yield "from_pretrained without use_safetensors=True"
    if name == "yaml.load" and ast.unparse(keywords.get("Loader", ast.Constant(None))) != "yaml.SafeLoader":
        yield "yaml.load without Loader=yaml.SafeLoader"
    if name == "setattr" and len(call.args) == 3 and isinstance(call.args[1], ast.Constant):
        yield from _of_pair(call.args[1].value, call.args[2])
    if name.endswith((".setdefault", ".setenv", ".putenv")) and len(call.args) == 2:
        yield from _of_pair(getattr(call.args[0], "value", None), call.args[1])
    for key, value in keywords.items():
        yield from _of_pair(key, value)


def _of_pair(key: object, value: ast.expr) -> Iterator[str]:
    """A keyword, a dict's entry, an attribute or an environment variable that may only be switched off."""
    if key in MUST_BE_FALSE and not _is(value, False):
        yield f"{key}={ast.unparse(value)}"
    if key == INSECURE and not _is(value, "0"):
        yield f"{key}={ast.unparse(value)}"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is type(value) and node.value == value
