"""The probe of a loaded model: what mixes sequences of a row, or is random, is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FalconConfig,
    Lfm2Config,
    LlamaConfig,
    PreTrainedConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from stages.errors import ModelError
from stages.training import model_rules
from stages.training.models import load_causal_lm, load_reward_model, reward_from_causal_lm

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
LLAMA = LlamaConfig(**SIZES)
WITH_CONVOLUTIONS = Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])


def saved(config: PreTrainedConfig, directory: Path, auto_class=AutoModelForCausalLM) -> Path:
    torch.manual_seed(0)
    auto_class.from_config(config).save_pretrained(directory)
    return directory


def test_a_model_passes_and_is_handed_over_as_it_was_loaded(tmp_path):
    model = load_causal_lm(saved(LLAMA, tmp_path))
    assert not model.inner.training and model.inner.config._attn_implementation == "packed"
    reward_from_causal_lm(tmp_path, pad_token_id=None)


def test_convolutions_over_the_row_are_refused_by_their_name_and_in_one_line(tmp_path, monkeypatch):
    """Also where a family's config says nothing of them."""
    monkeypatch.setattr(model_rules, "NOT_ATTENTION", ())
    with pytest.raises(ModelError) as error:
        load_causal_lm(saved(WITH_CONVOLUTIONS, tmp_path))
    assert "lfm2 cannot be trained here: model.layers.0.conv.conv mixes the tokens of a row" in str(
        error.value
    )
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_layers_that_mix_tokens_without_attention_are_refused_also_where_weights_are_small(
    tmp_path, monkeypatch
):
    """A head with small weights: log-probs are flat, and what a neighbour adds hardly moves them."""
    directory = saved(LLAMA, tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] /= 20
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    load_causal_lm(directory)
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, hidden: forward(self, hidden + hidden.roll(1, 1) / 100)
    )
    with pytest.raises(ModelError, match=r"differ from each alone by [\d.]+e-05 \(limit"):
        load_causal_lm(directory)


def test_one_channel_that_is_far_larger_than_the_others_is_no_reason_to_refuse_a_model(tmp_path):
    directory = saved(LLAMA, tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][7] *= 1e4
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    load_causal_lm(directory)


def test_layers_that_are_random_are_refused(tmp_path, monkeypatch):
    forward = LlamaMLP.forward

    def noisy(self, hidden):
        return forward(self, hidden * torch.empty_like(hidden).uniform_(0.9, 1.1))

    monkeypatch.setattr(LlamaMLP, "forward", noisy)
    with pytest.raises(ModelError, match="random"):
        load_causal_lm(saved(LLAMA, tmp_path))


def test_a_forward_that_takes_no_packed_row_is_one_line(tmp_path, monkeypatch):
    def refuses(self, hidden):
        raise KeyError("position_ids")

    directory = saved(LLAMA, tmp_path)
    monkeypatch.setattr(LlamaMLP, "forward", refuses)
    with pytest.raises(ModelError, match=r"does not compute a packed row \(KeyError: 'position_ids'\)"):
        load_causal_lm(directory)


def test_reward_models_are_probed_too(tmp_path, monkeypatch):
    config = LlamaConfig(**SIZES, num_labels=1)
    directory = saved(config, tmp_path, AutoModelForSequenceClassification)
    load_reward_model(directory)
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, hidden: forward(self, hidden + hidden.mean(1, keepdim=True))
    )
    for load in (load_reward_model, lambda path: reward_from_causal_lm(path, pad_token_id=None)):
        with pytest.raises(ModelError, match="packed sequences differ"):
            load(directory)


def test_a_family_whose_attention_cannot_be_exchanged_says_so_and_no_bare_key_error(tmp_path):
    config = FalconConfig(vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(
        ModelError, match="falcon cannot be trained here: transformers cannot exchange the att"
    ):
        load_causal_lm(saved(config, tmp_path))
