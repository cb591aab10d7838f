"""`model:` - the model that is taken, or described from scratch. Light import: pydantic only."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from rollout.ground.section import EXECUTION, Section, by_content


class ModelConfig(Section):
    """`model:` - take a model (`path`) or describe one to train from scratch: a LLaMA, or with num_experts a
    Mixtral.
    """

    path: str | None = Field(default=None, json_schema_extra=EXECUTION)
    """Model directory or hub id to start from; identified by its content. Absent: train from scratch."""
    revision: str | None = Field(default=None, json_schema_extra=EXECUTION)
    """Commit of a hub id."""
    architecture: Path | None = Field(default=None, json_schema_extra=EXECUTION)
    """config.json of a hub model that is not on this machine yet: `rlhf check` plans memory by it,
    and judges the model by it where the hub's cache does not have its own config.json.
    """
    layers: int = Field(default=4, ge=1)
    """Transformer layers."""
    hidden_size: int = Field(default=160, ge=32)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=432, ge=32)
    """Width of the MLP; of each expert where there are experts."""
    num_experts: int | None = Field(default=None, ge=2, le=4096)
    """Experts of each layer, a mixture (MoE) in place of the MLP; absent: none."""
    num_experts_per_tok: int | None = Field(default=None, ge=1)
    """Experts that work for each token, chosen and weighed by a router; absent: 2 where there are experts."""
    num_heads: int = Field(default=5, ge=1)
    """Attention heads; vLLM on CPU wants hidden_size / num_heads to be 32 or a larger multiple of 16."""
    num_kv_heads: int = Field(default=5, ge=1)
    """Key/value heads; must divide num_heads."""
    tie_embeddings: bool = True
    """Share the input embedding with the output head."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary position embedding."""
    context_length: int = Field(default=256, ge=16)
    """Tokens a sequence may have, prompt and response together."""
    chat_template: Path | None = Field(default=None, json_schema_extra=by_content())
    """Jinja file; absent: the tokenizer's own template, else ChatML. Identified by its content."""

    @property
    def num_chosen_experts(self) -> int:
        """`num_experts_per_tok` as it is in force."""
        return 2 if self.num_experts_per_tok is None else self.num_experts_per_tok

    def identity(self) -> dict[str, Any]:
        """With the number of chosen experts in force."""
        return {**super().identity(), "num_experts_per_tok": self.num_chosen_experts}

    def max_prompt_tokens(self, max_response_tokens: int) -> int:
        """Tokens of the longest prompt whose responses can be scored within the context: a response that was
        cut off at `max_response_tokens` has no end token yet, and scoring appends one.
        """
        return self.context_length - max_response_tokens - 1

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.path is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
                )
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
                )
            if self.hidden_size // self.num_heads in (8, 16):
                raise ValueError(
                    "hidden_size / num_heads is below 32, which vLLM's CPU attention rejects; use 32 or more"
                )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.num_experts is None:
            if self.num_experts_per_tok is not None:
                raise ValueError(
                    "num_experts_per_tok says how many of num_experts work for a token, and that is not set; "
                    "remove it, or describe a mixture with num_experts"
                )
            return self
        if self.path is not None:
            raise ValueError("num_experts describes a model from scratch, path takes one; remove either")
        if self.num_chosen_experts > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_chosen_experts} is more than num_experts {self.num_experts}"
            )
        return self
