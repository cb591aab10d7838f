"""The sizes of a model that is not loaded: parameters and bytes, from its config.json.

Owns: the arithmetic of one model. Does not own: what a stage holds of which models (placement). Pure.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from pipeline.errors import ConfigError

MAX_SIZE = 2**31  # of one dimension
TIED_BY_DEFAULT = frozenset(
    {
        *("biogpt", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "gemma", "gemma2"),
        *("gemma3_text", "gemma3n_text", "gemma4_text", "gpt_neox_japanese", "granite_swa", "jetmoe", "lfm2"),
        *("lfm2_moe", "minicpm3", "modernbert-decoder", "recurrent_gemma", "smollm3", "starcoder2"),
        *("vaultgemma", "youtu", "zamba", "zamba2", "zaya"),
    }
)
"""Values of `model_type` whose output head is the embedding where config.json does not say: transformers' own
defaults, which cannot be asked without torch.
"""
NAMES_OF_EXPERTS = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "expert_size": ("moe_intermediate_size",),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_k"),
    "shared_size": ("shared_expert_intermediate_size", "shared_intermediate_size"),
}
"""Field of Architecture -> its names in the config.json of one family or another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of a decoder-only transformer with gated MLPs, under the names of its config.json; all layers
    have experts, or none has.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    num_experts: int  # of each layer, in place of its MLP; 0: none
    expert_size: int  # intermediate size of one of them
    experts_per_token: int  # of them that a token goes through
    shared_size: int  # of an expert beside them that every token goes through; 0: none

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Raises ConfigError when a size is missing, or is not a size. The cause is a KeyError or a TypeError
        where the file may be that of a family that calls its sizes otherwise, or has one for each layer.
        """
        try:
            stated: dict[str, Any] = json.loads(path.read_text())
            optional = {  # what a file may leave out, as a LLaMA has it
                "num_key_value_heads": stated["num_attention_heads"],
                "head_dim": stated["hidden_size"] // stated["num_attention_heads"],
                "tie_word_embeddings": stated.get("model_type") in TIED_BY_DEFAULT,
                "num_experts": 0,
                "expert_size": stated["intermediate_size"],
                "experts_per_token": 1,
                "shared_size": 0,
            }
            given = {name: value for name, value in stated.items() if value is not None}
            experts = {
                field: given[name]
                for field, names in NAMES_OF_EXPERTS.items()
                for name in names
                if name in given
            }
            known = optional | given | experts
            architecture = cls(**{field.name: known[field.name] for field in fields(cls)})
            architecture._check()
            return architecture
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise ConfigError(
                f"{path}: not the config.json of a language model ({type(error).__name__}: {error})"
            ) from error

    def _check(self) -> None:
        """What a file states may be of any type and size. Raises TypeError or ValueError."""
        for field in fields(self):
            value = getattr(self, field.name)
            smallest = 0 if field.name in ("num_experts", "shared_size") else 1
            if type(value) is not field.type:
                raise TypeError(f"{field.name} is not {'a size' if field.type is int else 'true or false'}")
            if field.type is int and not smallest <= value < MAX_SIZE:
                raise ValueError(f"{field.name} is not a size")

    @property
    def body(self) -> int:
        """Parameters of a reward or value model: all but an output head of its own."""
        return self.vocab_size * self.hidden_size + self.num_hidden_layers * self.layer + self.hidden_size

    @property
    def layer(self) -> int:
        """Parameters of one layer: four projections of attention, three of the MLP or of each expert, the
        router, two norms.
        """
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        mlp = 3 * self.intermediate_size
        if self.num_experts:
            mlp = self.num_experts * (3 * self.expert_size + 1) + 3 * self.shared_size
        return self.hidden_size * (heads * self.head_dim + mlp + 2)

    @property
    def whole(self) -> int:
        """Parameters of the language model."""
        return self.body + (0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size)

    def kv_bytes(self, itemsize: int) -> int:
        """Keys and values of one token."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize

    def activations(self, itemsize: int, *, recomputed: bool) -> int:
        """Bytes that the backward pass of one token needs of its forward, counted on transformers' LLaMA.

        Each norm keeps its input in fp32 and two tensors, attention queries, keys, values, two outputs, the
        MLP (or each expert that the token goes through) four tensors. `recomputed`: with gradient
        checkpointing, the inputs of all layers and one layer.
        """
        norm = (4 + 2 * itemsize) * self.hidden_size
        attention = (3 * self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        mlp = self.intermediate_size
        if self.num_experts:
            mlp = self.experts_per_token * self.expert_size + self.shared_size
        layer = 2 * norm + itemsize * (attention + 4 * mlp)
        kept = itemsize * self.hidden_size if recomputed else layer
        return self.num_hidden_layers * kept + norm + layer * recomputed
