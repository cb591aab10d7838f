"""A config from anywhere: whatever it holds, `rlhf` ends soon in one line and code 2, nothing executed."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_chain import CONFIG, Chain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import complaint

from pipeline.config import load
from pipeline.errors import ConfigError

NAMED = "name: demo\nsft: {data: [{path: sft.jsonl}]}\n"
HOSTILE = {
    "objects": "name: !!python/object/apply:os.system ['touch PWNED']",
    "objects by name": "name: !!python/name:os.system",
    "modules": "? !!python/module:os\n: x",
    "other objects": 'name: !<tag:yaml.org,2002:python/object/new:subprocess.Popen> [["touch", "PWNED"]]',
    "own tags": "%TAG ! tag:yaml.org,2002:python/\n---\nname: !object/apply:os.system ['touch PWNED']",
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "merged laughs": "a: &a {k: 1}\n"
    + "".join(
        f"{b}: &{b}\n  <<: [{','.join(['*' + a] * 50)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "deep by aliases": "k0: &a0 "
    + "[" * 25
    + "1"
    + "]" * 25
    + "\n"
    + "".join(f"k{i}: &a{i} {'[' * 25}*a{i - 1}{']' * 25}\n" for i in range(1, 70)),
    "an alias to itself": "a: &a [*a]",
    "a merge of itself": "a: &a\n  <<: *a",
    "equal keys": NAMED + "seed: 1\nseed: 2\n",
    "fifty megabytes": NAMED + "#" * 50_000_000,
    "deep lists": "a: " + "[" * 900_000,
    "deep maps": "a: " + "{a: " * 200_000,
    "deep indentation": "\n".join(" " * depth + "a:" for depth in range(1200)),
    "many documents": "---\n" * 100_000,
    "many keys": "".join(f"k{index}: 1\n" for index in range(30_000)),
    "huge numbers": NAMED + "seed: " + "9" * 900_000,
    "a huge exponent": NAMED + "seed: 1e999999999",
    "nan": NAMED + "seed: .nan",
    "infinity": "name: demo\nsft: {lr: .inf, data: [{path: a}]}",
    "negative": NAMED + "seed: -1",
    "hexadecimal": NAMED + "seed: 0x" + "f" * 100,
    "bool": NAMED + "seed: true",
    "sexagesimal": NAMED + "seed: 1:30:00",
    "control characters": 'name: "de\\emo\\a\\b"',
    "terminal escapes": NAMED + '"\\e]0;owned\\a\\e[2J": 1',
    "NUL in a path": 'name: demo\nsft: {data: [{path: "a\\0b"}]}',
    "half a surrogate": 'name: demo\nsft: {data: [{path: "\\ud800"}]}',
    "right to left": "name: demo\u202eomed",
    "invisible": "na\u200bme: demo",
    "look-alike": "n\u0430me: demo",
    "wide letters": "name: \uff44\uff45mo",
    "climbing": "name: ../../etc/cron.d/x",
    "absolute": "name: /etc/passwd",
    "an object as a key": "{[a]: b}",
    "a key of keys": "{{a: b}: c}",
    "null key": "null: 1",
    "base of itself": "base: hostile.yaml",
    "base a device": NAMED + "base: /dev/zero",
    "base a pipe": NAMED + "base: pipe",
    "base a list": "base: [a, b]",
    "base a directory": "base: /",
    "base a secret": "base: /etc/passwd",
    "base nothing": "base: ''",
    "base with NUL": 'base: "a\\0b"',
    "base far up": f"base: {'../' * 2000}etc/passwd",
    "bases without end": "base: chain0.yaml",
    "a class": NAMED + "pipeline: {executor: os.system}",
    "an entry": NAMED + "stages: {sft: 'os:system'}",
    "a scoring shell": "name: a\nevaluate: {prompts: [{path: a}], score: {type: shell, path: 'rm -rf /'}}",
    "a secret as a setting": NAMED + "hf_token: hf_abc",
    "a secret deep down": NAMED + "resources: {token: abc, address: auto}",
}


@pytest.fixture
def hostile(chain: Chain) -> Callable[[bytes], list[str]]:
    """Writes a hostile config; the command that runs it."""
    os.mkfifo(chain.directory / "pipe")
    for index in range(20):
        (chain.directory / f"chain{index}.yaml").write_text(f"base: chain{index + 1}.yaml\n")

    def write(text: bytes) -> list[str]:
        (chain.directory / "hostile.yaml").write_bytes(text)
        return ["run", "hostile.yaml"]

    return write


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_config_is_one_line_and_code_2_and_costs_little(hostile, chain: Chain, capsys, kind: str):
    command = hostile(HOSTILE[kind].encode())
    started, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, stderr = complaint(capsys, *command)
    assert code == 2, stderr
    assert len(stderr) < 700 and stderr[:-1].isprintable()
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000, "KiB"
    assert not (chain.directory / "PWNED").exists() and not chain.outputs.exists()


@pytest.mark.parametrize(
    "data",
    [b"\x00" * 100, b"\x7fELF\x02\x01" + bytes(range(256)), b"\xff\xfe" + "name: a".encode("utf-16-le"),
     b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\xef\xbb\xbf", b"%PDF-1.7", b"\x80\x04\x95"],
)  # fmt: skip
def test_a_binary_file_is_one_line_and_code_2(hostile, chain: Chain, capsys, data: bytes):
    code, stderr = complaint(capsys, *hostile(data))
    assert code == 2 and stderr.startswith("hostile.yaml") and stderr[:-1].isprintable()


@pytest.mark.parametrize(
    "override",
    ["name=../x", "name=!!python/object:os.x {}", "sft={!!python/name:os.system : 1}", "sft.lr=nan",
     "sft.lr=1e999", "seed=" + "9" * 5000, "sft.data.0.path=a\0b", "sft.data.99999999999999999999.path=x",
     "__class__.x=1",
     "sft.__init__.__globals__=1", "outputs=a\0b", "a" * 100_000, "sft=" + "[" * 100_000, "base=/etc/passwd",
     "\x1b[2J=1", "sft.model_config.extra=allow"],
)  # fmt: skip
def test_a_hostile_override_is_one_line_and_code_2(chain: Chain, capsys, override: str):
    code, stderr = complaint(capsys, "run", "demo.yaml", override)
    assert code == 2, stderr
    assert len(stderr) < 700 and stderr[:-1].isprintable()
    assert not chain.outputs.exists()


def test_no_setting_takes_a_secret():
    """Secrets come from the environment: every setting's value ends in config.yaml and in the report."""
    from pipeline.config import json_schema

    words = {"token", "secret", "password", "passwd", "credential", "credentials", "apikey", "auth", "login"}
    names = {
        name
        for section in json_schema()["$defs"].values()
        for name in section.get("properties", {})
        if words & set(name.split("_")) or name.endswith("api_key")
    }
    assert not names


SOMETHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
QUICKLY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


def ends_well(path: Path) -> None:
    """The config loads, or it is one printable line."""
    try:
        load(path)
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 700


@QUICKLY
@given(
    data=st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_no_bytes_at_all_make_a_traceback(tmp_path: Path, data: bytes):
    (tmp_path / "fuzzed.yaml").write_bytes(data)
    ends_well(tmp_path / "fuzzed.yaml")


@QUICKLY
@given(at=st.integers(0, len(CONFIG) - 1), length=st.integers(0, 12), text=st.text(max_size=8))
def test_no_edit_of_a_good_config_makes_a_traceback(tmp_path: Path, at: int, length: int, text: str):
    edited = CONFIG[:at] + text + CONFIG[at + length :]
    (tmp_path / "edited.yaml").write_bytes(edited.encode("utf-8", "surrogatepass"))
    ends_well(tmp_path / "edited.yaml")


@QUICKLY
@given(section=st.sampled_from(["model", "sft", "ppo", "evaluate", "rollout", "resources"]), value=SOMETHING)
def test_no_value_of_a_section_makes_a_traceback(tmp_path: Path, section: str, value: object):
    import json

    text = json.dumps({"name": "a", "sft": {"data": [{"path": "x"}]}} | {section: value})
    (tmp_path / "odd.yaml").write_text(text)
    ends_well(tmp_path / "odd.yaml")
