"""A model directory is judged by its files before anything loads it: one line, exit code 2."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import Store
from pipeline.errors import MissingStage
from pipeline.identity import SCHEMA_VERSION
from pipeline.manifest import MANIFEST, Manifest, manifest_text
from pipeline.model_files import check_model_directory
from pipeline.model_path import model_directory
from rollout.ground.whole import measure
from rollout.safetensors_header import BadHeader, read_header


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header; `length` is what it says of itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_manifest(directory: Path, stage: str) -> None:
    """What publishing writes: the files of `directory` as they are."""
    paths = [path for path in directory.iterdir() if path.is_file()]
    manifest = Manifest(
        digest="",
        schema_version=SCHEMA_VERSION,
        stage=stage,
        fingerprint="f" * 16,
        recipe_version=1,
        settings={},
        seeds={},
        inputs={},
        contents={},
        exactness="exact",
        packages={},
        machine={},
        git_commit=None,
        started_at="",
        seconds=1,
        metrics={},
        files={path.name: measure(path) for path in paths},
    )
    (directory / MANIFEST).write_text(manifest_text(manifest))


GOOD = packed({"__metadata__": {"format": "pt"}, "a": tensor(), "b": tensor(8, 12, (1, 1))}, bytes(12))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A sound model directory, as far as its files tell."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    return tmp_path


def complaint(directory: Path) -> str:
    with pytest.raises(MissingStage) as refused:
        check_model_directory(directory, named="--input sft=x")
    line = str(refused.value)
    assert refused.value.exit_code == 2
    assert line.startswith("--input sft=x: ") and line.isprintable() and len(line) < 500
    return line


def test_a_sound_directory_passes(directory: Path):
    check_model_directory(directory, named="x")
    assert model_directory(str(directory), None) == directory
    assert read_header(directory / "model.safetensors")["b"].shape == (1, 1)


PICKLES = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth",
           "model.ckpt", "model.pkl", "Model.BIN"]  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_weights_that_are_pickles_are_refused(directory: Path, name: str):
    (directory / "model.safetensors").rename(directory / name)
    line = complaint(directory)
    assert f"{name} is a pickle, which can run code" in line and "save_pretrained" in line


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_beside_safetensors_is_refused(directory: Path, name: str):
    (directory / name).write_bytes(b"not even a pickle")
    assert f"{name} is a pickle, which can run code; remove it" in complaint(directory)


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt", "README.md"]
)
def test_what_a_trainer_leaves_beside_the_weights_is_let_be(directory: Path, name: str):
    (directory / name).write_bytes(b"")
    check_model_directory(directory, named="x")


def test_a_pickle_beside_safetensors_in_the_cache_of_the_hub_is_let_be(
    directory: Path, monkeypatch: pytest.MonkeyPatch
):
    """Other programs fetch it into the same snapshot."""
    (directory / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(directory))
    assert model_directory("owner/name", None) == directory
    (directory / "model.safetensors").unlink()
    with pytest.raises(MissingStage, match=r"pytorch_model\.bin is a pickle"):
        model_directory("owner/name", None)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json",
     "preprocessor_config.json", "video_preprocessor_config.json"],
)  # fmt: skip
@pytest.mark.parametrize("deep", [False, True])
def test_auto_map_is_refused_in_any_configuration_at_any_depth(directory: Path, name: str, deep: bool):
    code = {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}
    (directory / name).write_text(json.dumps({"text_config": [code]} if deep else code))
    assert f"{name} has auto_map" in complaint(directory)


def test_a_vocabulary_may_hold_the_word_auto_map(directory: Path):
    (directory / "vocab.json").write_text('{"auto_map": 7}')
    check_model_directory(directory, named="x")


def test_an_adapter_is_refused_for_it_names_another_model(directory: Path):
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    assert "adapter_config.json: an adapter" in complaint(directory)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "config.json is not JSON"),
        (b"{", "config.json is not JSON"),
        (b"\xff\xfe\x00", "config.json is not JSON"),
        (b"[" * 100_000, "config.json is not JSON"),
        (b"9" * 10_000, "config.json is not JSON"),
        (b"[]", "config.json is not a JSON object"),
        (b'"text"', "config.json is not a JSON object"),
        (b'{"a": "' + b"x" * (16 << 20) + b'"}', "config.json: no configuration file"),
    ],
    ids=range(8),
)
def test_a_config_that_is_no_json_object_is_refused(directory: Path, content: bytes, said: str):
    (directory / "config.json").write_bytes(content)
    assert said in complaint(directory)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes are too few for a header"),
        (b"1234567", "7 bytes are too few for a header"),
        (packed({}, length=2**63), "a header of 9223372036854775808 bytes in a file of 10"),
        (packed({}, length=3), "a header of 3 bytes in a file of 10"),
        (packed(b"{x}"), "its header is not JSON"),
        (packed(b"[" * 100_000), "its header is not JSON"),
        (packed(b"\xff\xff"), "its header is not JSON"),
        (packed([]), "its header is not a JSON object"),
        (packed({"a": 1}), "'a': not a dtype, a shape and offsets"),
        (packed({"a": tensor(shape=[-2])}, bytes(8)), "'a': not a dtype, a shape and offsets"),
        (packed({"a": tensor(shape=[True, 2])}, bytes(8)), "'a': not a dtype, a shape and offsets"),
        (packed({"a": tensor(dtype="PICKLE")}, bytes(8)), "'a': not a dtype, a shape and offsets"),
        (packed({"a": tensor(-8, 0)}, bytes(8)), "'a': not a dtype, a shape and offsets"),
        (packed({"a": tensor(8, 0)}, bytes(8)), "'a': -8 bytes do not hold F32 [2]"),
        (packed({"a": tensor(shape=[2**40, 2**40])}, bytes(8)), "'a': 8 bytes do not hold F32"),
        (packed({"a": tensor()}, bytes(7)), "its tensors take 8 bytes, and it has 7"),
        (packed({"a": tensor()}, bytes(9)), "its tensors take 8 bytes, and it has 9"),
        (packed({"a": tensor(), "b": tensor()}, bytes(8)), "'b': starts at byte 0, where 8 was expected"),
        (packed({"a": tensor(), "b": tensor(4, 12)}, bytes(12)), "'b': starts at byte 4, where 8"),
        (packed({"a": tensor(4, 12)}, bytes(12)), "'a': starts at byte 4, where 0 was expected"),
        (packed({"a\n\x1b[2J": tensor(4, 12)}, bytes(12)), r"'a\n\x1b[2J': starts at byte 4"),
        (GOOD[:-1], "its tensors take 12 bytes, and it has 11"),
        (GOOD[:20], "a header of"),
    ],
    ids=range(23),
)
def test_weights_that_are_not_whole_are_refused(directory: Path, content: bytes, said: str):
    (directory / "model.safetensors").write_bytes(content)
    assert f"model.safetensors is not a whole safetensors file ({said}" in complaint(directory)


@given(data=st.binary(max_size=200) | st.binary(max_size=60).map(packed))
def test_no_bytes_at_all_do_more_than_be_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        assert sum(entry.end - entry.begin for entry in read_header(path).values()) <= len(data)
    except BadHeader as error:
        assert str(error)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "gone.safetensors", 7]
)
def test_an_index_may_only_name_files_of_its_directory(directory: Path, name: object):
    (directory.parent / "secret.safetensors").write_bytes(GOOD)
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names {name!r}, which is no file of this directory" in complaint(directory)


def test_an_index_of_its_own_files_passes(directory: Path):
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    check_model_directory(directory, named="x")


@pytest.mark.parametrize("stage", ["sft", "prepare"])
def test_a_manifest_does_not_vouch_for_code(directory: Path, tmp_path_factory, stage: str):
    """An artifact from elsewhere, whole by its own manifest, is judged like any other directory."""
    (directory / "config.json").write_text('{"auto_map": {}}')
    write_manifest(directory, stage)
    with pytest.raises(MissingStage, match=r"config\.json has auto_map"):
        Store(tmp_path_factory.mktemp("outputs")).identify(stage, directory)


def test_a_pointer_to_a_pickle_is_called_a_pointer_where_it_is_all_there_is(directory: Path):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    assert "pytorch_model.bin is a Git LFS pointer" in complaint(directory)


def test_weights_that_nothing_finds_are_refused(directory: Path):
    for name in ("model-00001-of-00002.safetensors", "weights.safetensors"):
        (directory / "model.safetensors").rename(directory / name)
        line = complaint(directory)
        assert "neither model.safetensors nor model.safetensors.index.json" in line and name in line
        (directory / name).rename(directory / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "is_refused"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, True),
        ({"quantization_config": {"load_in_4bit": True}}, True),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, True),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, True),
        ({"quantization_config": {"quant_method": "fp8"}}, False),
        ({"quantization_config": None}, False),
        ({"quantization_config": {}}, False),
    ],
)
def test_quantised_weights_are_refused_unless_they_are_read_as_plain_ones(
    directory: Path, config: dict[str, object], is_refused: bool
):
    (directory / "config.json").write_text(json.dumps(config))
    if not is_refused:
        check_model_directory(directory, named="x")
        return
    assert complaint(directory).endswith(
        "quantised weights, which cannot be trained; give the unquantised model"
    )


def test_an_adapter_alone_is_called_one(directory: Path):
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text("{}")
    assert "adapter_config.json: an adapter" in complaint(directory)


@pytest.mark.parametrize(
    ("below", "said"),
    [
        (["snapshots/0af1"], "snapshots/0af1"),
        (["models--org--name/snapshots/0af1"], "models--org--name/snapshots/0af1"),
        (["checkpoint-500", "checkpoint-1000"], "checkpoint-1000, one of 2 models below it"),
        ([], None),
    ],
)
def test_a_directory_that_holds_models_names_one(tmp_path: Path, below: list[str], said: str | None):
    for name in below:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    expected = "an artifact or a model directory (save_pretrained)" if said is None else f"{tmp_path}/{said}"
    assert complaint(tmp_path) == f"--input sft=x: no config.json; give {expected}"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"])
def test_a_git_lfs_pointer_is_named_in_a_model_directory(directory: Path, name: str):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123456\n"
    (directory / name).write_bytes(pointer)
    assert f"{name} is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`" in complaint(
        directory
    )
