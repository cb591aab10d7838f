"""Where a run's processes would sit and what memory they would take: the plan that `rlhf check` prints.

    config --bundles_by_stage--> bundles to reserve (also the preflight's)
    config --architecture_of--> Architecture --memory_of--> bytes per worker and per engine --plan--> lines

Owns: the arithmetic of memory. Pure: no torch, no network, no weights; a model that is not on this machine is
described by its config.json (`model.architecture`). Activations and the allocator's overhead are not counted.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from pipeline import dag
from pipeline.errors import ConfigError
from pipeline.experiment import ExperimentConfig
from rollout.config import EngineConfig
from stages.bundles import StageBundles, bundles_of, rollout_of
from stages.config import ModelConfig, PPOConfig, SFTConfig, TrainingConfig
from stages.runtime import StageResources

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2}
MAX_SIZE = 2**31  # of one dimension
ADAM_BYTES = 8  # two fp32 moments per parameter
NAMES_OF_EXPERTS = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "expert_size": ("moe_intermediate_size",),
    "shared_size": ("shared_expert_intermediate_size", "shared_intermediate_size"),
}
"""Field of Architecture -> its names in the config.json of one family or another."""
IN_THE_STAGE_TASK = frozenset({"prepare"})
"""Stages that reserve nothing: they have no workers."""


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
    shared_size: int  # of an expert beside them that every token goes through; 0: none

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Raises ConfigError when a size is not there, or is none."""
        try:
            stated: dict[str, Any] = json.loads(path.read_text())
            optional = {
                "num_key_value_heads": stated["num_attention_heads"],
                "head_dim": stated["hidden_size"] // stated["num_attention_heads"],
                "tie_word_embeddings": False,  # transformers' own default for these three
                "num_experts": 0,
                "expert_size": stated["intermediate_size"],
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
        """Raises ValueError: what a file states may be of any type and size."""
        for field in fields(self):
            value = getattr(self, field.name)
            smallest = 0 if field.name in ("num_experts", "shared_size") else 1
            if type(value) is not field.type or (field.type is int and not smallest <= value < MAX_SIZE):
                raise ValueError(f"{field.name} is not {'a size' if field.type is int else 'true or false'}")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one process, by what they are for."""

    parts: dict[str, float]

    def __str__(self) -> str:
        """Example: "12.1 GiB: fp32 weights 4.0, gradients 4.0, Adam 4.1"."""
        parts = ", ".join(f"{name} {size / GIB:.3g}" for name, size in self.parts.items() if size)
        return f"{sum(self.parts.values()) / GIB:.3g} GiB: {parts}"


def bundles_by_stage(config: ExperimentConfig, stages: Collection[str]) -> dict[str, StageBundles]:
    """What each of `stages` reserves while it runs."""
    return {
        stage: bundles_of(stage, resources_of(config, stage), rollout_of(dag.settings_for(config, stage)))
        for stage in stages
        if stage not in IN_THE_STAGE_TASK
    }


def resources_of(config: ExperimentConfig, stage: str) -> StageResources:
    """`resources.<stage>` of the config."""
    by_stage: dict[str, StageResources] = {name: getattr(config.resources, name) for name in dag.STAGES}
    return by_stage[stage]


def architecture_of(config: ExperimentConfig) -> Architecture | None:
    """The model's sizes, from what is on this machine; None when nothing here tells. Raises ConfigError."""
    model = config.model
    if model.architecture is not None:
        return Architecture.from_file(model.architecture)
    if model.path is None:
        return _from_scratch(model, config)
    described = _local_config(model.path, model.revision)
    return None if described is None else _stated_in(described)


def plan(config: ExperimentConfig, stages: Collection[str]) -> Iterator[str]:
    """The lines of the plan."""
    architecture = architecture_of(config)
    for stage, bundles in bundles_by_stage(config, stages).items():
        yield str(bundles)
        if architecture is not None:
            for who, memory in memory_of(config, stage, architecture).items():
                yield f"  each {who} {memory}"
    if architecture is None:
        yield f"memory: size unknown, for {_why_unknown(config.model)} as model.architecture"


def _why_unknown(model: ModelConfig) -> str:
    if model.path is None:
        return "no `prepare:` tells the vocabulary; give the config.json of a model like it"
    if _local_config(model.path, model.revision) is None:
        return f"{model.path} is not on this machine; give its config.json"
    return f"{model.path} calls its sizes otherwise than a LLaMA; give a LLaMA's config.json of its size"


def memory_of(config: ExperimentConfig, stage: str, architecture: Architecture) -> dict[str, Memory]:
    """{"worker": ..., "engine": ...} of one stage."""
    memory = {"worker": _worker(config, stage, architecture)}
    rollout = rollout_of(dag.settings_for(config, stage))
    if rollout is not None:
        memory["engine"] = _engine(config, stage, rollout, architecture)
    return memory


def _worker(config: ExperimentConfig, stage: str, architecture: Architecture) -> Memory:
    body, whole = architecture.body, architecture.whole
    section = getattr(config, stage)
    if not isinstance(section, TrainingConfig):  # evaluate: three language models and the reward model
        return Memory(parts={"frozen fp32 models": 4.0 * (3 * whole + body)})
    num_workers, itemsize = resources_of(config, stage).num_workers, BYTES[section.precision]
    trained = {"reward": [body], "ppo": [whole, body]}.get(stage, [whole])
    frozen = []
    if isinstance(section, PPOConfig):
        frozen = [body, whole] if section.reads_reference else [body]
    is_sharded = num_workers > 1 or section.precision == "bf16"
    # FSDP2 gathers a layer at a time; what is in no layer (embeddings, head) is a unit of its own
    gathered = architecture.layer + whole - architecture.num_hidden_layers * architecture.layer
    frozen_itemsize = 4 if num_workers > 1 else itemsize  # shards are fp32, the gathered copy is not
    total = sum(trained) / num_workers
    return Memory(
        parts={
            "fp32 weights": 4 * total,
            "gradients": 4 * total,
            "Adam": ADAM_BYTES * total,
            "frozen models": frozen_itemsize * sum(frozen) / num_workers,
            f"gathered {section.precision} layers and gradients": 2 * itemsize * gathered * is_sharded,
            "largest logits and their gradients": 2 * 4 * _logits(config, stage) * architecture.vocab_size,
        }
    )


def _logits(config: ExperimentConfig, stage: str) -> int:
    """Positions of one micro-batch whose logits are computed, at most; a reward model has none."""
    section = getattr(config, stage)
    if stage == "reward":
        return 0
    if isinstance(section, PPOConfig):
        return section.pack_size * section.max_response_tokens
    if isinstance(section, SFTConfig) and section.batch_tokens is not None:
        return config.model.context_length  # a row per forward
    return int(section.micro_batch_size) * config.model.context_length


def _engine(
    config: ExperimentConfig, stage: str, rollout: EngineConfig, architecture: Architecture
) -> Memory:
    section = getattr(config, stage)
    itemsize = BYTES[section.precision] if isinstance(section, TrainingConfig) else 4
    weights = itemsize * architecture.whole
    length = config.model.context_length
    if resources_of(config, stage).num_gpus_per_engine == 0:
        return Memory(parts={"weights": weights, "keys and values": rollout.kv_cache_mib * 2**20})
    cache = rollout.max_num_seqs * length * architecture.kv_bytes(itemsize)
    return Memory(
        parts={
            "weights": weights,
            f"keys and values of {rollout.max_num_seqs} sequences of {length} tokens": cache,
        }
    )


def _from_scratch(model: ModelConfig, config: ExperimentConfig) -> Architecture | None:
    if config.prepare is None:
        return None
    return Architecture(
        vocab_size=config.prepare.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.hidden_size // model.num_heads,
        tie_word_embeddings=model.tie_embeddings,
        num_experts=model.num_experts or 0,
        expert_size=model.intermediate_size,
        shared_size=0,
    )


def _stated_in(path: Path) -> Architecture | None:
    """The sizes in a model's own config.json; None for a family that calls them otherwise (`n_embd`)."""
    try:
        return Architecture.from_file(path)
    except ConfigError as error:
        if isinstance(error.__cause__, KeyError):
            return None
        raise


def described_by(model: ModelConfig) -> Path | None:
    """The config.json of a given model that is on this machine, before the model is."""
    if model.path is None or model.architecture is not None:
        return model.architecture
    return _local_config(model.path, model.revision)


def _local_config(path: str, revision: str | None) -> Path | None:
    """config.json of a model directory, or of a hub id that was fetched before."""
    if Path(path).is_dir():
        return Path(path) / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
