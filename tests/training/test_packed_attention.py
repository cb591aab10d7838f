"""Attention by sequence lengths: the numbers of the block-diagonal mask, values and gradients."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from stages.data.packing import pack
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
