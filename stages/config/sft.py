"""`sft:` - supervised fine-tuning. Light import: pydantic only."""

from typing import ClassVar

from pydantic import Field

from stages.config.data import DataSource
from stages.config.stage import StageSettings
from stages.config.training import TrainingConfig


class SFTConfig(TrainingConfig):
    """`sft:` - supervised fine-tuning on assistant tokens only."""

    KEY: ClassVar[str] = "sft"
    """Where this section stands in a config."""
    data: list[DataSource] = Field(min_length=1)
    """Conversations: messages, prompt + completion, or instruction/input/output."""
    lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate."""
    batch_size: int = Field(default=32, ge=1)
    """Conversations per optimizer step."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Conversations per forward."""
    router_aux_loss_coef: float = Field(default=0.0, ge=0, le=10)
    """Weight of the routers' balance loss (Switch Transformers), added to the loss of each micro-batch; 0:
    none. The value in the model's own config is not used.
    """
    batch_tokens: int | None = Field(default=None, ge=16)
    """Token slots per optimizer step instead of batch_size: conversations are packed best-fit into rows of
    model.context_length slots, and a step takes batch_tokens // context_length rows, one per forward.
    """

    @property
    def takes_rows(self) -> bool:
        """With batch_tokens a forward is one row."""
        return self.batch_tokens is not None


class SFTSettings(StageSettings):
    """What the sft recipe may read."""

    sft: SFTConfig
