"""The code turns no data into code: no pickle, eval, shell or remote code. And the check that says so
works.
"""

from pathlib import Path

import pytest
from source_rules import breaches

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for package in ("pipeline", "stages", "rollout") for path in (ROOT / package).rglob("*.py")
)

FORBIDDEN = [
    "import pickle",
    "import os, dill as d",
    "from marshal import loads",
    "from shelve import open as o",
    "from ray import cloudpickle",
    "from cloudpickle import dumps",
    "eval('1')",
    "exec(text, {})",
    "compile(text, 'f', 'exec')",
    "__import__(name)",
    "import builtins; builtins.eval('1')",
    "os.system('ls')",
    "from os import system",
    "os.popen('ls')",
    "subprocess.getoutput('ls')",
    "subprocess.run('ls', shell=True)",
    "subprocess.Popen(command, shell=flag)",
    "subprocess.run(command, **{'shell': True})",
    "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "AutoModel.from_pretrained(path, trust_remote_code=config.trust)",
    "AutoTokenizer.from_pretrained(path)",
    "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)",
    "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, use_safetensors=False)",
    "options = {'trust_remote_code': True}",
    "options['trust_remote_code'] = True",
    "config.trust_remote_code = True",
    "setattr(config, 'trust_remote_code', True)",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.load(path, weights_only=flag)",
    "torch.jit.load(path)",
    "from torch.serialization import load",
    "numpy.load(path, allow_pickle=True)",
    "yaml.load(text)",
    "yaml.load(text, Loader=yaml.Loader)",
    "yaml.load(text, Loader=yaml.FullLoader)",
    "yaml.unsafe_load(text)",
    "yaml.full_load(text)",
    "from yaml import unsafe_load",
    "dist.all_gather_object(found, mine)",
    "dist.broadcast_object_list([x], src=0)",
    "from torch.distributed import gather_object",
    "dist.send_object_list([x], 1)",
    "os.environ['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'",
    "os.environ.update(VLLM_ALLOW_INSECURE_SERIALIZATION='1')",
    "os.environ.setdefault('VLLM_ALLOW_INSECURE_SERIALIZATION', '1')",
    "os.environ |= {'VLLM_ALLOW_INSECURE_SERIALIZATION': '1'}",
    "jinja2.Template(source)",
    "from jinja2 import Environment",
    "tempfile.mktemp()",
    "asyncio.create_subprocess_shell('ls')",
    "from asyncio import create_subprocess_shell as start",
    "os.execvp('sh', ['sh', '-c', text])",
    "os.spawnl(os.P_WAIT, path)",
    "from os import posix_spawn",
    "subprocess.run(['sh', '-c', text])",
    "command = ('/bin/bash', '-c', text)",
    "asyncio.create_subprocess_exec('sh', '-c', text)",
    "from torch import load; load(path)",
    "from torch.serialization import load as read; read(path)",
    "import torch as t; t.load(path)",
    "read = torch.load",
    "functools.partial(torch.load)(path)",
    "getattr(torch, 'load')(path)",
    "from torch import load as read; files = map(read, paths)",
    "torch.hub.load(repository, model)",
    "from torch import hub",
    "from torch.package import PackageImporter",
    "from yaml import load; load(text, Loader)",
    "from yaml import load, Loader as L; load(text, Loader=L)",
    "import yaml as y; y.load(text, Loader=y.Loader)",
    "pandas.read_pickle(path)",
    "frame.to_pickle(path)",
    "import runpy; runpy.run_path(path)",
    "from code import InteractiveInterpreter",
    "importlib.import_module('pickle')",
    "run = eval",
    "values = map(eval, texts)",
    "getattr(builtins, 'eval')('1')",
    "import builtins as b; b.exec(text)",
    "__builtins__['eval']('1')",
    "getattr(os, 'system')('ls')",
]
ALLOWED = [
    "model.eval()",
    "re.compile('x')",
    "torch.compile(model)",
    "ast.literal_eval('1')",
    "spec.loader.exec_module(module)",
    "subprocess.run(['ls'], shell=False)",
    "torch.load(path, weights_only=True)",
    "torch.load(path, map_location='cpu', weights_only=True)",
    "yaml.load(text, Loader=yaml.SafeLoader)",
    "yaml.safe_load(text)",
    "yaml.parse(text, Loader=yaml.SafeLoader)",
    "AutoModel.from_pretrained(path, trust_remote_code=False, use_safetensors=True)",
    "AutoConfig.from_pretrained(path, trust_remote_code=False)",
    "type(model).from_pretrained(None, config=config, state_dict=state)",
    "options = {'trust_remote_code': False}",
    "os.environ['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '0'",
    "from jinja2.sandbox import ImmutableSandboxedEnvironment",
    "dist.all_gather(tensors, mine)",
    "# pickle, eval() and trust_remote_code=True are only words here",
    "'VLLM_ALLOW_INSECURE_SERIALIZATION=1'",
    "import torch as t; t.load(path, weights_only=True)",
    "from torch import load; load(path, weights_only=True)",
    "from yaml import load, SafeLoader; load(text, Loader=SafeLoader)",
    "from re import compile; compile('x')",
    "from json import load; read = load",
    "step = model.eval",
    "subprocess.run(['show', 'sh'])",
    "getattr(settings, 'eval')",
    "importlib.import_module('json')",
    "code = 2; print(code)",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_turns_data_into_code(path: Path):
    assert breaches(path.read_text()) == []


@pytest.mark.parametrize("line", FORBIDDEN)
def test_the_check_finds_each_of_these_in_the_middle_of_a_file(line: str):
    body = f"def f(path):\n    if path:\n        {line}\n"
    found = breaches(body)
    assert found and all(what.startswith("3: ") for what in found)


@pytest.mark.parametrize("line", ALLOWED)
def test_the_check_lets_these_pass(line: str):
    assert breaches(line) == []


def test_the_files_under_check_are_those_of_the_project():
    names = {str(path.relative_to(ROOT)) for path in FILES}
    assert {"pipeline/cli.py", "stages/training/models.py", "rollout/vllm_engine.py"} <= names
