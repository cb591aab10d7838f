"""Tiny random models of many families: each is what transformers builds from a config of its type.

    FAMILIES["gemma2"].make(seed) -> model | .directory(path) -> save_pretrained layout with a tokenizer

Two to four layers, so that every kind of layer of the family occurs; 64 wide, heads of 32 (vLLM's CPU
attention has no 16), the tokenizer of all tests. Sliding windows are shorter than the sequences of the tests,
caps and scales are set where they bite. Weights are five times as large as usual and biases are not zero, so
that distributions are far from flat and a part that is left out is seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import BOS, EOS, PAD, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

STD = 0.1
WINDOW = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the page, and how to build its tiny model."""

    name: str
    model_type: str  # transformers' name of its config
    settings: Mapping[str, Any] = field(repr=False)  # of that config
    engine: bool = False  # vLLM's CPU engine is tried with it
    moe: bool = False  # it has routed experts

    @property
    def reward(self) -> bool:
        """Whether transformers has a reward model of this family."""
        mapping = AutoModelForSequenceClassification._model_mapping
        return type(self.config()) in mapping.keys()  # noqa: SIM118 - the mapping iterates over something else

    def config(self) -> Any:
        """The config, sized as the tokenizer."""
        return AutoConfig.for_model(
            self.model_type,
            **{
                "vocab_size": len(tiny_tokenizer()),
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                **self.settings,
            },
        )

    def make(self, seed: int = 0) -> PreTrainedModel:
        """The model in eval mode, fp32, on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn_like(parameter) * STD
                    parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
        return model.eval()

    def directory(self, path: Path, seed: int = 0) -> Path:
        """`path` as a `save_pretrained` directory of the model and the tokenizer."""
        self.make(seed).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        return path


LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
MULTI_HEAD = {**LLAMA_LIKE, "num_key_value_heads": 2}
WITH_HEAD_DIM = {**LLAMA_LIKE, "head_dim": 32}
GPT2_LIKE = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
WINDOW_THEN_FULL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA2_LIKE = {**WITH_HEAD_DIM, **WINDOW_THEN_FULL, "query_pre_attn_scalar": 32}
SHARED_KV = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}
GEMMA3N = {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 320,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.5, 0.0],
}
GEMMA4 = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320, "global_head_dim": 32}
GRANITE_SCALES = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.1,
    "logits_scaling": 0.8,
}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
QWEN2_EXPERTS = {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LLAMA4 = {**WITH_HEAD_DIM, **LOCAL_EXPERTS, "num_hidden_layers": 4, "intermediate_size_mlp": 96}
LATENT_ATTENTION = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
MAMBA2_LIKE = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 8}
DELTA_NET = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
DYNAMIC_NTK = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + index / 4 for index in range(16)],
}


def _table(*families: Family) -> dict[str, Family]:
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def _family(
    name: str, settings: Mapping[str, Any], *, model_type: str | None = None, **columns: bool
) -> Family:
    return Family(name=name, model_type=model_type or name, settings=settings, **columns)


FAMILIES: dict[str, Family] = _table(
    # the ones docs/models.md has to say yes to
    _family("llama", LLAMA_LIKE, engine=True),
    _family("qwen2", LLAMA_LIKE, engine=True),
    _family("qwen3", WITH_HEAD_DIM, engine=True),
    _family("mistral", {**LLAMA_LIKE, "sliding_window": WINDOW}, engine=True),
    _family("gemma", WITH_HEAD_DIM, engine=True),
    _family("gemma2", {**GEMMA2_LIKE, **SOFTCAPS}, engine=True),
    _family("gemma3", GEMMA2_LIKE, model_type="gemma3_text", engine=True),
    _family("olmo2", LLAMA_LIKE, engine=True),
    _family("phi3", LLAMA_LIKE, engine=True),
    _family(
        "opt",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
        },
        engine=True,
    ),
    _family("gpt2", GPT2_LIKE, engine=True),
    _family("cohere", {**LLAMA_LIKE, "logit_scale": 1.0}, engine=True),
    _family("qwen3_moe", {**WITH_HEAD_DIM, **EXPERTS, "moe_intermediate_size": 32}, engine=True, moe=True),
    _family("mixtral", {**LLAMA_LIKE, **LOCAL_EXPERTS}, engine=True, moe=True),
    _family("olmoe", {**LLAMA_LIKE, **EXPERTS, "intermediate_size": 48}, engine=True, moe=True),
    # attention alone
    _family("starcoder2", {**LLAMA_LIKE, "sliding_window": WINDOW}),
    _family("smollm3", {**LLAMA_LIKE, "no_rope_layers": [1, 0]}),
    _family("ministral", {**WITH_HEAD_DIM, **WINDOW_THEN_FULL}),
    _family("ministral3", WITH_HEAD_DIM),
    _family("olmo", LLAMA_LIKE),
    _family("olmo3", {**LLAMA_LIKE, **WINDOW_THEN_FULL}),
    _family("phi", LLAMA_LIKE),
    _family(
        "phi3_longrope",
        {**LLAMA_LIKE, "rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
        model_type="phi3",
    ),
    _family("llama_dynamic_ntk", {**LLAMA_LIKE, "rope_parameters": DYNAMIC_NTK}, model_type="llama"),
    _family("llama_yarn", {**LLAMA_LIKE, "rope_parameters": YARN}, model_type="llama"),
    _family("gpt_neox", LLAMA_LIKE),
    _family("gpt_neox_japanese", {**LLAMA_LIKE, "intermediate_multiple_size": 2}),
    _family("cohere2", {**LLAMA_LIKE, **WINDOW_THEN_FULL, "logit_scale": 1.0}),
    _family("granite", {**LLAMA_LIKE, **GRANITE_SCALES}),
    _family("glm", WITH_HEAD_DIM),
    _family("glm4", WITH_HEAD_DIM),
    _family("seed_oss", WITH_HEAD_DIM),
    _family("hunyuan_v1_dense", WITH_HEAD_DIM),
    _family("ernie4_5", WITH_HEAD_DIM),
    _family("exaone4", {**LLAMA_LIKE, **WINDOW_THEN_FULL}),
    _family("arcee", WITH_HEAD_DIM),
    _family("helium", WITH_HEAD_DIM),
    _family("nemotron", WITH_HEAD_DIM),
    _family("stablelm", LLAMA_LIKE),
    _family("apertus", LLAMA_LIKE),
    _family("nanochat", LLAMA_LIKE),
    _family("vaultgemma", {**GEMMA2_LIKE, **SOFTCAPS}),
    _family("diffllama", MULTI_HEAD),
    _family("minicpm3", {**MULTI_HEAD, **LATENT_ATTENTION, "dim_model_base": 64, "scale_emb": 3}),
    _family("cwm", {**WITH_HEAD_DIM, **WINDOW_THEN_FULL}),
    _family("granite_swa", {**LLAMA_LIKE, **GRANITE_SCALES, **WINDOW_THEN_FULL}),
    _family("hyperclovax", {**WITH_HEAD_DIM, **GRANITE_SCALES}),
    _family("jais2", WITH_HEAD_DIM),
    _family("youtu", {**MULTI_HEAD, **LATENT_ATTENTION}),
    _family("bitnet", LLAMA_LIKE),
    _family("gemma3n", {**GEMMA2_LIKE, **GEMMA3N}, model_type="gemma3n_text"),
    _family(
        "gemma3n_shared_kv",
        {**GEMMA2_LIKE, **GEMMA3N, **SHARED_KV, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0]},
        model_type="gemma3n_text",
    ),
    _family("gemma4", {**GEMMA2_LIKE, **GEMMA4}, model_type="gemma4_text"),
    _family(
        "gemma4_shared_kv",
        {**GEMMA2_LIKE, **GEMMA4, **SHARED_KV, "use_double_wide_mlp": True},
        model_type="gemma4_text",
    ),
    _family(
        "gemma4_moe",
        {
            **GEMMA2_LIKE,
            **GEMMA4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        model_type="gemma4_text",
        moe=True,
    ),
    _family(
        "modernbert-decoder",
        {
            **LLAMA_LIKE,
            "local_attention": 2 * WINDOW,
            "layer_types": WINDOW_THEN_FULL["layer_types"],
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    _family(
        "falcon",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256},
    ),
    _family("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 2}),
    _family("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 256}),
    _family("gptj", {**GPT2_LIKE, "rotary_dim": 16}),
    _family("codegen", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 16}),
    _family(
        "gpt_neo",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 256,
        },
    ),
    _family("gpt_bigcode", GPT2_LIKE),
    _family("openai-gpt", GPT2_LIKE),
    _family("persimmon", LLAMA_LIKE),
    _family(
        "xglm",
        {
            "d_model": 64,
            "ffn_dim": 96,
            "num_layers": 2,
            "attention_heads": 2,
            "max_position_embeddings": 256,
        },
    ),
    _family("biogpt", LLAMA_LIKE),
    # routed experts
    _family("granitemoe", {**LLAMA_LIKE, **GRANITE_SCALES, **LOCAL_EXPERTS}, moe=True),
    _family(
        "granitemoeshared",
        {**LLAMA_LIKE, **GRANITE_SCALES, **LOCAL_EXPERTS, "shared_intermediate_size": 48},
        moe=True,
    ),
    _family(
        "deepseek_v2",
        {**MULTI_HEAD, **LATENT_ATTENTION, **ROUTED_EXPERTS, "n_group": 1, "topk_group": 1},
        moe=True,
    ),
    _family(
        "deepseek_v3",
        {**MULTI_HEAD, **LATENT_ATTENTION, **ROUTED_EXPERTS, "n_group": 2, "topk_group": 1},
        moe=True,
    ),
    _family("glm4_moe", {**WITH_HEAD_DIM, **ROUTED_EXPERTS}, moe=True),
    _family("dots1", {**LLAMA_LIKE, **ROUTED_EXPERTS, **WINDOW_THEN_FULL}, moe=True),
    _family("hunyuan_v1_moe", {**WITH_HEAD_DIM, "num_experts": 4, "moe_topk": 2}, moe=True),
    _family("qwen2_moe", {**LLAMA_LIKE, **QWEN2_EXPERTS}, moe=True),
    _family(
        "qwen2_moe_window",
        {**LLAMA_LIKE, **QWEN2_EXPERTS, "use_sliding_window": True, "sliding_window": WINDOW},
        model_type="qwen2_moe",
        moe=True,
    ),
    _family("phimoe", {**LLAMA_LIKE, **LOCAL_EXPERTS}, moe=True),
    _family(
        "phimoe_window",
        {**LLAMA_LIKE, **LOCAL_EXPERTS, "sliding_window": WINDOW},
        model_type="phimoe",
        moe=True,
    ),
    _family("gpt_oss", {**WITH_HEAD_DIM, **LOCAL_EXPERTS, **WINDOW_THEN_FULL}, moe=True),
    _family(
        "ernie4_5_moe",
        {
            **LLAMA_LIKE,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": 32,
        },
        moe=True,
    ),
    _family(
        "exaone_moe", {**MULTI_HEAD, **WINDOW_THEN_FULL, **EXPERTS, "moe_intermediate_size": 32}, moe=True
    ),
    _family("glm4_moe_lite", {**MULTI_HEAD, **LATENT_ATTENTION, **ROUTED_EXPERTS}, moe=True),
    _family("solar_open", {**WITH_HEAD_DIM, **ROUTED_EXPERTS}, moe=True),
    _family(
        "afmoe",
        {
            **WITH_HEAD_DIM,
            **WINDOW_THEN_FULL,
            **EXPERTS,
            "moe_intermediate_size": 32,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
        },
        moe=True,
    ),
    _family(
        "mimo_v2_flash",
        {**WITH_HEAD_DIM, **WINDOW_THEN_FULL, **ROUTED_EXPERTS, "v_head_dim": 32},
        moe=True,
    ),
    _family("cohere2_moe", {**WITH_HEAD_DIM, **WINDOW_THEN_FULL, **EXPERTS, "logit_scale": 1.0}, moe=True),
    _family(
        "mellum", {**WITH_HEAD_DIM, **WINDOW_THEN_FULL, **EXPERTS, "moe_intermediate_size": 32}, moe=True
    ),
    _family(
        "zaya",
        {
            **WITH_HEAD_DIM,
            **EXPERTS,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "router_hidden_size": 16,
        },
        moe=True,
    ),
    _family(
        "hy_v3", {**WITH_HEAD_DIM, **EXPERTS, "moe_intermediate_size": 32, "num_shared_experts": 1}, moe=True
    ),
    _family("aria", {**WITH_HEAD_DIM, "moe_num_experts": 4}, model_type="aria_text", moe=True),
    _family("flex_olmo", {**LLAMA_LIKE, **EXPERTS}, moe=True),
    _family("minimax_m2", {**WITH_HEAD_DIM, **LOCAL_EXPERTS}, moe=True),
    _family(
        "granitemoe_swa", {**LLAMA_LIKE, **GRANITE_SCALES, **LOCAL_EXPERTS, **WINDOW_THEN_FULL}, moe=True
    ),
    _family(
        "laguna",
        {
            **WITH_HEAD_DIM,
            **EXPERTS,
            **WINDOW_THEN_FULL,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse"],
        },
        moe=True,
    ),
    _family(
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 1.0, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        },
        moe=True,
    ),
    _family(
        "jetmoe",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "kv_channels": 32,
            "max_position_embeddings": 256,
            **LOCAL_EXPERTS,
        },
        moe=True,
    ),
    _family("llama4_text", LLAMA4, moe=True),
    _family(
        "llama4_text_untuned",
        {**LLAMA4, "attn_temperature_tuning": False},
        model_type="llama4_text",
        moe=True,
    ),
    _family(
        "llama4_text_chunked",
        {**LLAMA4, "attn_temperature_tuning": False, "attention_chunk_size": 8},
        model_type="llama4_text",
        moe=True,
    ),
    # state spaces, convolutions and linear attention
    _family(
        "jamba",
        {
            **LLAMA_LIKE,
            **EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        moe=True,
    ),
    _family(
        "qwen3_next",
        {
            **WITH_HEAD_DIM,
            **EXPERTS,
            **DELTA_NET,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        moe=True,
    ),
    _family("qwen3_5", {**WITH_HEAD_DIM, **DELTA_NET}, model_type="qwen3_5_text"),
    _family(
        "qwen3_5_moe",
        {
            **WITH_HEAD_DIM,
            **EXPERTS,
            **DELTA_NET,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        model_type="qwen3_5_moe_text",
        moe=True,
    ),
    _family(
        "kimi_linear",
        {
            **MULTI_HEAD,
            **LATENT_ATTENTION,
            **LOCAL_EXPERTS,
            "moe_intermediate_size": 32,
            "linear_head_dim": 32,
            "linear_num_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
        moe=True,
    ),
    _family(
        "nemotron_h",
        {
            **WITH_HEAD_DIM,
            "layers_block_type": ["mamba", "attention", "moe"],
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 8,
            "use_mamba_kernels": False,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
        moe=True,
    ),
    _family("olmo_hybrid", {**LLAMA_LIKE, **DELTA_NET}),
    _family(
        "minimax",
        {
            **LLAMA_LIKE,
            **LOCAL_EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 4,
        },
        moe=True,
    ),
    _family("bamba", {**LLAMA_LIKE, **MAMBA2_LIKE, "attn_layer_indices": [1]}),
    _family(
        "granitemoehybrid",
        {
            **LLAMA_LIKE,
            **LOCAL_EXPERTS,
            **MAMBA2_LIKE,
            "shared_intermediate_size": 48,
            "layer_types": ["mamba", "attention"],
        },
        moe=True,
    ),
    _family(
        "zamba2",
        {
            **MULTI_HEAD,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "use_mamba_kernels": False,
            "n_mamba_heads": 4,
            "mamba_d_state": 16,
            "chunk_size": 8,
            "adapter_rank": 8,
        },
    ),
    _family("falcon_h1", {**LLAMA_LIKE, **MAMBA2_LIKE, "mamba_d_ssm": 128}),
    _family("doge", LLAMA_LIKE),
    _family("lfm2", {**LLAMA_LIKE, "layer_types": ["conv", "full_attention"]}),
    _family(
        "lfm2_moe",
        {
            **LLAMA_LIKE,
            **EXPERTS,
            "layer_types": ["conv", "full_attention"],
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
        },
        moe=True,
    ),
    _family(
        "recurrent_gemma",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "lru_width": 64,
            "attention_window_size": WINDOW,
        },
    ),
    _family("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    _family(
        "mamba2",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 16,
            "num_heads": 4,
            "head_dim": 32,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    _family("falcon_mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    _family(
        "rwkv",
        {"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64, "context_length": 256},
    ),
)
"""Every family of the page."""
