"""bf16 in every family: a policy and its frozen copy compute the same numbers in the same dtypes."""

import pytest
import torch
import torch.distributed as dist
from inline import worker_in
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from stages.data.packing import pack
from stages.training.distributed import place
from stages.training.models import CausalLM, freeze
from stages.training.packed_attention import register_packed_attention

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHER_NAMES = {
    "gpt2": {"n_inner": 96, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "cohere": {"logit_scale": 1.0},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0, "init_std": 0.1},
}
FAST = ("llama", "gemma2", "gpt2", "olmo", "ernie4_5")
SLOW = ("qwen2", "qwen3", "gemma", "mistral", "olmo2", "olmo3", "phi3", "opt", "cohere")
FAMILIES = [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
FP32 = {"inner.model.rotary_emb", "inner.lm_head", ""}
"""Modules that may give fp32: rotary tables (positions), the head, and with it the whole."""


def fresh(family: str) -> CausalLM:
    """A tiny model with weights from seed 0; norms and biases are not at their neutral values either."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **OTHER_NAMES.get(family, {}))
    inner = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=register_packed_attention()
    )
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return CausalLM(inner)


def logits_and_dtypes(model: CausalLM) -> tuple[Tensor, dict[str, torch.dtype]]:
    """Of one packed row; the dtypes by module that gives one tensor, or several of which it is the first."""
    dtypes: dict[str, torch.dtype] = {}

    def note(name: str):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                dtypes[name] = first.dtype

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    row = pack([list(range(5, 15)), [7, 8, 9], [*range(20, 60)]])
    with torch.no_grad():
        return model(row.model_inputs(), torch.arange(row.input_ids_1N.shape[1])), dtypes


@pytest.fixture
def worker(tmp_path):
    """A worker whose process group, which bf16 training opens, ends with the test."""
    yield worker_in(tmp_path, "ppo")
    dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_a_policy_before_any_update_is_its_frozen_copy_bit_for_bit(family: str, worker):
    policy, frozen = fresh(family), freeze(fresh(family))
    place(policy, worker, precision="bf16", trained=True)
    place(frozen, worker, precision="bf16", trained=False)
    policy_logits, policy_dtypes = logits_and_dtypes(policy)
    frozen_logits, frozen_dtypes = logits_and_dtypes(frozen)
    assert policy_logits.std() > 0.1, "flat logits would show nothing"
    assert torch.equal(policy_logits, frozen_logits)
    assert policy_dtypes == frozen_dtypes
    in_fp32 = {name for name, dtype in policy_dtypes.items() if dtype != torch.bfloat16}
    assert in_fp32 <= FP32, "a layer computes in fp32"
    assert len(policy_dtypes.keys() - FP32) > 10, "every layer was looked at"
