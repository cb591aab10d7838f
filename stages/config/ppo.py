"""`ppo:` - proximal policy optimisation. Light import: pydantic only."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rollout.config import EngineConfig
from rollout.ground.section import EXECUTION
from stages.config.correction import Correction, RolloutCorrectionConfig
from stages.config.data import DataSource
from stages.config.sampling import ResponseSampling
from stages.config.stage import StageSettings
from stages.config.training import TrainingConfig

Role = Literal["policy", "value", "reference", "reward_model"]
"""What a model is there for."""
TRAINED_ROLES: tuple[Role, ...] = ("policy", "value")
"""The others stay as they were loaded."""


class PPOConfig(TrainingConfig):
    """`ppo:` - proximal policy optimisation with a value model; batch_size counts responses per optimizer
    step.
    """

    KEY: ClassVar[str] = "ppo"
    """Where this section stands in a config."""
    data: list[DataSource] = Field(min_length=1)
    """Prompts."""
    max_steps: int = Field(default=40, ge=1)
    """PPO iterations: one batch of rollouts and one weight sync each."""
    num_prompts: int = Field(default=128, ge=1)
    """Prompts per iteration."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses sampled per prompt."""
    max_response_tokens: int = Field(default=32, ge=1)
    """Response tokens at most, the end token included."""
    temperature: float = Field(default=1.0, ge=0.01, le=2)
    """Sampling temperature, 0.01 to 2; policy log-probs are taken at the same."""
    num_epochs: int = Field(default=2, ge=1)  # type: ignore[assignment]  # passes over one batch of rollouts
    """Passes over each batch of rollouts."""
    lr: float = Field(default=3e-4, gt=0, le=1)
    """Peak learning rate of the policy."""
    value_lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of the value model."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """Iterations, the first ones, in which only the value model learns; the policy's learning rate warms up
    and decays over those that are left.
    """
    batch_size: int = Field(default=64, ge=1)
    """Responses per optimizer step; all of a batch of rollouts where it has fewer."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Responses per forward."""
    adam_eps: float = Field(default=1e-5, gt=0)
    """AdamW: added to the denominator."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """GAE: weight of longer returns."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """Policy ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """Policy ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the loss of negative advantages, as a ratio; absent: none."""
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
    """Weights on the policy loss for what the engine computes differently than the trainer."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """Range of a value around its value before the update; absent: no clipping."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the policy's entropy, in nats per token, that is added to the objective."""
    loss_aggregation: Literal[
        "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"
    ] = "token_mean"
    """How token losses become one number."""
    whiten_advantages: bool = True
    """Whiten advantages once per batch of rollouts; with KL in the loss this changes the effective
    kl_coef.
    """
    score_clip: float | None = Field(default=10.0, gt=0)
    """Normalised scores are clipped to this range (normalise, then clip, then KL); absent: none."""
    truncation: Literal["penalty", "mask", "bootstrap"] = "penalty"
    """Responses without an end token: add missing_eos_penalty, leave them out, or bootstrap from the
    value.
    """
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Subtracted from the score of a truncated response, with truncation: penalty."""
    kl_coef: float = Field(default=0.05, ge=0)
    """beta: weight of the KL to the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL (Schulman 2020)."""
    kl_placement: Literal["reward", "loss", "kl_surrogate"] = "reward"
    """Where the KL acts: per token in the reward (k1), as a loss on the sequence log-ratio (k2), or per token
    in the loss (k2, k3), which optimises another objective. `loss` divides the KL by what loss_aggregation
    divides the policy loss by, so kl_coef means the same in all; it refuses sequence_mean_token_mean.
    """
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Whether kl_coef stays or is steered towards kl_target."""
    kl_target: float = Field(default=6.0, gt=0)
    """Adaptive: wanted KL to the reference, in nats per response."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Adaptive: responses over which kl_coef adapts."""
    max_kl: float = Field(default=50.0, gt=0)
    """The run stops (exit 5) when the mean KL to the reference exceeds this, in nats per response."""
    min_score_std: float = Field(default=1e-4, ge=0)
    """The run stops (exit 5) when the normalised scores of a batch spread less: a constant reward."""
    min_entropy: float = Field(default=0.0, ge=0)
    """The run stops (exit 5) when the mean entropy falls below this, in nats per token; 0: no floor."""
    max_truncated_frac: float = Field(default=1.0, ge=0, le=1)
    """The run stops (exit 5) when a larger share of a batch's responses has no end token."""
    max_repeated_frac: float = Field(default=1.0, ge=0, le=1)
    """The run stops (exit 5) when a larger share of the responses' 4-grams stood earlier in the same
    response.
    """
    log_every_steps: int = Field(default=1, ge=1, json_schema_extra=EXECUTION)
    """Iterations between lines of metrics.jsonl."""
    checkpoint_every_steps: int = Field(default=10, ge=1, json_schema_extra=EXECUTION)
    """Iterations between checkpoints."""
    num_logged_rollouts: int = Field(default=16, ge=0, json_schema_extra=EXECUTION)
    """Rollouts written to rollouts.jsonl per iteration."""

    @property
    def responses_per_step(self) -> int:
        """Responses in one batch of rollouts."""
        return self.num_prompts * self.samples_per_prompt

    @property
    def pack_size(self) -> int:
        """Responses per forward: a micro-batch is never larger than the batch it is part of."""
        return min(self.micro_batch_size, self.batch_size)

    @property
    def sampling(self) -> ResponseSampling:
        """How its responses are sampled."""
        return ResponseSampling(max_response_tokens=self.max_response_tokens, temperature=self.temperature)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The models that each worker holds, in the order in which they are loaded."""
        return ("policy", "value", *(("reference",) if self.reads_reference else ()), "reward_model")

    @property
    def reads_reference(self) -> bool:
        """Whether anything weighs the KL to the reference."""
        return self.kl_coef > 0

    def torn_packs(self) -> str | None:
        """What is wrong with a batch_size that micro-batches do not divide, in words that follow its name."""
        if self.batch_size % self.pack_size == 0:
            return None
        return (
            f"{self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}, and packs are "
            "never torn"
        )

    def correction(self, *, max_staleness: int) -> Correction:
        """The rollout correction in force where rollouts are up to `max_staleness` versions old."""
        differs = self.precision == "bf16" or max_staleness > 0
        return self.rollout_correction.in_force(default="token_truncate" if differs else "off")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        allowed = {"reward": {"k1"}, "loss": {"k2"}, "kl_surrogate": {"k2", "k3"}}[self.kl_placement]
        if self.kl_estimator not in allowed:
            raise ValueError(
                f"kl_estimator {self.kl_estimator} in the {self.kl_placement} does not optimise the "
                f"KL-regularised objective; use {' or '.join(sorted(allowed))}, or another kl_placement"
            )
        takes_kl = self.kl_placement == "loss" and self.kl_coef > 0
        if takes_kl and self.loss_aggregation == "sequence_mean_token_mean":
            raise ValueError(
                "kl_placement loss takes the KL of whole responses, but loss_aggregation "
                "sequence_mean_token_mean divides each response's policy loss by its own length, so no "
                "kl_coef weighs both alike; use another loss_aggregation, or kl_placement reward with "
                "kl_estimator k1"
            )
        if self.value_warmup_steps >= self.max_steps:
            raise ValueError(
                f"value_warmup_steps {self.value_warmup_steps} leaves the policy none of the max_steps "
                f"{self.max_steps} to learn in; use {self.max_steps - 1} at most, or more max_steps"
            )
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            raise ValueError("kl_controller adaptive scales kl_coef, which is 0; give it a start value")
        if "micro_batch_size" in self.model_fields_set and (problem := self.torn_packs()) is not None:
            raise ValueError(f"batch_size {problem}")
        if self.kl_horizon < self.responses_per_step:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} is below the {self.responses_per_step} responses of an "
                "iteration"
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"dual_clip {self.dual_clip:g} is not above 1 + clip_high = {1 + self.clip_high:g}"
            )
        return self


class PPOSettings(StageSettings):
    """What the ppo recipe may read."""

    ppo: PPOConfig
    rollout: EngineConfig

    @property
    def engines(self) -> EngineConfig:
        """It samples from engines."""
        return self.rollout

    @property
    def correction(self) -> Correction:
        """The rollout correction in force."""
        return self.ppo.correction(max_staleness=self.rollout.max_staleness)
