"""Names, links and manifests cannot lead a run out of the directory that `outputs:` names."""

import json
import os
from pathlib import Path

import pytest
from blake3 import blake3
from fake_chain import Chain, write_model
from test_cli import complaint, rlhf

from pipeline import config as configs
from pipeline import progress
from pipeline.artifacts import Store
from pipeline.errors import ConfigError, CorruptArtifact
from pipeline.manifest import MANIFEST, read_manifest
from pipeline.model_path import model_directory
from pipeline.planning import plan_run
from stages.config.score import ScoreFunction
from stages.data.scoring import load_judge
from stages.errors import DataError


@pytest.mark.parametrize(
    "name",
    ["../x", "..", ".", ".hidden", "/etc/x", "a/b", "a\\b", "a b", "a\n", "-x", "~root", "$HOME", "x" * 101,
     "\uff44\uff45mo", "dem\u043e", "a\u202eb", "a\u200b", "CON:", "*"],
)  # fmt: skip
def test_a_run_name_that_is_no_plain_name_is_code_2(chain: Chain, capsys, name: str):
    path = chain.directory / "named.yaml"
    path.write_text(json.dumps({"base": "demo.yaml", "name": name}))
    code, stderr = complaint(capsys, "run", "named.yaml")
    assert code == 2 and "name" in stderr and stderr[:-1].isprintable()
    assert not chain.outputs.exists()


@pytest.mark.parametrize("part", ["runs", "artifacts", "work"])
def test_a_link_that_leads_a_part_of_outputs_elsewhere_is_code_4(chain: Chain, capsys, part: str):
    elsewhere = chain.directory / "elsewhere"
    elsewhere.mkdir()
    chain.outputs.mkdir()
    (chain.outputs / part).symlink_to(elsewhere)
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 4 and "leads out of" in stderr and "symbolic link" in stderr
    assert not list(elsewhere.iterdir())
    assert chain.calls() == []


def test_a_link_in_the_place_of_a_run_is_code_4(chain: Chain, capsys):
    elsewhere = chain.directory / "elsewhere"
    elsewhere.mkdir()
    (chain.outputs / "runs").mkdir(parents=True)
    (chain.outputs / "runs/demo").symlink_to(elsewhere)
    assert complaint(capsys, "run", "demo.yaml")[0] == 4
    assert not list(elsewhere.iterdir())


def test_a_link_in_the_place_of_an_artifact_or_of_its_work_is_code_4(chain: Chain, capsys):
    rlhf(capsys, "run", "demo.yaml", "--until", "prepare")
    artifact = next(chain.outputs.glob("artifacts/prepare-*"))
    moved = chain.directory / "moved"
    artifact.rename(moved)
    artifact.symlink_to(moved)
    code, stderr = complaint(capsys, "run", "demo.yaml", "--force", "prepare")
    assert code == 4 and str(artifact) in stderr
    assert (moved / MANIFEST).is_file()

    artifact.unlink()
    work = chain.outputs / "work" / artifact.name
    work.symlink_to(moved)
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 4 and str(work) in stderr
    assert (moved / MANIFEST).is_file()


@pytest.mark.parametrize(
    "rest", [".lock", "/checkpoints", "/journal", "/out", "/blocks-0", "/metrics.jsonl", "/journal/x/y.tmp"]
)
def test_a_link_out_of_a_work_directory_is_code_4_and_what_it_leads_to_is_left_alone(
    chain: Chain, capsys, rest: str
):
    elsewhere = chain.directory / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.tmp").write_text("mine")
    node = plan_run(chain.config()).nodes["prepare"]
    link = chain.outputs / "work" / f"prepare-{node.fingerprint}{rest}"
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 4 and f"{link}: leads out of" in stderr
    assert [path.name for path in elsewhere.iterdir()] == ["mine.tmp"]
    assert chain.calls() == []


@pytest.mark.parametrize("below", ["logs", "logs/ray", "logs/sft.log"])
def test_a_link_in_the_place_of_a_runs_logs_is_code_4(chain: Chain, capsys, below: str):
    elsewhere = chain.directory / "elsewhere"
    (elsewhere / "ray").mkdir(parents=True)
    link = chain.outputs / "runs/demo" / below
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 4 and f"{link}: leads out of" in stderr
    assert [path.name for path in elsewhere.rglob("*")] == ["ray"]
    assert chain.calls() == []


def test_a_link_that_stays_within_outputs_is_followed(chain: Chain, capsys):
    (chain.outputs / "runs/demo").mkdir(parents=True)
    (chain.outputs / "all logs").mkdir()
    (chain.outputs / "runs/demo/logs").symlink_to("../../all logs")
    assert rlhf(capsys, "run", "demo.yaml", "--until", "prepare")[0] == 0


def test_outputs_itself_may_be_a_link(chain: Chain, capsys):
    (chain.directory / "big disk").mkdir()
    chain.outputs.symlink_to("big disk")
    assert rlhf(capsys, "run", "demo.yaml", "--until", "sft")[0] == 0
    assert (chain.directory / "big disk/runs/demo/sft/config.json").is_file()


def test_a_file_in_the_place_of_a_runs_link_is_left_as_it_is(chain: Chain, capsys):
    (chain.outputs / "runs/demo/prepare").mkdir(parents=True)
    (chain.outputs / "runs/demo/prepare/mine.txt").write_text("mine")
    code, stderr = complaint(capsys, "run", "demo.yaml", "--until", "prepare")
    assert code == 4 and "runs/demo" in stderr
    assert (chain.outputs / "runs/demo/prepare/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "./a", "a//b", "..", ".", "", "a\0b", "nested/"]
)
def test_a_manifest_may_only_list_files_below_its_artifact(chain: Chain, capsys, name: str):
    rlhf(capsys, "run", "demo.yaml", "--until", "prepare")
    artifact = next(chain.outputs.glob("artifacts/prepare-*"))
    manifest = json.loads((artifact / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["config.json"]
    text = json.dumps(manifest | {"digest": ""})
    digest = blake3(text.encode()).hexdigest()  # forged by somebody who knows how
    (artifact / MANIFEST).write_text(text.replace('"digest": ""', f'"digest": "{digest}"', 1))
    with pytest.raises(CorruptArtifact, match="not a manifest of this version"):
        read_manifest(artifact, hint="")
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 4 and str(artifact / MANIFEST) in stderr


@pytest.mark.parametrize("name", ["adapter_config.json", "model-2.safetensors", "nested/model.py"])
def test_a_file_that_was_added_to_an_artifact_is_noticed(chain: Chain, capsys, name: str):
    rlhf(capsys, "run", "demo.yaml", "--until", "prepare")
    added = next(chain.outputs.glob("artifacts/prepare-*")) / name
    added.parent.mkdir(exist_ok=True)
    added.write_text("{}")
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 4 and f"{added}: not listed in {MANIFEST}" in stderr


@pytest.mark.parametrize("given", ["sft=a\0b", "sft=a\nb", "sft=\x1b[2J", "../sft=x", "=x", "sft="])
def test_an_input_that_is_no_path_is_code_2(chain: Chain, capsys, given: str):
    code, stderr = complaint(capsys, "reward", "demo.yaml", "--input", given)
    assert code == 2 and stderr[:-1].isprintable()


@pytest.mark.parametrize("revision", ["../../x", "a/../b", "/etc", "-x", "a b", "a\nb"])
def test_a_revision_that_would_leave_the_hubs_cache_is_a_data_error(revision: str):
    with pytest.raises(DataError, match=r"model\.revision"):
        model_directory("owner/name", revision)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", '{"auto_map": {"AutoConfig": "evil.Config"}}', "config.json has auto_map"),
        ("tokenizer_config.json", '{"auto_map": {}}', "tokenizer_config.json has auto_map"),
        ("adapter_config.json", "{}", "adapter_config.json: an adapter"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("model.safetensors", "pickle", "model.safetensors is not a whole safetensors file"),
    ],
)
def test_a_model_that_is_not_safe_to_load_is_code_2_wherever_it_is_given(
    chain: Chain, capsys, name: str, content: str, said: str
):
    model = write_model(chain.directory / "evil")
    (model / name).write_text(content)
    for arguments in (
        ("check", "demo.yaml", "model.path=evil"),
        ("run", "demo.yaml", "model.path=evil"),
        ("reward", "demo.yaml", "--input", "sft=evil"),
        ("generate", "evil", "hello"),
    ):
        code, stderr = complaint(capsys, *arguments)
        assert code == 2 and said in stderr, stderr
    assert chain.calls() == []


def test_text_of_a_dataset_in_a_metrics_name_cannot_steer_the_terminal(chain: Chain, capsys):
    assert progress.shown({"step": 1, "reward/accuracy_\x1b[2Jx\ny": 1.0}).isprintable()
    chain.order("sft", metrics={"accuracy_\x1b]0;owned\x07": 0.5})
    code, stdout, _ = rlhf(capsys, "run", "demo.yaml", "--until", "sft")
    assert code == 0 and "\x1b" not in stdout


@pytest.mark.parametrize("name", ["../x", "a b", "<script>", "\x1b[2J", "", "x" * 65, 7])
def test_a_part_of_a_score_has_a_plain_name(tmp_path: Path, name: object):
    (tmp_path / "score.py").write_text(
        f"def score(prompt, response, row):\n    return {{'score': 1, {name!r}: 1}}\n"
    )
    judge = load_judge(ScoreFunction(path=tmp_path / "score.py"), key="evaluate.score")
    with pytest.raises(DataError, match="a part is called"):
        judge("a", "b", {})


def test_stages_are_taken_from_the_table_only(tmp_path: Path, chain: Chain, capsys):
    for arguments in (("run", "demo.yaml", "--until", "../x"), ("run", "demo.yaml", "--force", "/etc")):
        code, stderr = complaint(capsys, *arguments)
        assert code == 2 and "no such stage" in stderr
    assert Store(tmp_path).find("sft", "0" * 16) is None


def test_a_working_directory_whose_name_is_not_utf_8_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Records of a run hold absolute paths, and are UTF-8."""
    directory = tmp_path / os.fsdecode(b"w\xff")
    directory.mkdir()
    monkeypatch.chdir(directory)
    (directory / "demo.yaml").write_text("name: u\nsft: {max_steps: 3, data: [{path: sft.jsonl}]}\n")
    with pytest.raises(
        ConfigError, match=r"demo\.yaml:2: sft\.data\[0\]\.path: .*: a name in it is not UTF-8; rename"
    ):
        configs.load(Path("demo.yaml"))
    (tmp_path / "demo.yaml").write_text("name: u\nsft: {max_steps: 3, data: [{path: sft.jsonl}]}\n")
    with pytest.raises(ConfigError, match=r"^outputs: .*: a name in it is not UTF-8; rename it"):
        configs.load(tmp_path / "demo.yaml")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("sft", "demo.yaml", "--input", "pretrain={}"), "--input pretrain: m\\udcff: a name in it"),
        (("generate", "{}", "hello"), "MODEL_DIR: m\\udcff: a name in it"),
    ],
)
def test_a_model_directory_whose_name_is_not_utf_8_is_named(chain: Chain, capsys, arguments, line):
    name = os.fsdecode(b"m\xff")
    write_model(chain.directory / name)
    code, stderr = complaint(capsys, *(argument.format(name) for argument in arguments))
    assert (code, stderr) == (2, f"{line} is not UTF-8; rename it\n")


def test_a_scoring_function_that_imports_what_lies_beside_it_is_told_where_modules_are_looked_for(
    tmp_path: Path,
):
    (tmp_path / "words.py").write_text("GOOD = 1\n")
    (tmp_path / "score.py").write_text("import words\ndef score(prompt, response, row):\n    return 1.0\n")
    with pytest.raises(
        DataError, match=r"No module named 'words'; words lies beside it, .* or put .* on PYTHONPATH"
    ):
        load_judge(ScoreFunction(path=tmp_path / "score.py"), key="evaluate.score")
