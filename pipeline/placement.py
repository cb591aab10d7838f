"""Where a run's processes would sit and what memory they would take: the plan that `rlhf check` prints.

    config --bundles_by_stage--> bundles to reserve (also the preflight's)
    config --architecture_of--> Architecture --memory_of--> bytes per worker and per engine --plan--> lines

Owns: what each process holds at its peak. Pure: no torch, no network, no weights; a model that is not on this
machine is described by its config.json (`model.architecture`). Weights, gradients and moments are exact
for a LLaMA, and so are logits with what log-probs need of them; an entropy may need more. Activations (every
sequence fills the context) and what FSDP gathers are estimates. What the allocators of torch and CUDA keep
besides is not counted.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import dag, stage_table
from pipeline.architecture import Architecture
from pipeline.errors import ConfigError
from pipeline.experiment import ExperimentConfig
from rollout.config import EngineConfig
from stages.bundles import StageBundles, bundles_of
from stages.config.model import ModelConfig
from stages.config.training import TrainingConfig
from stages.runtime import StageResources

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2}
ADAM_BYTES = 8  # two fp32 moments per parameter
SEQUENCES_EVALUATED, DOCUMENTS_EVALUATED = 16, 8
"""Of one forward in evaluate: responses, and held-out documents."""
LOGPROB_CHUNK = 1024
"""Positions whose log-softmax, and its gradient, exist at once."""
OTHERWISE = "calls its sizes otherwise than a LLaMA; give a LLaMA's config.json of its size"
LASTING = frozenset(
    ["fp32 weights", "gradients", "Adam", "frozen models", "frozen fp32 models", "weights", "keys and values"]
)
"""Parts of a process's memory that it holds for as long as it runs, whatever it computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one process at its peak, by what they are for."""

    parts: Mapping[str, float]

    def __str__(self) -> str:
        """Example: "12.1 GiB: fp32 weights 4.0, gradients 4.0, Adam 4.1"."""
        parts = ", ".join(f"{name} {size / GIB:.3g}" for name, size in self.parts.items() if size)
        return f"{self.peak / GIB:.3g} GiB: {parts}"

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.parts.values())

    @property
    def lasting(self) -> dict[str, int]:
        """Bytes that it holds at any time, by what they are for."""
        return {name: round(size) for name, size in self.parts.items() if name in LASTING}


def bundles_by_stage(config: ExperimentConfig, stages: Collection[str]) -> dict[str, StageBundles]:
    """What each of `stages` reserves while it runs."""
    return {
        stage: bundles_of(stage, resources_of(config, stage), config.settings_of(stage).engines)
        for stage in stages
        if stage_table.STAGES[stage].has_workers
    }


def resources_of(config: ExperimentConfig, stage: str) -> StageResources:
    """`resources.<stage>` of the config."""
    by_stage: dict[str, StageResources] = {
        name: getattr(config.resources, name) for name in stage_table.STAGES
    }
    return by_stage[stage]


def architecture_of(config: ExperimentConfig) -> Architecture | None:
    """The model's sizes, from what is on this machine; None when nothing here tells. Raises ConfigError."""
    model = config.model
    if model.architecture is not None:
        return _stated_in(model.architecture)
    if model.path is None:
        return _from_scratch(model, config)
    described = config_json_of(model.path, model.revision)
    return None if described is None else _stated_in(described)


def plan(config: ExperimentConfig, stages: Collection[str]) -> Iterator[str]:
    """Formats the memory plan, a line per stage, process and load."""
    architecture = architecture_of(config)
    for stage, bundles in bundles_by_stage(config, stages).items():
        yield str(bundles)
        if architecture is not None:
            for who, memory in memory_of(config, stage, architecture).items():
                yield f"  each {who} {memory}"
            if (loading := host_memory_of(config, stage, architecture)) is not None:
                yield f"  each worker while it loads, in its machine's memory, {loading}"
    if architecture is None:
        yield f"memory: size unknown, for {_why_unknown(config.model)} as model.architecture"


def _why_unknown(model: ModelConfig) -> str:
    if model.architecture is not None:
        return f"{model.architecture} {OTHERWISE}"
    if model.path is None:
        return "no `prepare:` tells the vocabulary; give the config.json of a model like it"
    if config_json_of(model.path, model.revision) is None:
        return f"{model.path} is not on this machine; give its config.json"
    return f"{model.path} {OTHERWISE}"


def host_memory_of(config: ExperimentConfig, stage: str, architecture: Architecture) -> Memory | None:
    """What each worker needs of its machine's memory while it loads: one model after the other, whole and in
    fp32, before it is sharded or goes to a GPU. None for a worker that keeps them there anyway.
    """
    section, resources = getattr(config, stage), resources_of(config, stage)
    if not resources.num_gpus and resources.num_workers == 1:
        return None
    largest = architecture.whole
    if isinstance(section, TrainingConfig):
        trained, frozen = _models(config, stage, architecture)
        largest = max(trained + frozen)
    return Memory(parts={"a whole model": 4 * largest})


def on_the_machine(config: ExperimentConfig, stage: str, architecture: Architecture) -> list[Memory]:
    """What the processes of one stage take of the memory of their machine, if all are on one: those on GPUs
    only while they load.
    """
    if not stage_table.STAGES[stage].has_workers:
        return []
    resources, memory = resources_of(config, stage), memory_of(config, stage, architecture)
    worker = memory["worker"]
    if resources.num_gpus:
        loading = host_memory_of(config, stage, architecture)
        assert loading is not None
        worker = loading
    rollout = config.settings_of(stage).engines
    engines = (
        [] if rollout is None or resources.num_gpus_per_engine else [memory["engine"]] * rollout.num_engines
    )
    return [worker] * resources.num_workers + engines


def memory_of(config: ExperimentConfig, stage: str, architecture: Architecture) -> dict[str, Memory]:
    """{"worker": ..., "engine": ...} of one stage."""
    memory = {"worker": _worker(config, stage, architecture)}
    rollout = config.settings_of(stage).engines
    if rollout is not None:
        memory["engine"] = _engine(config, stage, rollout, architecture)
    return memory


def forward_bytes(config: ExperimentConfig, stage: str, architecture: Architecture) -> float:
    """What forward and backward of one micro-batch of a stage that trains hold, at most: activations, logits
    and their gradients.
    """
    return sum(_of_tokens(config, stage, architecture).values())


def _worker(config: ExperimentConfig, stage: str, architecture: Architecture) -> Memory:
    section = getattr(config, stage)
    if not isinstance(section, TrainingConfig):
        return _evaluating(config, stage, architecture)
    resources, itemsize = resources_of(config, stage), BYTES[section.precision]
    num_workers = resources.num_workers
    trained, frozen = _models(config, stage, architecture)
    frozen_itemsize = 4 if num_workers > 1 else itemsize  # shards are fp32, the gathered copy is not
    total = sum(trained) / num_workers
    lasting = {
        "fp32 weights": 4 * total,
        "gradients": 4 * total,
        "Adam": ADAM_BYTES * total,
        "frozen models": frozen_itemsize * sum(frozen) / num_workers,
    }
    # on GPUs AdamW works on all tensors of a model at once, with a temporary one for each
    stepping = {"temporaries of Adam": 4 * max(trained) / num_workers * bool(resources.num_gpus)}
    peak = max(_micro_batch(config, stage, architecture), stepping, key=lambda parts: sum(parts.values()))
    return Memory(parts={**lasting, **peak})


def _models(config: ExperimentConfig, stage: str, architecture: Architecture) -> tuple[list[int], list[int]]:
    """Parameters of the models that a stage trains, and of those that it holds frozen beside them."""
    sizes = {"language model": architecture.whole, "scorer": architecture.body}
    models = stage_table.STAGES[stage].models(config, dag.needs(config, stage))
    return [sizes[kind] for kind in models.trained], [sizes[kind] for kind in models.frozen]


def _has_output_head(config: ExperimentConfig, stage: str) -> bool:
    """Whether a model that the stage trains computes logits."""
    models = stage_table.STAGES[stage].models(config, dag.needs(config, stage))
    return "language model" in models.trained


def _micro_batch(config: ExperimentConfig, stage: str, architecture: Architecture) -> dict[str, float]:
    """What forward and backward of one micro-batch hold at once, at most."""
    section = getattr(config, stage)
    itemsize = BYTES[section.precision]
    head = architecture.vocab_size * architecture.hidden_size
    # in no layer, hence a unit of its own: embedding and head
    root = architecture.whole - architecture.num_hidden_layers * architecture.layer
    unit = max(root, architecture.layer)  # the largest that is reduced
    is_sharded = resources_of(config, stage).num_workers > 1 or section.precision == "bf16"
    has_fp32_head = section.precision == "bf16" and _has_output_head(config, stage)
    return {
        # FSDP2 gathers a layer at a time, and the next one meanwhile; gradients are reduced in fp32
        f"gathered {section.precision} layers and gradients": is_sharded
        * (itemsize * (2 * root + 3 * architecture.layer) + 4 * unit),
        "fp32 copy of the head and its gradient": 2 * 4 * head * has_fp32_head,
        **_of_tokens(config, stage, architecture),
    }


def _of_tokens(config: ExperimentConfig, stage: str, architecture: Architecture) -> dict[str, float]:
    """What grows with the tokens of a micro-batch."""
    section, tokens = getattr(config, stage), _tokens(config, stage)
    per_token = architecture.activations(BYTES[section.precision], recomputed=section.gradient_checkpointing)
    positions, row = _logits(config, stage), 2 * 4 * architecture.vocab_size  # logits, and their gradients
    return {
        "largest logits and their gradients": row * positions,
        "a chunk of log-softmax and its gradient": row * min(positions, LOGPROB_CHUNK),
        f"activations of {tokens} tokens, about": per_token * tokens,
    }


def _evaluating(config: ExperimentConfig, stage: str, architecture: Architecture) -> Memory:
    """The compared models and the reward model; log-probs of some responses, or documents, at once."""
    assert config.evaluate is not None
    positions = SEQUENCES_EVALUATED * config.evaluate.max_response_tokens
    if config.prepare is not None:
        positions = max(positions, DOCUMENTS_EVALUATED * config.model.context_length)
    _, frozen = _models(config, stage, architecture)
    return Memory(
        parts={
            "frozen fp32 models": 4 * sum(frozen),
            "largest logits": 4 * positions * architecture.vocab_size,
            "a chunk of log-softmax": 2 * 4 * min(positions, LOGPROB_CHUNK) * architecture.vocab_size,
        }
    )


def _tokens(config: ExperimentConfig, stage: str) -> int:
    """Of one micro-batch, at most: every sequence fills the context."""
    section, context = getattr(config, stage), config.model.context_length
    return context if section.takes_rows else _sequences(section, stage) * context


def _sequences(section: TrainingConfig, stage: str) -> int:
    """Of one micro-batch that is not one row."""
    return stage_table.STAGES[stage].sequences_per_row * min(section.micro_batch_size, section.batch_size)


def _logits(config: ExperimentConfig, stage: str) -> int:
    """Positions of one micro-batch whose logits are computed, at most; a reward model has none."""
    section = getattr(config, stage)
    if not _has_output_head(config, stage):
        return 0
    if stage_table.STAGES[stage].syncs_what_it_trains:  # it trains on the responses that it samples
        return _sequences(section, stage) * int(section.max_response_tokens)
    return _tokens(config, stage)


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
        experts_per_token=1 if model.num_experts is None else model.num_chosen_experts,
        shared_size=0,
    )


def _stated_in(path: Path) -> Architecture | None:
    """The sizes in a config.json, which transformers judges elsewhere; None for a family that calls them
    otherwise (`n_embd`), or that has one for each layer (Gemma 3n).
    """
    try:
        return Architecture.from_file(path)
    except ConfigError as error:
        if isinstance(error.__cause__, KeyError | TypeError):
            return None
        raise


def described_by(model: ModelConfig) -> Path | None:
    """The config.json of a model whose weights are not on this machine yet: its own, where the hub's cache
    has it, else `model.architecture` in its place. Memory is planned by the latter in any case.
    """
    own = None if model.path is None else config_json_of(model.path, model.revision)
    return own or model.architecture


def config_json_of(path: str, revision: str | None) -> Path | None:
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
