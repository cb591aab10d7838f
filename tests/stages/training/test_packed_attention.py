"""Attention by sequence lengths: the numbers of transformers' eager attention, values and gradients; what a
layer asks for besides is computed or refused.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from stages.data.packing import pack
from stages.errors import ModelError
from stages.training.models import CausalLM
from stages.training.packed_attention import packed, packed_attention, register_packed_attention
from stages.training.randomness import recompute_activations

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.1,
    "max_position_embeddings": 128,
}
CONFIG = LlamaConfig(**SIZES)
SOFTCAPPED = Gemma2Config(**SIZES, attn_logit_softcapping=0.5, sliding_window=4)
WITH_SINKS = GptOssConfig(
    **SIZES, sliding_window=4, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0
)
CHUNKED = Llama4TextConfig(**SIZES, attention_chunk_size=4, intermediate_size_mlp=96, num_local_experts=2)
ROW = pack([[5, 6, 7, 8, 9, 10, 11], [12], [13, 14], [2, 2, 2, 30, 31]])
ALL = torch.arange(ROW.num_tokens)


def model(implementation: str, config: PreTrainedConfig = CONFIG) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def packed_model(config: PreTrainedConfig = CONFIG) -> PreTrainedModel:
    return model(register_packed_attention(), config)


def values_and_gradients(made: PreTrainedModel, forward: Callable[[], torch.Tensor]):
    logprobs = forward().log_softmax(-1)
    logprobs.square().mean().backward()
    gradients = [p.grad.flatten() for p in made.parameters() if p.grad is not None]
    return logprobs.detach(), torch.cat(gradients)


def by_lengths(made: PreTrainedModel):
    return values_and_gradients(made, lambda: CausalLM(made)(ROW.model_inputs(), ALL)[0])


def one_by_one(made: PreTrainedModel):
    sequences = ROW.split(ROW.input_ids_1N[0])

    def forward() -> torch.Tensor:
        return torch.cat([made(input_ids=ids_T[None], use_cache=False).logits[0] for ids_T in sequences])

    return values_and_gradients(made, forward)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "config",
    [CONFIG, MistralConfig(**SIZES, sliding_window=4), SOFTCAPPED, WITH_SINKS],
    ids=lambda c: c.model_type,
)
def test_pin_6_a_packed_row_has_the_values_and_gradients_of_each_sequence_alone_in_eager_attention(
    mode, config
):
    expected = one_by_one(model("eager", config).eval())
    for found, wanted in zip(by_lengths(packed_model(config).train(mode == "train")), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-5)


def test_what_is_compared_there_depends_on_window_softcap_and_sinks():
    """Else a layer that swallows one of them would pass."""
    windows = MistralConfig(**SIZES, sliding_window=4), MistralConfig(**SIZES, sliding_window=100)
    softcaps = SOFTCAPPED, Gemma2Config(**SIZES, attn_logit_softcapping=None, sliding_window=4)
    for one, other in (windows, softcaps):
        assert not torch.allclose(one_by_one(model("eager", one))[0], one_by_one(model("eager", other))[0])
    with_sinks = model("eager", WITH_SINKS)
    before = one_by_one(with_sinks)[0]
    with torch.no_grad():
        for layer in with_sinks.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    assert not torch.allclose(before, one_by_one(with_sinks)[0])


def test_without_lengths_it_is_plain_sdpa_packed_or_padded():
    made, plain = packed_model().eval(), model("sdpa").eval()
    unsaid = {name: value for name, value in ROW.model_inputs().items() if name != "sequence_lengths"}
    padded = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    with torch.no_grad():
        for inputs in (unsaid, padded):
            torch.testing.assert_close(made(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("config", [SOFTCAPPED, WITH_SINKS], ids=lambda c: c.model_type)
def test_softcap_and_sinks_are_computed_without_lengths_too_padded_and_with_a_cache(config):
    made, eager = packed_model(config).eval(), model("eager", config).eval()
    padded = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]),
    }
    with torch.no_grad():
        found, wanted = made(**padded).logits, eager(**padded).logits
    torch.testing.assert_close(found[1], wanted[1], atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(found[0, 2:], wanted[0, 2:], atol=5e-6, rtol=1e-5)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    assert torch.equal(made.generate(**padded, **options), eager.generate(**padded, **options))


def test_it_reaches_the_layers_of_reward_models():
    scorer = AutoModelForSequenceClassification.from_config(
        CONFIG, attn_implementation=register_packed_attention()
    )
    sequences = ROW.split(ROW.input_ids_1N[0])
    with torch.no_grad():
        alone = [scorer.model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in sequences]
        with packed(ROW.model_inputs()) as inputs:
            together = scorer.model(**inputs).last_hidden_state[0]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, SOFTCAPPED], ids=lambda c: c.model_type)
def test_gradient_checkpointing_recomputes_with_the_same_lengths(config):
    plain, checkpointed = packed_model(config), packed_model(config)
    recompute_activations(checkpointed)
    for found, wanted in zip(by_lengths(checkpointed), by_lengths(plain), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def masks_seen(made: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    seen: list[list[int]] = []
    for layer in made.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _args, options: seen.append(options["attention_mask"].tolist()), with_kwargs=True
        )
    CausalLM(made)(pack(sequences).model_inputs(), torch.arange(3))
    return seen


def test_the_mask_of_a_packed_row_is_its_lengths_with_the_window_where_one_bites():
    assert masks_seen(packed_model(), [[5, 6, 7], [8, 9]]) == [[0, 3, 2]] * 2
    windows = MistralConfig(**SIZES, sliding_window=4)
    assert masks_seen(packed_model(windows), [[5, 6, 7, 8], [9]]) == [[0, 4, 1]] * 2
    assert masks_seen(packed_model(windows), [[5, 6, 7, 8, 9], [9]]) == [[4, 5, 1]] * 2


def test_chunks_shorter_than_a_sequence_are_refused_and_longer_ones_are_right():
    made = packed_model(CHUNKED).eval()
    with pytest.raises(ModelError, match="its mask ends after 4 tokens and is no window"):
        CausalLM(made)(ROW.model_inputs(), ALL)
    short = pack([[5, 6, 7, 8], [9, 10]])
    found = CausalLM(made)(short.model_inputs(), torch.arange(6))[0]
    eager = model("eager", CHUNKED).eval()
    alone = [
        eager(input_ids=ids[None], use_cache=False).logits[0] for ids in short.split(short.input_ids_1N[0])
    ]
    torch.testing.assert_close(found, torch.cat(alone), atol=5e-6, rtol=1e-5)


def attend(attention_mask: torch.Tensor | None, **asked):
    query = torch.ones(1, 2, 3, 8)
    return packed_attention(torch.nn.Module(), query, query, query, attention_mask, **asked)


LENGTHS = torch.tensor([0, 2, 1])


@pytest.mark.parametrize("mask", [LENGTHS, None], ids=["packed", "plain"])
@pytest.mark.parametrize("asked", ["indices", "alibi", "head_mask"])
def test_what_it_does_not_know_is_refused_and_not_swallowed(mask, asked):
    with pytest.raises(ModelError, match=f"its attention asks for {asked}"):
        attend(mask, **{asked: torch.ones(2)})
    attend(mask, **{asked: None})


@pytest.mark.parametrize("asked", [{"position_bias": torch.zeros(1, 2, 3, 3)}, {"is_causal": False}])
def test_a_packed_row_is_refused_to_attention_that_is_not_causal_or_biased(asked):
    with pytest.raises(ModelError, match="not causal or adds a bias"):
        attend(LENGTHS, **asked)


def test_a_layer_that_does_not_hand_the_mask_on_is_an_error_never_attention_over_the_whole_row(monkeypatch):
    forward = LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention,
        "forward",
        lambda self, *args, **options: forward(self, *args, **{**options, "attention_mask": None}),
    )
    with pytest.raises(ModelError, match="do not hand the mask of a packed row"):
        CausalLM(packed_model())(ROW.model_inputs(), ALL)


def test_a_mask_that_is_not_causal_is_refused():
    made = packed_model()
    made.config.is_causal = False
    with pytest.raises(ModelError, match="not that of causal attention"):
        CausalLM(made)(ROW.model_inputs(), ALL)


def test_transformers_knows_it_by_its_name():
    assert register_packed_attention() in AttentionInterface()


@pytest.mark.parametrize(
    "asked", [{"softcap": 50.0}, {"s_aux": torch.tensor([3.0, 30.0])}], ids=["softcap", "sinks"]
)
@pytest.mark.parametrize("mask", [torch.tensor([0, 9, 7]), None], ids=["packed", "plain"])
def test_in_bf16_softcaps_and_sinks_are_computed_on_scores_in_fp32(asked, mask):
    """Scores near 20, which bf16 rounds by up to 0.06. What is left is the rounding of the result."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 16, 32, generator=generator).bfloat16() for _ in range(3))
    found, _ = packed_attention(torch.nn.Module(), 2 * query, 2 * key, value, mask, **asked)
    exact, _ = packed_attention(
        torch.nn.Module(), 2 * query.double(), 2 * key.double(), value.double(), mask, **asked
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), atol=0, rtol=2**-7)


def test_a_window_that_only_the_mask_knows_is_computed():
    """qwen2_moe and phimoe hand none to their attention."""
    config = PhimoeConfig(**SIZES, sliding_window=4, num_local_experts=2, num_experts_per_tok=2)
    expected = one_by_one(model("eager", config).eval())
    for found, wanted in zip(by_lengths(packed_model(config)), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-5)
    full = PhimoeConfig(**SIZES, num_local_experts=2, num_experts_per_tok=2)
    assert not torch.allclose(expected[0], one_by_one(model("eager", full).eval())[0])


def test_a_window_other_than_that_of_the_mask_is_refused():
    with pytest.raises(ModelError, match="a window of 2 tokens and its attention asks for one of 3"):
        attend(torch.tensor([2, 3]), sliding_window=3)
