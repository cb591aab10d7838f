"""Artifacts: whole or absent, verified, locked, identified by content."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_chain import Chain, write_model

from pipeline import dag, identity
from pipeline.artifacts import Store
from pipeline.digest_cache import DigestCache
from pipeline.errors import CorruptArtifact, MissingStage
from pipeline.manifest import MANIFEST, Manifest, exactness_of
from pipeline.model_path import model_directory
from rollout.ground.errors import EnvironmentProblem
from stages.errors import DataError


@pytest.fixture
def node(chain: Chain) -> identity.Node:
    return identity.plan(chain.config(), dag.select(chain.config(), ["prepare"]), {})["prepare"]


def finish(store: Store, node: identity.Node, content: str = "weights") -> None:
    """Everything a stage does before its artifact is published."""
    work = store.begin(node.stage, node.fingerprint)
    (work / "out" / "nested").mkdir()
    (work / "out" / "model.safetensors").write_text(content)
    (work / "out" / "nested" / "tokens.bin").write_bytes(b"\x01\x02")
    (work / "metrics.jsonl").write_text('{"step": 1}\n')
    (work / "checkpoints" / "step-1").write_text("state")
    store.seal(
        node,
        resolved=node.settings.model_dump(mode="json"),
        metrics={"loss": 0.5},
        started=time.time(),
        exactness="exact",
    )


def published(store: Store, node: identity.Node, content: str = "weights") -> Path:
    finish(store, node, content)
    store.publish(node, replace=False)
    return store.artifact_dir(node.stage, node.fingerprint)


def test_a_published_artifact_is_found_with_its_manifest_and_metrics(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    assert store.find(node.stage, node.fingerprint) is None
    directory = published(store, node)
    manifest = store.find(node.stage, node.fingerprint)
    assert manifest is not None
    assert manifest.metrics == {"loss": 0.5}
    assert set(manifest.files) == {"model.safetensors", "nested/tokens.bin", "metrics.jsonl"}
    assert manifest.files["nested/tokens.bin"].size == 2
    assert manifest.settings["prepare"]["heldout_frac"] == 0.1
    assert "torch" in manifest.packages
    assert directory.name == f"prepare-{node.fingerprint}"
    assert not store.work_dir(node.stage, node.fingerprint).exists()


def test_an_interrupted_stage_is_not_an_artifact(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    work = store.begin(node.stage, node.fingerprint)
    (work / "out" / "model.safetensors").write_text("half")
    (work / "checkpoints" / "step-1").write_text("state")
    assert store.find(node.stage, node.fingerprint) is None
    assert not store.left_complete(node.stage, node.fingerprint)
    store.begin(node.stage, node.fingerprint)
    assert not (work / "out" / "model.safetensors").exists()
    assert (work / "checkpoints" / "step-1").exists()


def test_a_kill_between_manifest_and_rename_leaves_only_the_rename_to_do(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    finish(store, node)
    assert store.find(node.stage, node.fingerprint) is None
    assert store.left_complete(node.stage, node.fingerprint)
    store.publish(node, replace=False)
    assert store.find(node.stage, node.fingerprint) is not None


def test_a_damaged_leftover_is_not_published(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    finish(store, node)
    (store.work_dir(node.stage, node.fingerprint) / "out/model.safetensors").write_text("WEIGHTS")
    assert not store.left_complete(node.stage, node.fingerprint)


@pytest.mark.parametrize("renames_before_the_kill", [0, 1])
def test_a_kill_while_replacing_never_leaves_a_half_artifact(
    tmp_path: Path, node: identity.Node, monkeypatch: pytest.MonkeyPatch, renames_before_the_kill: int
):
    store = Store(tmp_path / "outputs")
    directory = published(store, node, "old")
    finish(store, node, "new")
    real, done = os.rename, []

    def killed_rename(source: Path, target: Path) -> None:
        if len(done) == renames_before_the_kill:
            raise KeyboardInterrupt
        done.append(source)
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killed_rename)
        with pytest.raises(KeyboardInterrupt):
            store.publish(node, replace=True)
    found = store.find(node.stage, node.fingerprint)
    assert (found is not None) == (renames_before_the_kill == 0)
    assert store.left_complete(node.stage, node.fingerprint)
    store.publish(node, replace=True)
    assert (directory / "model.safetensors").read_text() == "new"


def test_an_artifact_that_is_already_there_is_taken(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    directory = published(store, node, "first")
    finish(store, node, "second")
    store.publish(node, replace=False)
    assert (directory / "model.safetensors").read_text() == "first"


def test_a_corrupt_artifact_that_is_already_there_is_not_taken(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    directory = published(store, node)
    (directory / "model.safetensors").write_text("weighty")
    finish(store, node)
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        store.publish(node, replace=False)


def test_a_flipped_byte_is_found_and_the_file_named(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    path = published(store, node) / "nested/tokens.bin"
    path.write_bytes(b"\x01\x03")
    with pytest.raises(
        CorruptArtifact, match=r"nested/tokens\.bin: not the bytes .* --force prepare"
    ) as caught:
        store.find(node.stage, node.fingerprint)
    assert caught.value.exit_code == 4


def test_a_flipped_byte_under_an_old_date_is_found(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    path = published(store, node) / "nested/tokens.bin"
    os.utime(path, (1, 1))
    assert store.find(node.stage, node.fingerprint) is not None
    path.write_bytes(b"\x01\x03")
    os.utime(path, (1, 1))
    with pytest.raises(CorruptArtifact, match="tokens"):
        store.find(node.stage, node.fingerprint)


@pytest.mark.parametrize("name", ["model.safetensors", MANIFEST])
def test_a_missing_file_is_named(tmp_path: Path, node: identity.Node, name: str):
    store = Store(tmp_path / "outputs")
    (published(store, node) / name).unlink()
    with pytest.raises(CorruptArtifact, match=rf"{name}: missing"):
        store.find(node.stage, node.fingerprint)


def test_a_cut_manifest_is_an_error_and_not_a_traceback(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    path = published(store, node) / MANIFEST
    path.write_text(path.read_text()[:100])
    with pytest.raises(CorruptArtifact, match=r"manifest\.json: not a record"):
        store.find(node.stage, node.fingerprint)


def test_an_edited_manifest_is_an_error(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    path = published(store, node) / MANIFEST
    path.write_text(path.read_text().replace('"loss": 0.5', '"loss": 0.4'))
    with pytest.raises(CorruptArtifact, match=r"manifest\.json: not the record that was written"):
        store.find(node.stage, node.fingerprint)


@pytest.mark.parametrize("version", [1, 3])
def test_a_manifest_of_another_schema_version_is_named_beside_ours(
    tmp_path: Path, node: identity.Node, monkeypatch: pytest.MonkeyPatch, version: int
):
    store = Store(tmp_path / "outputs")
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.artifacts.SCHEMA_VERSION", version)
        patched.setattr("pipeline.manifest.SCHEMA_VERSION", version)
        published(store, node)
    with pytest.raises(CorruptArtifact, match=f"schema version {version}, this code reads 2"):
        store.find(node.stage, node.fingerprint)


def test_a_file_that_is_not_listed_is_named(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    (published(store, node) / "generation_config.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match=r"generation_config\.json: not listed in manifest\.json"):
        store.find(node.stage, node.fingerprint)


def test_an_artifact_in_the_place_of_another_is_not_taken(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    other = "0" * 16
    published(store, node).rename(store.artifact_dir("sft", other))
    with pytest.raises(CorruptArtifact, match=f"sft-{other}: .* is that of prepare-{node.fingerprint}"):
        store.find("sft", other)


def test_an_unchanged_file_is_digested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "big"
    path.write_text("x")
    os.utime(path, (1, 1))
    with DigestCache(tmp_path / "digests.json") as digest_of:
        digest = digest_of(path)
    monkeypatch.setattr("pipeline.digest_cache.file_digest", lambda path: "read again")
    assert DigestCache(tmp_path / "digests.json")(path) == digest
    path.write_text("y")
    assert DigestCache(tmp_path / "digests.json")(path) == "read again"


def test_a_run_link_is_relative_and_replaced_in_one_step(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    store.link("demo", "prepare", "0" * 16)
    store.link("demo", "prepare", node.fingerprint)
    link = tmp_path / "outputs/runs/demo/prepare"
    assert os.readlink(link) == f"../../artifacts/prepare-{node.fingerprint}"
    assert [path.name for path in link.parent.iterdir()] == ["prepare"]


@pytest.mark.process
def test_a_held_lock_names_its_holder(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    hold = (
        "import sys; from pathlib import Path; from pipeline.artifacts import Store\n"
        "with Store(Path(sys.argv[1])).lock('prepare', sys.argv[2], timeout_s=5):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(store.root), node.fingerprint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    match = f"prepare: process {holder.pid} .* is working on the same stage .waited 0.3 s"
    with (
        pytest.raises(EnvironmentProblem, match=match),
        store.lock("prepare", node.fingerprint, timeout_s=0.3),
    ):
        pass
    holder.kill()
    holder.communicate()
    with store.lock("prepare", node.fingerprint, timeout_s=5):
        pass


def test_an_unwritable_outputs_directory_is_one_line(tmp_path: Path, node: identity.Node):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(EnvironmentProblem, match="outputs=DIR") as caught:
        Store(tmp_path / "outputs").begin(node.stage, node.fingerprint)
    assert "\n" not in str(caught.value)


def test_a_given_artifact_counts_as_its_own_fingerprint(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    given = store.identify("prepare", published(store, node))
    assert given.fingerprint == node.fingerprint


def test_a_given_model_counts_by_content_wherever_it_lies(tmp_path: Path):
    store = Store(tmp_path / "outputs")
    one = store.identify("sft", write_model(tmp_path / "a"))
    same = store.identify("sft", write_model(tmp_path / "b"))
    other = store.identify("sft", write_model(tmp_path / "c", "other weights"))
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([], "no config.json"),
        (["config.json"], "no \\*.safetensors"),
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin is a pickle"),
    ],
)
def test_what_is_no_model_directory_is_refused(tmp_path: Path, files: list[str], complaint: str):
    (tmp_path / "given").mkdir()
    for name in files:
        (tmp_path / "given" / name).write_text("{}")
    with pytest.raises(MissingStage, match=complaint):
        Store(tmp_path / "outputs").identify("sft", tmp_path / "given")


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(MissingStage, match="no such directory"):
        Store(tmp_path / "outputs").identify("sft", tmp_path / "nowhere")
    with pytest.raises(DataError, match="no such directory"):
        model_directory(str(tmp_path / "nowhere"), None)


def test_exactness_is_promised_only_for_small_fp32_models_on_cpu_in_sync_mode(tmp_path: Path):
    settings = {
        "precision": "fp32",
        "num_workers": 1,
        "num_gpus": 0.0,
        "max_staleness": 0,
        "weights": [],
        "inputs": ["exact"],
    }
    assert exactness_of(**settings) == "exact"
    large = tmp_path / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(2**27)
    for change in (
        {"precision": "bf16"},
        {"num_workers": 2},
        {"num_gpus": 1.0},
        {"max_staleness": 1},
        {"weights": [large]},
        {"inputs": ["exact", "same order"]},
    ):
        assert exactness_of(**settings | change) == "same order"


def test_infinite_metrics_survive_the_manifest(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    store.begin(node.stage, node.fingerprint)
    store.seal(
        node, resolved={}, metrics={"perplexity": float("inf")}, started=time.time(), exactness="exact"
    )
    assert store.publish(node, replace=False).metrics == {"perplexity": float("inf")}


def test_the_manifest_is_plain_json(tmp_path: Path, node: identity.Node):
    store = Store(tmp_path / "outputs")
    content = json.loads((published(store, node) / MANIFEST).read_text())
    assert set(content) == set(Manifest.model_fields)
