"""`reward:` - the reward model and the normaliser of its scores. Light import: pydantic only."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rollout.config import EngineConfig
from stages.config.data import DataSource
from stages.config.sampling import ResponseSampling
from stages.config.stage import StageSettings
from stages.config.training import TrainingConfig

NORMALISER_SAMPLING = ResponseSampling(max_response_tokens=32, temperature=1.0)
"""Of the reward stage where no ppo section says how responses will be sampled."""


class RewardConfig(TrainingConfig):
    """`reward:` - a Bradley-Terry reward model from preference pairs."""

    KEY: ClassVar[str] = "reward"
    """Where this section stands in a config."""
    data: list[DataSource] = Field(min_length=1)
    """Preference pairs: explicit, implicit (shared prefix) or HH transcripts."""
    init_from: Literal["sft", "pretrain"] = "sft"
    """The model whose body the reward model starts from; `pretrain` lets it run beside sft."""
    lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs per optimizer step."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Pairs per forward."""
    too_long: Literal["drop", "truncate"] = "drop"
    """Pairs longer than model.context_length: left out and counted, or the start of the prompt is cut."""
    heldout_frac: float = Field(default=0.1, gt=0, lt=0.9)
    """Share of the pairs held out for accuracy, chosen by content hash of the prompt."""
    group_column: str | None = None
    """Column that every row must have; held-out accuracy is also reported per value of it, as
    accuracy_<value>.
    """
    min_accuracy: float = Field(default=0.55, ge=0, le=1)
    """Gate: a lower held-out accuracy ends the run (exit 5)."""
    min_score_std: float = Field(default=1e-3, ge=0)
    """Gate: a smaller spread of the scores over sampled responses ends the run (exit 5)."""
    normaliser_prompts: int = Field(default=128, ge=2)
    """Prompts answered by the sft model for the mean and std that scores are normalised by, sampled as ppo
    samples (ppo.temperature; 1.0 without a ppo section). With init_from: pretrain nothing is sampled and this
    is not read: the held-out pairs' own responses are scored.
    """
    normaliser_max_response_tokens: int | None = Field(default=None, ge=1)
    """Length bound of those responses; absent: ppo.max_response_tokens, or 32 without a ppo section. With
    init_from: pretrain it has no meaning and is refused.
    """

    def normaliser_sampling(self, ppo: ResponseSampling | None) -> ResponseSampling | None:
        """How the responses of the normaliser are sampled: as `ppo` will sample (None: no such section), up
        to a length of their own where one is set. None with init_from: pretrain: nothing is sampled.
        """
        if self.init_from == "pretrain":
            return None
        like = NORMALISER_SAMPLING if ppo is None else ppo
        own_length = self.normaliser_max_response_tokens
        return like if own_length is None else like.model_copy(update={"max_response_tokens": own_length})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.init_from == "pretrain" and self.normaliser_max_response_tokens is not None:
            raise ValueError(
                "normaliser_max_response_tokens bounds nothing with init_from: pretrain, where the held-out "
                "pairs' own responses are scored; remove it"
            )
        return self


class RewardSettings(StageSettings):
    """What the reward recipe may read."""

    reward: RewardConfig
    rollout: EngineConfig
    ppo_sampling: ResponseSampling | None = None
    """How ppo will sample the responses that this model scores; none without a ppo section."""

    @property
    def engines(self) -> EngineConfig | None:
        """None where there is no policy to sample from yet."""
        return None if self.normaliser is None else self.rollout

    @property
    def normaliser(self) -> ResponseSampling | None:
        """How the responses of the normaliser are sampled; None: they are not."""
        return self.reward.normaliser_sampling(self.ppo_sampling)

    @property
    def normaliser_length_key(self) -> str:
        """The setting that bounds their length."""
        follows_ppo = self.reward.normaliser_max_response_tokens is None and self.ppo_sampling is not None
        return "ppo.max_response_tokens" if follows_ppo else "reward.normaliser_max_response_tokens"

    def identity(self) -> dict[str, Any]:
        """With the sampling that holds, whichever section states it: stating what is so changes nothing."""
        identity, sampling = super().identity(), self.normaliser
        del identity["ppo_sampling"]
        identity["reward"] |= {
            "normaliser_max_response_tokens": None if sampling is None else sampling.max_response_tokens,
            "normaliser_temperature": None if sampling is None else sampling.temperature,
        }
        return identity
