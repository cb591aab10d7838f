"""Nothing in a model is random in training: in every family, with every knob of its config turned up."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families.table import FAMILIES
from inline import worker_in
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from stages.config.model import ModelConfig
from stages.data.packing import pack
from stages.errors import ModelError
from stages.training.distributed import place
from stages.training.models import (
    CausalLM,
    build_causal_lm,
    load_causal_lm,
    load_reward_model,
    reward_from_causal_lm,
)
from stages.training.randomness import recompute_activations, switch_off

ROW = pack([[5, 6, 7, 8, 9], [10, 11, 12]])
POSITIONS = torch.arange(8)
RANDOM_IN_TRAIN_MODE = (
    "mixtral",  # router_jitter_noise
    "minimax_m2",
    "dbrx",  # ffn_config.moe_jitter_eps
    "phimoe",  # input_jitter_noise, and routing that is sampled whatever the config says
    "opt",  # layerdrop, and dropouts in the layer itself
    "biogpt",
    "xglm",
    "gpt_bigcode",  # attn_pdrop
    "gpt2",
    "gptj",
    "bloom",
    "falcon",
    "starcoder2",  # embedding_dropout, residual_dropout
    "llama",  # attention_dropout
    "phi3",
)


def knobs_of(config: Any) -> Iterator[tuple[Any, str]]:
    """(section, name) of what is random in training, by its name and however deep it lies."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from knobs_of(value)
        elif any(part in name for part in ("drop", "jitter", "noise")) and (
            value is None or isinstance(value, float)
        ):
            yield config, name


def turned_up(name: str) -> PreTrainedModel:
    """The family's tiny model, as transformers makes it, every knob at 0.5."""
    family = FAMILIES[name]
    config = family.config()
    for section, knob in list(knobs_of(config)):
        if name != "diffllama":  # transformers refuses its only one
            setattr(section, knob, 0.5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(family.make().state_dict())
    return model


def directory_of(name: str, path: Path) -> Path:
    turned_up(name).save_pretrained(path)
    return path


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=ROW.input_ids_1N, use_cache=False).logits.detach()


@pytest.mark.parametrize("name", RANDOM_IN_TRAIN_MODE)
def test_these_families_are_random_in_transformers_train_mode(name):
    """Or the next test would show nothing."""
    model = turned_up(name).train()
    assert not torch.equal(logits_of(model), logits_of(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_pin_5_no_family_is_random_in_training_whatever_its_config_says(name):
    model = turned_up(name)
    switch_off(model)
    evaluated = logits_of(model)
    assert torch.equal(logits_of(model.train()), evaluated)
    assert torch.equal(logits_of(CausalLM(model).train().inner), evaluated)


@pytest.mark.parametrize("name", ["mixtral", "opt", "gpt_bigcode"])
def test_pin_5_what_a_stage_trains_is_what_transformers_evaluates(name, tmp_path):
    """Policy and models from a directory whose config asks for all of it, placed as a stage places them."""
    directory = directory_of(name, tmp_path)
    worker = worker_in(tmp_path / "stage", "sft")
    policy = load_causal_lm(directory)
    place(policy, worker, precision="fp32", trained=True)
    inputs = {"input_ids": ROW.input_ids_1N, "use_cache": False}
    given = AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.testing.assert_close(policy(inputs, POSITIONS), given(**inputs).logits, atol=1e-5, rtol=0)
    first, again = (policy(ROW.model_inputs(), POSITIONS) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["mixtral", "opt", "gpt_bigcode"])
def test_pin_5_reward_models_are_not_random_either(name, tmp_path):
    scorer = reward_from_causal_lm(directory_of(name, tmp_path / "policy"), pad_token_id=0)
    scorer.inner.save_pretrained(tmp_path / "reward")
    for loaded in (scorer, load_reward_model(tmp_path / "reward")):
        place(loaded, worker_in(tmp_path / "stage", "reward"), precision="fp32", trained=True)
        first, again = (loaded(ROW.model_inputs(), POSITIONS) for _ in range(2))
        assert torch.equal(first, again)
    assert torch.equal(first, scorer(ROW.model_inputs(), POSITIONS))


def test_pin_5_a_model_from_scratch_stays_in_eval_mode():
    config = ModelConfig(layers=1, hidden_size=64, num_heads=2, num_kv_heads=1)
    model = build_causal_lm(config, vocab_size=320, eos_token_id=2, pad_token_id=0).train()
    assert not any(module.training for module in model.inner.modules())


def gradients_of(model: CausalLM) -> list[torch.Tensor]:
    model.zero_grad()
    model(ROW.model_inputs(), POSITIONS).logsumexp(-1).sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_bigcode", "mixtral", "phimoe"])
def test_recomputed_activations_give_the_same_gradient_to_the_bit(name, tmp_path):
    directory = directory_of(name, tmp_path)
    plain, recomputing = load_causal_lm(directory), load_causal_lm(directory)
    recompute_activations(recomputing.inner)
    calls = []
    recomputing.inner.get_input_embeddings().register_forward_hook(lambda *_: calls.append("embedding"))
    blocks = set(recomputing.inner._no_split_modules)
    (block, *_) = (module for module in recomputing.modules() if type(module).__name__ in blocks)
    next(block.children()).register_forward_hook(lambda *_: calls.append("layer"))
    wanted = gradients_of(plain)
    assert calls == []
    found = gradients_of(recomputing)
    assert sorted(calls) == ["embedding", "layer", "layer"]
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_model_without_layers_to_recompute_is_refused_in_a_line():
    config = FAMILIES["llama"].config()
    config.num_hidden_layers = 0
    with pytest.raises(ModelError, match="LlamaForCausalLM: transformers cannot recompute"):
        recompute_activations(AutoModelForCausalLM.from_config(config))
