"""`evaluate:` - models on the same held-out prompts. Light import: pydantic only."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from rollout.config import EngineConfig
from rollout.ground.section import EXECUTION, Section
from stages.config.data import DataSource
from stages.config.score import ScoreFunction
from stages.config.stage import StageSettings


class EvaluateConfig(Section):
    """`evaluate:` - the models of the chain that are there, on the same held-out prompts."""

    KEY: ClassVar[str] = "evaluate"
    """Where this section stands in a config."""
    prompts: list[DataSource] = Field(min_length=1)
    """Held-out prompts; further columns are handed to the scoring function."""
    score: ScoreFunction | None = None
    """Judge of a response, in [0, 1]; absent: the reward model alone, where there is one."""
    max_prompts: int = Field(default=512, ge=1)
    """Prompts used, from the start of the data."""
    max_response_tokens: int = Field(default=32, ge=1)
    """Response tokens at most."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature, up to 2; 0 is greedy."""
    base_prompt: str = "{prompt}\n"
    """How the base model is prompted, as a plain continuation; it ends at a line break or the end of its
    document.
    """
    bootstrap_samples: int = Field(default=1000, ge=100)
    """Resamples behind the 95 % interval of the win rate."""
    num_samples_shown: int = Field(default=12, ge=0, json_schema_extra=EXECUTION)
    """Rows of the sample table."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature {self.temperature:g}: use 0 (greedy) or 0.01 to 2")
        if "{prompt}" not in self.base_prompt:
            raise ValueError("base_prompt has no {prompt} in it")
        return self


class EvaluateSettings(StageSettings):
    """What the evaluate recipe may read."""

    evaluate: EvaluateConfig
    rollout: EngineConfig

    @property
    def engines(self) -> EngineConfig:
        """It samples from engines."""
        return self.rollout
