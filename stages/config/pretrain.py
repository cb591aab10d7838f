"""`pretrain:` - causal language modelling. Light import: pydantic only."""

from typing import ClassVar

from pydantic import Field

from stages.config.stage import StageSettings
from stages.config.training import TrainingConfig


class PretrainConfig(TrainingConfig):
    """`pretrain:` - causal language modelling on prepare's shards; batch_size counts rows of context_length
    tokens.
    """

    KEY: ClassVar[str] = "pretrain"
    """Where this section stands in a config."""
    lr: float = Field(default=2e-3, gt=0, le=1)
    """Peak learning rate."""
    batch_size: int = Field(default=16, ge=1)
    """Rows of context_length tokens per optimizer step."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Rows per forward."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW: decoupled weight decay on matrices."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0, le=10)
    """Weight of the routers' balance loss (Switch Transformers), added to the loss of each micro-batch;
    absent: 0.01 where `model.num_experts` describes a mixture from scratch, else 0.
    """


class PretrainSettings(StageSettings):
    """What the pretrain recipe may read."""

    pretrain: PretrainConfig

    @property
    def router_aux_loss_coef(self) -> float:
        """The weight in force. 0.01 is Switch Transformers' own (Fedus et al. 2021, section 2.2)."""
        if self.pretrain.router_aux_loss_coef is not None:
            return self.pretrain.router_aux_loss_coef
        return 0.0 if self.model.num_experts is None else 0.01
