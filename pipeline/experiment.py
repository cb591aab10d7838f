"""The whole config tree: one field per stage, the rollout engine, resources; and the checks across stages.

Owns: `ExperimentConfig`. Does not own: reading YAML (config), the graph (dag). Light import.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rollout.config import EngineConfig, Section
from stages.config import (
    DataSource,
    EvaluateConfig,
    ModelConfig,
    PPOConfig,
    PrepareConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
)
from stages.runtime import StageResources

STAGE_FIELDS = ("prepare", "pretrain", "sft", "reward", "ppo", "evaluate")
"""Fields of `ExperimentConfig` (and of `ResourcesConfig`) that belong to one stage each."""


class ResourcesConfig(Section):
    """`resources:` - where the run's processes live. Nothing here changes a result."""

    address: str | None = None
    """Ray cluster to join (`host:port`, or `auto`); absent: a local one for this run."""
    placement_timeout_s: float = Field(default=120.0, gt=0)
    """Deadline for placing a stage's workers."""
    prepare: StageResources = StageResources()
    """Workers of prepare."""
    pretrain: StageResources = StageResources()
    """Workers of pretrain."""
    sft: StageResources = StageResources()
    """Workers of sft."""
    reward: StageResources = StageResources()
    """Workers of reward."""
    ppo: StageResources = StageResources()
    """Workers of ppo."""
    evaluate: StageResources = StageResources()
    """Workers of evaluate."""


class PipelineConfig(Section):
    """`pipeline:` - how the graph is executed."""

    executor: Literal["ray", "inline"] = "ray"
    """Ray tasks, or every stage in this process (for a debugger)."""
    lock_timeout_s: float = Field(default=30.0, ge=0)
    """How long to wait for another run that is working on the same stage."""
    stop_timeout_s: float = Field(default=60.0, gt=0)
    """After the first SIGINT or SIGTERM stages have so long to reach a step boundary and save their state."""
    retry_wait_s: float = Field(default=2.0, ge=0)
    """`rlhf run --retries`: pause before the first restart; doubled for each further one without progress."""


class ExperimentConfig(Section):
    """One experiment: dataset in, model out."""

    name: str = Field(min_length=1, max_length=100)
    """Name of the run: `outputs/runs/<name>`."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed everything random is derived from."""
    outputs: Path = Path("outputs")
    """Directory of artifacts, runs and unfinished work. Unlike every other path it is relative to the working
    directory of the command, not to this file.
    """
    model: ModelConfig = ModelConfig()
    prepare: PrepareConfig | None = None
    pretrain: PretrainConfig | None = None
    sft: SFTConfig | None = None
    reward: RewardConfig | None = None
    ppo: PPOConfig | None = None
    evaluate: EvaluateConfig | None = None
    rollout: EngineConfig = EngineConfig()
    resources: ResourcesConfig = ResourcesConfig()
    pipeline: PipelineConfig = PipelineConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_directory_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("use letters, digits, '.', '_' and '-' only: it names a directory")
        return name

    @model_validator(mode="after")
    def _stages_fit_together(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        """One line per mistake that no single section can see, each starting with the key it blames.

        Only what can never work: a stage may be run by itself on `--input`, so whether the sections and the
        model that a stage needs are there is for the graph to say (dag).
        """
        if not any(getattr(self, stage) is not None for stage in STAGE_FIELDS):
            yield f"name: no stage has a section: nothing to run; add one of {', '.join(STAGE_FIELDS)}"
        context = self.model.context_length
        for key, tokens in self._response_lengths():
            if tokens >= context:
                yield (
                    f"{key}: {tokens} leaves no room for a prompt in model.context_length {context}; "
                    f"use {context - 1} at most, or a longer context"
                )
        for key, sources in self._datasets():
            if all(source.weight == 0 for source in sources):
                yield f"{key}: every weight is 0, so there is nothing to read; set one above 0"
        if self.model.revision is not None and self.model.path is None:
            yield "model.revision: has no meaning without model.path; set that, or remove this"
        if self.prepare is not None and self.prepare.min_chars > self.prepare.max_chars:
            yield "prepare.min_chars: above prepare.max_chars, so no document fits; lower it"
        if self.ppo is not None and self.ppo.precision == "bf16" and self.rollout.engine == "hf":
            yield "rollout.engine: hf is the fp32 reference; use vllm with ppo.precision bf16"
        if self.rollout.num_engines > 1 and self.pipeline.executor == "inline":
            yield "rollout.num_engines: several engines need Ray; set 1, or pipeline.executor: ray"
        yield from self._not_supported_yet()

    def _not_supported_yet(self) -> Iterator[str]:
        if self.rollout.max_staleness > 0:
            yield "rollout.max_staleness: only 0 (synchronous) is supported in this version; set 0"
        if self.rollout.sync != "shm":
            yield f"rollout.sync: {self.rollout.sync} is not supported in this version; set shm"
        for stage in STAGE_FIELDS:
            if getattr(self.resources, stage).num_workers > 1:
                yield f"resources.{stage}.num_workers: one worker is supported in this version; set 1"

    def _response_lengths(self) -> Iterator[tuple[str, int]]:
        if self.reward is not None:
            yield "reward.normaliser_max_response_tokens", self.reward.normaliser_max_response_tokens
        if self.ppo is not None:
            yield "ppo.max_response_tokens", self.ppo.max_response_tokens
        if self.evaluate is not None:
            yield "evaluate.max_response_tokens", self.evaluate.max_response_tokens

    def _datasets(self) -> Iterator[tuple[str, list[DataSource]]]:
        if self.prepare is not None:
            yield "prepare.data", self.prepare.data
        if self.sft is not None:
            yield "sft.data", self.sft.data
        if self.reward is not None:
            yield "reward.data", self.reward.data
        if self.ppo is not None:
            yield "ppo.data", self.ppo.data
        if self.evaluate is not None:
            yield "evaluate.prompts", self.evaluate.prompts
