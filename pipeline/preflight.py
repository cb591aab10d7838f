"""Before the first stage: what `rlhf doctor` knows of this machine, against what the run needs of it.

    PlannedRun --check_machine--> EnvironmentProblem, in one line with its cure | remarks, a line each

Owns: what a run needs of the machine it is started on, and which lack ends it now rather than hours later:
one that is certain. Does not own: what the machine has (machine), sizes (placement), the nodes of a cluster
(cluster). Starts nothing and imports nothing heavy.
"""

from collections import Counter
from collections.abc import Iterator

from pipeline import dag, doctor, machine, placement
from pipeline.architecture import Architecture
from pipeline.experiment import ExperimentConfig
from pipeline.planning import PlannedRun
from pipeline.stage_table import STAGES
from rollout.config import EngineConfig
from rollout.engines import require_installed
from rollout.ground.errors import EnvironmentProblem

MIB, GIB = 2**20, 2**30
QUEUE_BYTES = 160 * MIB
"""vLLM (0.32) starts no engine of several processes where /dev/shm has less free, for the queue between them.
"""
WANTED_OPEN_FILES = 8192
"""What Ray asks for."""


def check_machine(planned: PlannedRun) -> list[str]:
    """What to say before the first stage starts. Raises EnvironmentProblem for what would end the run later.

    On a cluster that is joined, the machines that count are its nodes: see `cluster`.
    """
    config = planned.config
    if not planned.to_run or config.resources.address is not None:
        return []
    for stage, rollout in _engines(config, planned.to_run):
        require_installed(rollout)
        if rollout.engine == "vllm" and not (finding := doctor.plugin()).ok:
            raise EnvironmentProblem(f"{stage}: {finding.text}")
    architecture = placement.architecture_of(config)
    _check_shared_memory(config, planned.to_run, architecture)
    machine.raise_open_files(WANTED_OPEN_FILES)
    remarks = [] if (remark := doctor.quota_remark()) is None else [remark]
    if config.pipeline.executor == "ray" and not (finding := doctor.open_files()).ok:
        remarks.append(f"open files: {finding.text}")
    if architecture is not None:
        remarks += _memory_remarks(config, planned.to_run, architecture)
    return remarks


def _engines(config: ExperimentConfig, stages: tuple[str, ...]) -> Iterator[tuple[str, EngineConfig]]:
    for stage in stages:
        if (rollout := config.settings_of(stage).engines) is not None:
            yield stage, rollout


def _check_shared_memory(
    config: ExperimentConfig, stages: tuple[str, ...], architecture: Architecture | None
) -> None:
    """Raises EnvironmentProblem. The queue of an engine and the weights of a sync need not fit at once: an
    engine looks for that room when it starts, and hardly takes any of it.
    """
    for stage, rollout in _engines(config, stages):
        needs = {}
        if rollout.engine == "vllm" and _has_queue(config, stage, rollout):
            needs["the queue of an engine's processes"] = QUEUE_BYTES
        if STAGES[stage].syncs_what_it_trains and rollout.sync != "nccl" and architecture is not None:
            precision = getattr(config, stage).precision
            needs["the weights of a sync"] = placement.BYTES[precision] * architecture.whole
        for what, needed in needs.items():
            finding = doctor.shared_memory(needed)
            if not finding.ok:
                raise EnvironmentProblem(f"{stage}: {what}: /dev/shm: {finding.text}")


def _has_queue(config: ExperimentConfig, stage: str, rollout: EngineConfig) -> bool:
    """On one GPU the scheduler calls the model in its own process."""
    on_cpu = placement.resources_of(config, stage).num_gpus_per_engine == 0
    return on_cpu or rollout.tensor_parallel_size > 1


def _memory_remarks(
    config: ExperimentConfig, stages: tuple[str, ...], architecture: Architecture
) -> Iterator[str]:
    """Raises EnvironmentProblem where weights, gradients and optimizer alone are more than there is."""
    has = machine.memory()
    for level in dag.levels(config, stages):
        held = [memory for stage in level for memory in placement.on_the_machine(config, stage, architecture)]
        lasting: Counter[str] = Counter()
        for memory in held:
            lasting.update(memory.lasting)
        certain, peak = lasting.total(), sum(memory.peak for memory in held)
        who = " beside ".join(level)
        if certain > has.total:
            raise EnvironmentProblem(
                f"{who}: holds {certain / GIB:.3g} GiB ({_in_words(lasting)}), without what a step computes, "
                f"and this machine has {has.total / GIB:.3g} GiB with its swap; {_cure(lasting)}"
            )
        if peak > has.free:
            yield (
                f"{who}: about {peak / GIB:.3g} GiB at its peak, and {has.free / GIB:.3g} GiB are free: a "
                "process may be killed; `rlhf check` says what takes them"
            )


def _in_words(parts: "Counter[str]") -> str:
    """Example: "keys and values 977, fp32 weights 1.2"."""
    return ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.most_common(3))


def _cure(parts: "Counter[str]") -> str:
    if parts.most_common(1)[0][0] == "keys and values":
        return "lower rollout.kv_cache_mib"
    return "take a machine with more, a cluster (resources.address) or a smaller model"
