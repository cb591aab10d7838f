"""The whole config tree: one field per stage, the rollout engine, resources; and the checks across stages.

Owns: `ExperimentConfig`. Does not own: reading YAML (config), the graph (dag). Light import.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rollout.config import EngineConfig
from rollout.ground.section import Seconds, Section
from stages.config.data import DataSource
from stages.config.evaluate import EvaluateConfig, EvaluateSettings
from stages.config.model import ModelConfig
from stages.config.ppo import PPOConfig, PPOSettings
from stages.config.prepare import PrepareConfig, PrepareSettings
from stages.config.pretrain import PretrainConfig, PretrainSettings
from stages.config.reward import RewardConfig, RewardSettings
from stages.config.sampling import ResponseSampling
from stages.config.sft import SFTConfig, SFTSettings
from stages.config.stage import StageSettings
from stages.config.training import TrainingConfig
from stages.runtime import StageResources

SETTINGS: Mapping[str, type[StageSettings]] = {
    "prepare": PrepareSettings,
    "pretrain": PretrainSettings,
    "sft": SFTSettings,
    "reward": RewardSettings,
    "ppo": PPOSettings,
    "evaluate": EvaluateSettings,
}
"""Stage -> what its recipe may read, hence what is fingerprinted."""
STAGE_FIELDS = tuple(SETTINGS)
"""Fields of `ExperimentConfig` (and of `ResourcesConfig`) that belong to one stage each."""

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_ADDRESS = re.compile(rf"({_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]{{2,45}}\]):([1-9][0-9]{{0,4}})")


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of a Ray cluster; None for `auto`, where Ray looks for it. Raises ValueError for what is no address.

    Example: host_and_port("[::1]:6379") == ("::1", 6379)
    """
    if address == "auto":
        return None
    found = _ADDRESS.fullmatch(address)
    if found is None or int(found[2]) > 65535:
        raise ValueError("must be `auto`, or `host:port` with a port from 1 to 65535")
    return found[1].strip("[]"), int(found[2])


EXPERTS_WIDTH = 32
"""What the hidden size of a mixture has to be a multiple of in vLLM 0.32 on the CPU (its cpu_moe kernels)."""


def too_narrow(stage: str) -> str:
    """What is wrong with another hidden size, and the ways out."""
    return (
        f"is not a multiple of {EXPERTS_WIDTH}, which vLLM's experts on the CPU ask for in {stage}; use "
        f"one that is, rollout.engine: hf, or a GPU (resources.{stage}.num_gpus_per_engine)"
    )


class ResourcesConfig(Section):
    """`resources:` - where the run's processes live. Nothing here changes a result by itself; where a given
    model is trained on a GPU, what the config leaves open is fitted to that (precision, micro-batches).
    """

    address: str | None = None
    """Ray cluster to join (`host:port`, `[IPv6]:port`, or `auto`); absent: a local one for this run."""
    placement_timeout_s: Seconds = Field(default=120.0, gt=0)
    """Deadline for placing a stage's workers."""
    collective_timeout_s: Seconds = Field(default=3600.0, gt=0)
    """Deadline for the workers of a stage to meet. It must be longer than an engine's start with a batch of
    generations, and longer than writing a checkpoint: the others wait while the first worker does that.
    """
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

    @field_validator("address")
    @classmethod
    def _address_is_one(cls, address: str | None) -> str | None:
        if address is not None:
            host_and_port(address)
        return address


class PipelineConfig(Section):
    """`pipeline:` - how the graph is executed."""

    executor: Literal["ray", "inline"] = "ray"
    """Ray tasks, or every stage in this process (for a debugger)."""
    lock_timeout_s: Seconds = Field(default=30.0, ge=0)
    """How long to wait for another run that is working on the same stage."""
    stop_timeout_s: Seconds = Field(default=60.0, gt=0)
    """After the first SIGINT, SIGTERM or SIGHUP stages have so long to reach a step boundary and save their
    state.
    """
    retry_wait_s: Seconds = Field(default=2.0, ge=0)
    """`rlhf run --retries`: pause before a restart; doubled for each further one without progress."""


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
        longest = self.model.max_prompt_tokens(1)  # of a response too: beside a prompt of one token
        for key, tokens in self._response_lengths():
            if tokens > longest:
                yield (
                    f"{key}: {tokens} leaves no room for a prompt and an end token in model.context_length "
                    f"{context}; use {longest} at most, or a longer context"
                )
        for key, sources in self._datasets():
            if all(source.weight == 0 for source in sources):
                yield f"{key}: every weight is 0, so there is nothing to read; set one above 0"
        if self.model.revision is not None and self.model.path is None:
            yield "model.revision: has no meaning without model.path; set that, or remove this"
        if self.prepare is not None and self.prepare.min_chars > self.prepare.max_chars:
            yield "prepare.min_chars: above prepare.max_chars, so no document fits; lower it"
        if self.sft is not None and self.sft.batch_tokens is not None and self.sft.batch_tokens < context:
            yield (
                f"sft.batch_tokens: {self.sft.batch_tokens} do not hold one row of model.context_length "
                f"{context}; use {context} or more"
            )
        if self.ppo is not None and self.model.path is None and (problem := self.ppo.torn_packs()):
            yield f"ppo.batch_size: {problem}"  # a micro-batch that is fitted to a given model divides it
        yield from self._nothing_to_balance()
        if self.ppo is not None and self.ppo.precision == "bf16" and self.rollout.engine == "hf":
            yield "rollout.engine: hf is the fp32 reference; use vllm with ppo.precision bf16"
        if self.rollout.num_engines > 1 and self.pipeline.executor == "inline":
            yield "rollout.num_engines: several engines need Ray; set 1, or pipeline.executor: ray"
        yield from self._workers_do_not_fit()
        yield from self._transport_problems()
        for stage in self.stages_with_engines():
            yield from self._gpu_problems(stage)
        yield from self._experts_too_narrow()
        yield from self._not_supported_yet()

    def remarks(self) -> Iterator[str]:
        """One line per thing that is as it was asked for, and yet may surprise, and per setting whose value
        follows from others: `rlhf check` shows them.
        """
        yield from self._normaliser_remarks()
        if self.ppo is not None:
            yield self._correction_remark(self.ppo)
            if (parallel := self.rollout.tensor_parallel_size) > 1:
                yield (
                    f"rollout.tensor_parallel_size: {parallel}: the engines' tensors are not compared with "
                    "the trainer's, because no GPU holds them whole; in bf16 nothing else tells an engine "
                    "that is a few steps behind"
                )

    @property
    def ppo_sampling(self) -> ResponseSampling | None:
        """How ppo samples what the reward model scores, which its normaliser is measured by."""
        return None if self.ppo is None else self.ppo.sampling

    @property
    def evaluation_prompts(self) -> list[DataSource]:
        """What prepare keeps out of the training text."""
        wanted = self.prepare is not None and self.prepare.decontaminate
        return self.evaluate.prompts if wanted and self.evaluate is not None else []

    def _normaliser_remarks(self) -> Iterator[str]:
        """What the scores of the reward model are normalised over."""
        reward, ppo = self.reward, self.ppo_sampling
        if reward is None:
            return
        sampling = reward.normaliser_sampling(ppo)
        if sampling is None:
            yield (
                "reward.init_from: pretrain: scores are normalised over the held-out pairs' own responses; "
                "none are sampled, and reward.normaliser_prompts is not read"
            )
            return
        over = (
            f"reward: scores are normalised over responses of at most {sampling.max_response_tokens} tokens "
            f"at temperature {sampling.temperature:g}"
        )
        if ppo is None:
            yield f"{over}; no ppo section says how they will be sampled"
        elif reward.normaliser_max_response_tokens is None:
            yield f"{over}, as ppo's; changing ppo.max_response_tokens or ppo.temperature re-runs reward"
        else:
            yield f"{over}, the temperature as ppo's; changing ppo.temperature re-runs reward"
        if ppo is not None and sampling.max_response_tokens != ppo.max_response_tokens:
            yield (
                f"reward.normaliser_max_response_tokens: {sampling.max_response_tokens} is not "
                f"ppo.max_response_tokens {ppo.max_response_tokens}, and the scores of responses of another "
                "length have another mean and spread; remove it to follow ppo"
            )

    def _correction_remark(self, ppo: PPOConfig) -> str:
        """What `ppo.rollout_correction` resolves to, and why."""
        correction = f"ppo.rollout_correction: {ppo.correction(max_staleness=self.rollout.max_staleness)}"
        if ppo.rollout_correction.type != "auto":
            return correction
        if ppo.precision == "bf16":
            return f"{correction} (auto: ppo.precision is bf16)"
        stale = "up to {} versions old" if self.rollout.max_staleness else "synchronous"
        return f"{correction} (auto: rollouts are fp32 and {stale.format(self.rollout.max_staleness)})"

    def _nothing_to_balance(self) -> Iterator[str]:
        """Of a chain that trains a dense model from scratch; for others the model itself says it."""
        if self.pretrain is None or self.model.path is not None or self.model.num_experts is not None:
            return
        sections = {"pretrain": self.pretrain, "sft": self.sft}
        for stage, section in sections.items():
            if section is not None and section.router_aux_loss_coef:
                yield (
                    f"{stage}.router_aux_loss_coef: {section.router_aux_loss_coef:g}, but the model has no "
                    "experts to balance; set model.num_experts, or 0"
                )

    def _workers_do_not_fit(self) -> Iterator[str]:
        for stage in STAGE_FIELDS:
            num_workers, section = getattr(self.resources, stage).num_workers, getattr(self, stage)
            if num_workers == 1 or section is None:
                continue
            key = f"resources.{stage}.num_workers"
            if stage == "evaluate":
                yield f"{key}: {stage} does not train, it runs in one process; set 1"
            elif self.pipeline.executor == "inline":
                yield (
                    f"{key}: pipeline.executor inline runs each stage in one process; set 1, or "
                    "pipeline.executor ray"
                )
            elif not isinstance(section, TrainingConfig):
                continue
            elif getattr(self.resources, stage).num_gpus not in (0, 1):
                yield f"resources.{stage}.num_gpus: several workers have one GPU each, or none; set 1 or 0"
            else:
                yield from self._uneven_shares(stage, section, num_workers)

    def _uneven_shares(self, stage: str, section: TrainingConfig, num_workers: int) -> Iterator[str]:
        key = f"resources.{stage}.num_workers"
        if isinstance(section, SFTConfig) and section.batch_tokens is not None:
            context = self.model.context_length
            rows = section.batch_tokens // context
            if rows % num_workers:
                yield (
                    f"{key}: sft.batch_tokens {section.batch_tokens} is {rows} rows of "
                    f"model.context_length {context}, which cannot be shared out evenly between "
                    f"{num_workers} workers; use a multiple of {num_workers * context}"
                )
        elif stage != "ppo" and section.batch_size % num_workers:  # ppo shares out packs, evenly or not
            yield (
                f"{key}: {stage}.batch_size {section.batch_size} cannot be shared out evenly between "
                f"{num_workers} workers; use a multiple of {num_workers}"
            )

    def _transport_problems(self) -> Iterator[str]:
        if self.resources.address is not None and self.pipeline.executor == "inline":
            yield "resources.address: pipeline.executor inline joins no cluster; use ray, or remove this"
        if self.rollout.tensor_parallel_size > 1 and self.rollout.engine == "hf":
            yield "rollout.tensor_parallel_size: only vllm splits a model over GPUs; set 1"
        if self.rollout.sync == "nccl" and self.rollout.engine == "hf":
            yield "rollout.sync: nccl is vLLM's own transport; use gloo or shm with rollout.engine hf"
        if self.rollout.sync == "nccl" and self.pipeline.executor == "inline":
            yield "rollout.sync: nccl needs trainer and engine in processes of their own; use executor ray"

    def _gpu_problems(self, stage: str) -> Iterator[str]:
        """Of a stage with engines: which GPUs they have, beside the workers'."""
        resources: StageResources = getattr(self.resources, stage)
        key, each, parallel = (
            f"resources.{stage}",
            resources.num_gpus_per_engine,
            self.rollout.tensor_parallel_size,
        )
        if parallel > 1 and each != parallel:
            yield (
                f"rollout.tensor_parallel_size: {parallel} GPUs per engine; set {key}.num_gpus_per_engine "
                f"to {parallel} too, not {each:g}"
            )
        if self.rollout.sync == "nccl" and (resources.num_gpus == 0 or each < 1):
            yield (
                f"rollout.sync: nccl connects GPUs of their own; set {key}.num_gpus and "
                f"{key}.num_gpus_per_engine to 1 or more, or use gloo or shm"
            )
        first = resources.num_gpus + (each * self.rollout.num_engines if self.rollout.sync == "shm" else 0)
        for gpus in (resources.num_gpus, each, first):
            if gpus > 1 and gpus % 1:
                yield (
                    f"{key}: {gpus:g} GPUs for one bundle; Ray grants a share of one GPU, or whole ones "
                    "(with rollout.sync shm the engines share the first worker's bundle)"
                )

    def _experts_too_narrow(self) -> Iterator[str]:
        """Of a mixture from scratch; a given one is judged with its config.json (planning)."""
        width = self.model.hidden_size
        if self.model.num_experts is not None and width % EXPERTS_WIDTH:
            for stage in self.stages_with_cpu_vllm():
                yield f"model.hidden_size: {width} {too_narrow(stage)}"

    def stages_with_cpu_vllm(self) -> tuple[str, ...]:
        """Those that open vLLM engines on the CPU."""
        if self.rollout.engine != "vllm":
            return ()
        return tuple(
            stage
            for stage in self.stages_with_engines()
            if getattr(self.resources, stage).num_gpus_per_engine == 0
            and self.settings_of(stage).engines is not None
        )

    def stages_with_engines(self) -> tuple[str, ...]:
        """The configured stages that may open engines: whose recipes may read what these are."""
        return tuple(
            stage
            for stage, settings in SETTINGS.items()
            if "rollout" in settings.model_fields and getattr(self, stage) is not None
        )

    def settings_of(self, stage: str) -> StageSettings:
        """The sections that the recipe of a configured stage may read."""
        settings = SETTINGS[stage]
        return settings(**{name: getattr(self, name) for name in settings.model_fields})

    def _not_supported_yet(self) -> Iterator[str]:
        if self.rollout.max_staleness > 0:
            yield "rollout.max_staleness: only 0 (synchronous) is supported in this version; set 0"

    def _response_lengths(self) -> Iterator[tuple[str, int]]:
        if self.ppo is not None:
            yield "ppo.max_response_tokens", self.ppo.max_response_tokens
        if self.reward is not None and (sampling := self.reward.normaliser_sampling(self.ppo_sampling)):
            yield "reward.normaliser_max_response_tokens", sampling.max_response_tokens
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
