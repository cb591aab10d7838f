"""Attention by sequence lengths: the numbers of the block-diagonal mask, values and gradients."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from stages.data.packing import pack
from stages.training.models import CausalLM
from stages.training.packed_attention import register_packed_attention

CONFIG = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.1,
)
ROW = pack([[5, 6, 7, 8, 9, 10, 11], [12], [13, 14], [2, 2, 2, 30, 31]])


def model(implementation: str) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LlamaForCausalLM(CONFIG)
    made.set_attn_implementation(implementation)
    return made


def outputs(made: LlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    logits = made(**ROW.model_inputs()).logits.log_softmax(-1)
    logits.square().mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in made.parameters()])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_pin_6_attention_by_lengths_equals_attention_with_the_mask(mode):
    """Values and gradients."""
    masked, by_lengths = (
        model("sdpa").train(mode == "train"),
        model(register_packed_attention()).train(mode == "train"),
    )
    expected = outputs(masked)
    for found, wanted in zip(outputs(by_lengths), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_without_lengths_it_is_plain_sdpa_packed_or_padded():
    made = model(register_packed_attention()).eval()
    unsaid = ROW.model_inputs() | {"sequence_lengths": None}
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(made, **unsaid), outputs_of(model("sdpa"), **unsaid))
        padded = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
        torch.testing.assert_close(outputs_of(made, **padded), outputs_of(model("sdpa"), **padded))


def outputs_of(made: LlamaForCausalLM, **inputs) -> torch.Tensor:
    return made(**inputs).logits


def test_it_reaches_the_layers_of_reward_models_and_through_checkpointing():
    name = register_packed_attention()
    scorer = AutoModelForSequenceClassification.from_config(CONFIG, attn_implementation=name)
    with torch.no_grad():
        hidden = scorer.model(**ROW.model_inputs()).last_hidden_state
    assert hidden.shape == (1, ROW.num_tokens, 64)
    plain, checkpointed = model(name), model(name)
    checkpointed.gradient_checkpointing_enable()
    for found, wanted in zip(
        outputs(checkpointed.train()),
        outputs(plain.train()),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def masks_seen(made: LlamaForCausalLM, **inputs) -> list[torch.Tensor | None]:
    seen: list[torch.Tensor | None] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _args, options: seen.append(options["attention_mask"]), with_kwargs=True
        )
        for layer in made.model.layers
    ]
    CausalLM(made)(inputs, torch.arange(3))
    for hook in hooks:
        hook.remove()
    return seen


def test_a_mask_is_made_where_a_layer_reads_it_and_nowhere_else():
    made = model(register_packed_attention()).eval()
    assert masks_seen(made, **ROW.model_inputs()) == [None, None]
    unsaid = masks_seen(made, **ROW.model_inputs() | {"sequence_lengths": None})
    assert [mask.shape for mask in unsaid] == [(1, 1, ROW.num_tokens, ROW.num_tokens)] * 2
    padded = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    assert all(mask is not None for mask in masks_seen(made, **padded, use_cache=False))
    assert [mask is None for mask in masks_seen(made, **ROW.model_inputs())] == [True, True]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_packed_sequences_stay_apart_in_layers_with_a_sliding_window(mode):
    config = MistralConfig(**{**CONFIG.to_diff_dict(), "model_type": "mistral"}, sliding_window=4)
    name = register_packed_attention()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MistralForCausalLM._from_config(config, attn_implementation=name).train(mode == "train")
    packed = CausalLM(made)(ROW.model_inputs(), torch.arange(ROW.num_tokens))[0]
    for ids_T, found_TV in zip(ROW.split(ROW.input_ids_1N[0]), ROW.split(packed), strict=True):
        alone = made(input_ids=ids_T[None], use_cache=False).logits[0]
        torch.testing.assert_close(found_TV, alone, atol=2e-6, rtol=1e-5)
    made.config.sliding_window = None
    wide = made(input_ids=ROW.input_ids_1N[:, :7], use_cache=False).logits[0]
    assert (wide[3] - packed[3]).abs().max() < 1e-5, "within the window"
    assert (wide[6] - packed[6]).abs().max() > 1e-3, "seven tokens are more than that"
