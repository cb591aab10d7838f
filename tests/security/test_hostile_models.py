"""Model directories whose files are whole and senseless: one line that names the directory, code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout.ground.errors import EnvironmentProblem
from rollout.weight_file import checkpoint_layout
from stages.data.chat.directories import read_template, tokenizer_digest
from stages.data.chat.tokenizer import ChatTokenizer
from stages.errors import ModelError
from stages.training.models import ScoreNormaliser, load_causal_lm, load_reward_model


@pytest.fixture
def edited(tied_model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model directory, some keys of one of its JSON files replaced."""

    def edit(name: str, **values: Any) -> Path:
        directory = tmp_path / "model"
        shutil.copytree(tied_model_dir, directory)
        content = json.loads((directory / name).read_text()) | values
        (directory / name).write_text(json.dumps(content))
        return directory

    return edit


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "../../evil"},
        {"model_type": None},
        {"model_type": "evil", "architectures": ["os.system"]},
        {"hidden_size": "64"},
        {"hidden_size": -64},
        {"hidden_size": 10**9},
        {"num_hidden_layers": None},
        {"num_attention_heads": 0},
        {"vocab_size": 10**12},
        {"vocab_size": [1]},
        {"hidden_act": "__import__('os')"},
        {"max_position_embeddings": -1, "head_dim": "x"},
        {"rope_parameters": {"rope_type": "evil"}},
    ],
    ids=str,
)
def test_a_config_of_senseless_values_is_an_error_of_the_model(
    edited: Callable[..., Path], values: dict[str, Any]
):
    directory = edited("config.json", **values)
    for load in (load_causal_lm, load_reward_model):
        with pytest.raises(ModelError) as refused:
            load(directory)
        assert str(directory) in str(refused.value) and refused.value.exit_code == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": 1}', b"[" * 100_000])
def test_a_tokenizer_that_is_none_is_an_error_of_the_model(edited: Callable[..., Path], content: bytes):
    directory = edited("config.json")
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"no tokenizer that can be loaded|no tokenizer\.json"):
        ChatTokenizer.load(directory)


@pytest.mark.parametrize("eos", ["text", [None], {"a": 1}, 1.5, [[1]]])
def test_stop_tokens_that_are_no_token_ids_are_an_error_of_the_model(edited: Callable[..., Path], eos: Any):
    with pytest.raises(ModelError, match="eos_token_id is no token id"):
        ChatTokenizer.load(edited("generation_config.json", eos_token_id=eos))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b"9" * 10_000])
def test_files_of_a_model_that_are_no_json_objects_are_errors_of_the_model(
    edited: Callable[..., Path], content: bytes
):
    directory = edited("config.json")
    for name, load in (
        ("generation_config.json", ChatTokenizer.load),
        ("tokenizer.json", tokenizer_digest),
        ("score_normaliser.json", ScoreNormaliser.load),
    ):
        (directory / name).write_bytes(content)
        with pytest.raises(ModelError, match=name):
            load(directory)


def test_a_template_file_that_is_no_text_or_too_large_is_an_error_of_the_model(tmp_path: Path):
    path = tmp_path / "chat.jinja"
    for content, said in ((b"\xff\xfe", "cannot read"), (b"x" * 2_000_000, "more than 1 MiB")):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=said):
            read_template(path)


def test_weights_that_are_cut_never_reach_an_engine(edited: Callable[..., Path]):
    directory = edited("config.json")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EnvironmentProblem, match=r"model\.safetensors: not a whole safetensors file"):
        checkpoint_layout(directory, dtype="float32")
