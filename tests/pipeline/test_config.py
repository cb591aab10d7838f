"""Loading: scalars, `base:`, overrides, paths, the resolved config; the manual and the schema."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config_docs
from pipeline.config import ConfigError, check_paths, json_schema, load, resolved_yaml
from pipeline.experiment import STAGE_FIELDS, ExperimentConfig, ResourcesConfig
from pipeline.yaml_nodes import parse_scalar, short
from stages.data.reading.places import found_at
from stages.errors import DataError

SHIPPED = sorted(Path(__file__).parents[2].glob("configs/**/*.yaml"))

MINIMAL = """\
name: tiny
sft:
  data:
    - path: data/sft.jsonl
  lr: 1e-3
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file below the working directory and gives its relative path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "demo.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return Path(name)

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E3", 1000.0), ("-.5", -0.5), ("3.", 3.0), ("12", 12), ("+4", 4), ("010", 10),
        ("0x1F", 31), ("0o17", 15), ("true", True), ("False", False), ("yes", "yes"), ("off", "off"),
        ("null", None), ("~", None), ("", None), ("1_000", "1_000"), ("12:30", "12:30"), ("1e", "1e"),
        ("2026-11-20", "2026-11-20"), ("-", "-"), (".inf", float("inf")), ("9" * 5000, float("inf")),
        ("-" + "9" * 5000, float("-inf")), ("0x" + "f" * 4000, float("inf")), ("9" * 400, float("inf")),
        (str(2**63 - 1), 2**63 - 1), (str(-(2**63)), -(2**63)), (str(2**63), 2.0**63),
        ("0x8" + "0" * 15, 2.0**63),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value):
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)


def test_numbers_with_an_exponent_are_numbers_in_files_and_in_overrides(write):
    path = write(MINIMAL)
    assert load(path).config.sft.lr == 1e-3
    assert load(path, ["sft.lr=2e-5"]).config.sft.lr == 2e-5
    assert load(path, ["sft.max_steps=1e2"]).config.sft.max_steps == 100


def test_text_that_looks_like_a_number_is_text_where_text_is_wanted(write):
    path = write(MINIMAL.replace("tiny", "2026"))
    config = load(path, ["model.path=org/name", "model.revision=12e4567"]).config
    assert (config.name, config.model.revision) == ("2026", "12e4567")
    assert load(path, ["name=true"]).config.name == "true"
    assert load(path, [f"name={'9' * 50}"]).config.name == "9" * 50


def test_a_section_with_nothing_after_its_key_has_its_defaults_and_null_removes_it(write):
    write(MINIMAL + "prepare:\n  data: [{path: a.txt}]\npretrain:\n  lr: 0.5\n", "base.yaml")
    assert load(write("base: base.yaml\n")).config.pretrain.lr == 0.5
    assert load(write("base: base.yaml\npretrain:\n")).config.pretrain.lr == 0.5
    assert load(write("base: base.yaml\npretrain: null\n")).config.pretrain is None
    assert load(write(MINIMAL + "pretrain:\nmodel:\nresources:\n  sft:\n")).config.pretrain is not None


def test_base_merges_mappings_replaces_lists_and_keeps_positions(write):
    write("name: low\nseed: 1\nsft: {lr: 0.1, max_steps: 3}\n", "shared/low.yaml")
    write("base: low.yaml\nsft:\n  data: [{path: a}, {path: b}]\n", "shared/mid.yaml")
    loaded = load(write("base: shared/mid.yaml\n\nsft:\n  lr: 0.2\n  data: [{path: c}]\n"), ["seed=7"])
    assert (loaded.config.name, loaded.config.seed) == ("low", 7)
    assert (loaded.config.sft.lr, loaded.config.sft.max_steps) == (0.2, 3)
    assert [Path(source.path).name for source in loaded.config.sft.data] == ["c"]
    assert loaded.where("name") == "shared/low.yaml:1"
    assert loaded.where("sft.max_steps") == "shared/low.yaml:3"
    assert loaded.where("sft.lr") == "demo.yaml:4"
    assert loaded.where("sft.batch_size") == "demo.yaml:3"  # not stated: its section
    assert loaded.where("seed") == "override seed=7"


def test_overrides_create_what_is_missing_and_the_last_one_wins(write):
    path = write("name: tiny\n")
    config = load(path, ["sft.data.0.path=a", "sft.data.1.path=b", "sft.lr=0.1", "sft.lr=0.2"]).config
    assert [Path(source.path).name for source in config.sft.data] == ["a", "b"]
    assert config.sft.lr == 0.2


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("sft.data.0.columns={prompt: question}", {"prompt": "question"}),
        ("sft.data.0.columns.prompt=question", {"prompt": "question"}),
        ("sft.data.0.columns.prompt='a: b'", {"prompt": "a: b"}),
        ("sft.data.0.columns.prompt=a: b # c", {"prompt": "a: b # c"}),
        ("sft.data.0.columns.prompt={x}", {"prompt": "{x}"}),
        ("sft.data.0.columns.prompt=a=b", {"prompt": "a=b"}),
        ("sft.data.0.columns.prompt=*", {"prompt": "*"}),
    ],
)
def test_override_values_are_yaml_and_plain_text_needs_no_quotes(write, override, value):
    assert load(write(MINIMAL), [override]).config.sft.data[0].columns == value


def test_anchors_and_merge_keys_share_settings(write):
    text = "name: a\nsft: &t\n  data: &d [{path: x}]\n  lr: 0.1\n"
    config = load(write(text + "reward:\n  <<: *t\n  lr: 0.2\nppo: {data: *d}\n")).config
    assert config.reward.lr == 0.2
    assert config.reward.data == config.ppo.data == config.sft.data


def test_paths_are_relative_to_the_file_or_the_command_line_that_states_them(write, tmp_path):
    write("sft:\n  data: [{path: a.jsonl}]\n", "shared/base.yaml")
    text = "base: ../shared/base.yaml\nname: x\nreward: {data: [{path: ../b.jsonl}]}\n"
    overrides = ["ppo.data.0.path=c.jsonl", "evaluate.prompts.0.path=/d.jsonl", "evaluate.score.path=s.py"]
    config = load(write(text, "configs/demo.yaml"), overrides).config
    assert config.sft.data[0].path == f"{tmp_path}/shared/a.jsonl"
    assert Path(config.reward.data[0].path).resolve() == tmp_path / "b.jsonl"
    assert config.ppo.data[0].path == f"{tmp_path}/c.jsonl"
    assert config.evaluate.prompts[0].path == "/d.jsonl"
    assert config.evaluate.score.path == tmp_path / "s.py"
    assert config.outputs == Path("outputs")  # relative to the working directory, wherever that is


def test_a_model_path_is_a_directory_where_there_is_one_and_a_hub_id_otherwise(write, tmp_path):
    path = write(MINIMAL + "model:\n  path: org/name\n", "configs/demo.yaml")
    assert load(path).config.model.path == "org/name"
    (tmp_path / "configs/org/name").mkdir(parents=True)
    assert load(path).config.model.path == f"{tmp_path}/configs/org/name"
    assert load(path, ["model.path=./gone"]).config.model.path == f"{tmp_path}/gone"


def test_check_paths_names_the_first_file_that_is_not_there(write, tmp_path):
    loaded = load(write(MINIMAL, "configs/demo.yaml"))
    with pytest.raises(DataError) as error:
        check_paths(loaded)
    where = f"(in {tmp_path}/configs)"
    assert str(error.value) == f"configs/demo.yaml:4: sft.data[0].path: no such file: data/sft.jsonl {where}"
    assert error.value.exit_code == 3
    check_paths(loaded, ["reward"])
    write("{}", "configs/data/sft.jsonl")
    check_paths(loaded)


def test_a_hub_id_of_a_dataset_stays_as_it_is(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load(write(MINIMAL, "configs/demo.yaml"), ["sft.data.0.path=org/name"])
    assert loaded.config.sft.data[0].path == "org/name"
    check_paths(loaded, ["sft"])
    write("{}", "configs/org/name/a.jsonl")
    loaded = load(write(MINIMAL, "configs/demo.yaml"), ["sft.data.0.path=configs/org/name"])
    assert loaded.config.sft.data[0].path == f"{tmp_path}/configs/org/name", "what lies here comes first"


@pytest.mark.process
def test_what_looks_like_a_mistyped_local_path_is_met_as_such(write, tmp_path, monkeypatch):
    write("{}", "configs/data/train/a.jsonl")
    config = write(MINIMAL.replace("data/sft.jsonl", "data/trian"), "configs/demo.yaml")
    code = f"import pipeline.config as c; c.check_paths(c.load(c.Path({str(tmp_path / config)!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SHIPPED[0].parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.endswith(
        f"demo.yaml:4: sft.data[0].path: no such file or directory: data/trian (in {tmp_path}/configs), and "
        "not reachable as a hub id either: cannot reach the hub for data/trian: offline; give a local path\n"
    )


def test_a_model_path_whose_directory_is_here_is_met_as_a_mistyped_path(write, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "stages.data.reading.hub.model_problem", lambda path, revision: f"the hub has no {path}"
    )
    write("{}", "models/other/config.json")
    with pytest.raises(DataError) as error:
        check_paths(load(write(MINIMAL), ["model.path=models/mine"]), ["model"])
    assert str(error.value) == (
        f"override model.path=models/mine: model.path: no such directory: models/mine (in {tmp_path}), "
        f"and not "
        "reachable as a hub id either: the hub has no models/mine"
    )
    check_paths(load(write(MINIMAL), ["model.path=elsewhere/mine"]), ["model"])


def test_a_source_of_weight_0_need_not_be_there(write):
    write("{}", "a.jsonl")
    check_paths(load(write("name: tiny\nsft: {data: [{path: a.jsonl}, {path: gone.jsonl, weight: 0}]}\n")))


def test_signs_of_a_pattern_in_the_name_of_the_directory_are_signs_of_the_name(write):
    write("{}", "run[1]/a.jsonl")
    for stated in ("*.jsonl", "a.jsonl", "../run[[]1]/*.jsonl"):
        loaded = load(write(MINIMAL.replace("data/sft.jsonl", f'"{stated}"'), "run[1]/demo.yaml"))
        check_paths(loaded)
        assert [file.name for file in found_at(loaded.config.sft.data[0].path, "train").files] == ["a.jsonl"]
    loaded = load(write(MINIMAL.replace("data/sft.jsonl", "gone.jsonl"), "run[1]/demo.yaml"))
    with pytest.raises(DataError, match="no such file: gone"):
        check_paths(loaded)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sft.data.0.path=data", None),
        ("sft.data.0.path=data/*.jsonl", None),
        ("sft.data.0.path=data/[x.jsonl", None),
        ("sft.data.0.path=data/*.csv", "sft.data[0].path: no file matches: data/*.csv (in {cwd})"),
        ("model.path=org/name", None),
        ("model.path=data", None),
        ("model.path=./gone", "model.path: no such directory: ./gone (in {cwd})"),
        ("model.path=/gone", "model.path: no such directory: /gone"),
        ("model.path=a/b/c", "model.path: no such directory: a/b/c (in {cwd})"),
        ("model.path=a/b.safetensors", "model.path: no such directory: a/b.safetensors (in {cwd})"),
        ("model.path=data/m.gguf", "model.path: no such directory: data/m.gguf (in {cwd})"),
        (
            "model.path=hf://org/name",
            "model.path: no such directory: hf://org/name (in {cwd}); a hub id is organisation/name: "
            "write org/name",
        ),
        (
            "sft.data.0.path=squad",
            "sft.data[0].path: no such file or directory: squad (in {cwd}); a hub id is organisation/name",
        ),
        ("model.path=demo.yaml", "model.path: not a directory: demo.yaml (in {cwd})"),
        ("model.chat_template=t.jinja", "model.chat_template: no such file: t.jinja (in {cwd})"),
        ("model.chat_template=data", "model.chat_template: not a file: data (in {cwd})"),
        (
            "prepare={data: [{path: data}], tokenizer: tokenizer}",
            "prepare.tokenizer: tokenizer.json is a Git LFS pointer, not the file itself; fetch that "
            "with `git lfs "
            "pull`",
        ),
    ],
)
def test_check_paths_takes_files_directories_globs_and_hub_ids(write, tmp_path, override, line):
    write("{}", "data/sft.jsonl")
    write("{}", "data/[x.jsonl")
    write("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n", "tokenizer/tokenizer.json")
    loaded = load(write(MINIMAL), [override])
    if line is None:
        check_paths(loaded)
    else:
        with pytest.raises(DataError) as error:
            check_paths(loaded)
        assert str(error.value) == f"override {override}: {line.format(cwd=tmp_path)}"


def test_the_resolved_config_loads_again_from_anywhere_to_an_equal_config(write, tmp_path):
    path = write(
        MINIMAL + "model: {chat_template: t.jinja}\nevaluate:\n"
        "  prompts: [{path: p.jsonl, columns: {a: '1e5', b: 'null', c: 'yes', d: '0o7'}}]\n"
        '  base_prompt: "Q: {prompt}\\nA:\\t\u2603 "\n  score: {path: s.py}\n',
        "configs/demo.yaml",
    )
    config = load(path, ["name=1e5", "sft.adam_eps=1e-12", "prepare=null"]).config
    again = load(write(resolved_yaml(config), "outputs/runs/x/config.yaml")).config
    assert again == config
    assert again.evaluate.prompts[0].columns == {"a": "1e5", "b": "null", "c": "yes", "d": "0o7"}
    assert again.identity() == config.identity()


def test_the_manual_is_current():
    assert config_docs.PATH.read_text() == config_docs.markdown(), "run: python -m pipeline.config_docs"


def test_every_setting_is_described():
    rows = [row for row in config_docs.markdown().splitlines() if row.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_the_json_schema_describes_every_section_and_forbids_the_unknown():
    schema = json.loads(json.dumps(json_schema()))
    assert {"base", "name", *STAGE_FIELDS} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["SFTConfig"]["properties"]["lr"]["description"] == "Peak learning rate."
    assert "required" not in schema and "required" not in schema["$defs"]["SFTConfig"]


def test_every_deadline_has_a_bound_that_timers_can_hold():
    """A poll takes 32 bits of milliseconds, setitimer fails on more than it can hold."""
    sections = json_schema()["$defs"].values()
    seconds = {k: v for s in sections for k, v in s["properties"].items() if k.endswith("_s")}
    assert len(seconds) > 8 and all(1000 * value["maximum"] < 2**31 for value in seconds.values())


def test_every_stage_has_its_resources():
    assert set(STAGE_FIELDS) <= set(ResourcesConfig.model_fields) & set(ExperimentConfig.model_fields)


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_config_loads(path):
    loaded = load(path)
    if path.stem == "demo":  # the others name data that does not travel with the project
        check_paths(loaded)


@given(st.text(max_size=300), st.integers(min_value=8, max_value=100))
def test_short_text_is_one_printable_line(text, limit):
    line = short(text, limit)
    assert line.isprintable() and len(line) <= limit


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_any_text_gives_a_config_or_one_line(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"any\.yaml") as error:
        load(path)
    assert str(error.value).isprintable()


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_override_gives_a_config_or_one_line(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "minimal.yaml"
    path.write_text(MINIMAL)
    for override in (f"{key}={value}", f"sft.{key}={value}", f"sft.data.0.columns.x={value}", key):
        try:
            load(path, [override])
        except ConfigError as error:
            assert str(error).isprintable()
