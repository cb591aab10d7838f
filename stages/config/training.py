"""What every stage that trains by gradient has. Light import: pydantic only."""

from typing import Literal

from pydantic import Field

from rollout.ground.section import EXECUTION, Section


class HealthConfig(Section):
    """`<stage>.health:` - what happens to optimizer steps that would do harm."""

    max_skipped_in_a_row: int = Field(default=3, ge=0)
    """A step whose loss or gradient is not finite is skipped and its batch kept; after more than so many in a
    row training goes back to the last checkpoint and leaves out the data since then.
    """
    max_rollbacks: int = Field(default=2, ge=0)
    """The run stops (exit 5) when it would have to go back once more than this."""
    spike_mads: float | None = Field(default=10.0, gt=0)
    """A loss is a spike when it lies so many robust standard deviations (median absolute deviations times
    1.48) above the median of the recent ones; absent: no detection.
    """
    spike_window: int = Field(default=64, ge=16)
    """Recent losses that a spike is measured against."""
    on_spike: Literal["log", "skip"] = "log"
    """Take the step of a spike and say so, or skip it like one that is not finite."""


FITTED = ("lr", "value_lr", "precision", "micro_batch_size", "gradient_checkpointing")
"""Settings of a `TrainingConfig` that are fitted to a given model where a config states none, or null
(pipeline.fitted_defaults). The defaults beside the fields are those of a chain from scratch.
"""


class TrainingConfig(Section):
    """What every stage that trains by gradient has."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; absent: `num_epochs` over the data."""
    num_epochs: float = Field(default=1.0, gt=0)
    """Passes over the data where max_steps is absent."""
    lr: float = Field(gt=0, le=1)
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_frac: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    min_lr_frac: float = Field(default=0.1, ge=0, le=1)
    """Where the decay ends, as a share of lr."""
    batch_size: int = Field(ge=1)
    """Sequences (pairs, for reward) per optimizer step."""
    micro_batch_size: int = Field(ge=1)
    """Sequences per forward: packed into one row, without padding."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16: fp32 master weights with a bf16 compute copy."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW: decay of the first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: decay of the second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW: decoupled weight decay on matrices; norms and biases have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    health: HealthConfig = HealthConfig()
    """What happens to optimizer steps that would do harm."""
    gradient_checkpointing: bool = Field(default=False, json_schema_extra=EXECUTION)
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_every_steps: int = Field(default=10, ge=1, json_schema_extra=EXECUTION)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every_steps: int = Field(default=50, ge=1, json_schema_extra=EXECUTION)
    """Steps between checkpoints that a killed run resumes from, and bad steps go back to."""
    keep_checkpoints: int = Field(default=2, ge=1, json_schema_extra=EXECUTION)
    """Newest of these checkpoints that are kept; the best one, and what a stop left, are kept besides."""

    @property
    def takes_rows(self) -> bool:
        """Whether a forward is one row of the context; then `micro_batch_size` is not read."""
        return False

    def torn_packs(self) -> str | None:
        """What is wrong with a batch_size that micro-batches do not divide; None where they need not."""
        return None
