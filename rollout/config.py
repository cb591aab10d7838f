"""Settings of the rollout engines and of the weight sync. Light import: pydantic only.

A field's default lives here and nowhere else.
"""

from typing import Literal

from pydantic import Field

from rollout.ground.section import EXECUTION, Seconds, Section


class EngineConfig(Section):
    """`rollout:` - who generates, and how its weights get there."""

    engine: Literal["vllm", "hf"] = "vllm"
    """Generation backend: vLLM, or plain transformers (the slow reference)."""
    sync: Literal["shm", "gloo", "nccl"] = Field(default="shm", json_schema_extra=EXECUTION)
    """Transport of the weights: a mapped file on the same host, gloo between hosts, nccl between GPUs."""
    num_engines: int = Field(default=1, ge=1, le=10_000, json_schema_extra=EXECUTION)
    """Engine processes that share the prompts."""
    tensor_parallel_size: int = Field(default=1, ge=1, json_schema_extra=EXECUTION)
    """GPUs that one vLLM engine is split over; as many as `resources.<stage>.num_gpus_per_engine`."""
    max_staleness: int = Field(default=0, ge=0)
    """How many weight versions old a training rollout may be; 0 is synchronous."""
    max_num_seqs: int = Field(default=128, ge=1, json_schema_extra=EXECUTION)
    """Sequences an engine decodes at once."""
    kv_cache_mib: int = Field(default=256, ge=8, json_schema_extra=EXECUTION)
    """Memory for keys and values, in MiB, on CPU engines."""
    gpu_memory_frac: float = Field(default=0.4, gt=0, le=0.95, json_schema_extra=EXECUTION)
    """Share of a GPU's memory that an engine may take."""
    enforce_eager: bool = Field(default=True, json_schema_extra=EXECUTION)
    """Skip compilation and graph capture: a faster start, slower long runs on a GPU."""
    parity_max_abs_diff: float = Field(default=1e-4, gt=0, json_schema_extra=EXECUTION)
    """fp32: the run stops when the log-prob of any token, of the probe after a sync or of a training batch,
    differs by more between engine and trainer, in nats.
    """
    parity_max_mean_ratio: float = Field(default=1.05, gt=1, json_schema_extra=EXECUTION)
    """bf16: the run stops when exp(mean |log-prob difference|) of a probe or training batch reaches this."""
    parity_num_prompts: int = Field(default=4, ge=1, json_schema_extra=EXECUTION)
    """Prompts of the probe behind each parity check."""
    parity_max_tokens: int = Field(default=16, ge=1, json_schema_extra=EXECUTION)
    """Response tokens per probe prompt."""
    compare_tensors_every_syncs: int = Field(default=20, ge=1, json_schema_extra=EXECUTION)
    """ppo: every so many weight syncs, and after the first update of a process, each tensor that the engines
    hold is compared with the trainer's: in bf16, log-probs cannot tell an engine that is a few steps behind.
    """
    comparison_timeout_s: Seconds = Field(default=1800.0, gt=0, json_schema_extra=EXECUTION)
    """Deadline for one such comparison. An engine reads out a packed layer by its outputs, which takes as
    long as one forward over as many tokens as the model is wide.
    """
    start_timeout_s: Seconds = Field(default=300.0, gt=0, json_schema_extra=EXECUTION)
    """Deadline for an engine to load its model and answer."""
    generate_timeout_s: Seconds = Field(default=600.0, gt=0, json_schema_extra=EXECUTION)
    """Deadline for one batch of generations."""
    sync_timeout_s: Seconds = Field(default=120.0, gt=0, json_schema_extra=EXECUTION)
    """Deadline for one weight sync."""
    health_timeout_s: Seconds = Field(default=30.0, gt=0, json_schema_extra=EXECUTION)
    """An engine that leaves a round trip unanswered for so long counts as dead; longer than one step of
    decoding.
    """
    health_interval_s: Seconds = Field(default=2.0, gt=0, json_schema_extra=EXECUTION)
    """Between two such round trips while an engine generates."""
