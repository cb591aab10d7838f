"""Publish: the policy's weights to the engines, and the proof that they arrived. Every rank, together.

    weights --WeightSync--> engines hold `version` --ParityGate--> log-probs of a probe agree
                                  |                `--where due--> every tensor is the trainer's
                                  `--rollouts of a batch--> their log-probs agree, before its update

Tensors are compared after the first update of a process and every `rollout.compare_tensors_every_syncs`: in
bf16 trainer and engine, each right, differ by more than the few steps by which an engine may be behind.

The weight version counts syncs: +1 each time, also after training went back, so that one number never names
two sets of weights. It equals the step where nothing went back. A resumed run publishes the version of its
checkpoint again, so that what the journal holds of that version still counts.

Owns: the version, how sync and gate are put together, when what is compared, and that all ranks raise
together. Does not own: the comparisons and their limits (rollout.weight_sync). Only rank 0 talks to the
engines, so only rank 0 knows what they answered.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from rollout.api import Diagnosis, from_record, to_record
from rollout.errors import ParityError, WeightSyncError
from rollout.parity import ParityGate, ParityReport
from rollout.weight_file import in_short
from rollout.weight_sync import SyncReport, WeightSync
from stages.config.ppo import PPOSettings
from stages.data.batches import stage_seed
from stages.data.chat.tokenizer import ChatTokenizer
from stages.engines import ENGINE_DTYPE, Dtype, EngineClient
from stages.rl.experience import JudgedBatch, engine_differences
from stages.rl.trajectories import Batch, versions_of
from stages.training import ranks
from stages.training.distributed import Worker
from stages.training.forwards import logprobs_by
from stages.training.fsdp import Placed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the engines sample after a sync, the same each time, for the trainer to compare log-probs."""

    prompts: Sequence[tuple[int, ...]]  # at least `rollout.parity_num_prompts`; the first ones are taken
    stop_token_ids: tuple[int, ...]
    temperature: float
    seed: int


def wired(
    model: Placed,
    client: EngineClient,
    probe: Probe,
    *,
    dtype: Dtype,
    micro_batch_size: int,
    device: torch.device,
) -> tuple[WeightSync, ParityGate]:
    """The way from `model` to the engines, and its gate. Every rank, together: all gather the weights and
    score the probe, `micro_batch_size` responses to a forward; rank 0 alone talks to the engines. `dtype`: of
    the engines. Close the sync.
    """
    on_main = ranks.is_main()
    sync = WeightSync(
        model.weights(dtype=dtype),
        engine=client.engine if on_main else None,
        loop=client.loop if on_main else None,
        config=client.config,
        **({"host": client.host} if on_main else {}),
    )
    gate = ParityGate(
        sync,
        prompts=probe.prompts,
        stop_token_ids=probe.stop_token_ids,
        temperature=probe.temperature,
        seed=probe.seed,
        logprobs_of=logprobs_by(model, micro_batch_size=micro_batch_size, device=device),
    )
    return sync, gate


def publisher_of(
    policy: Placed,
    client: EngineClient,
    settings: PPOSettings,
    worker: Worker,
    *,
    chat: ChatTokenizer,
    prompts: Sequence[tuple[int, ...]],
) -> "Publisher":
    """The way of `policy` to the engines, as its training needs it. `prompts`: of the probe. Close it."""
    config = settings.ppo
    probe = Probe(
        prompts=prompts,
        stop_token_ids=chat.stop_token_ids,
        temperature=config.temperature,
        seed=stage_seed(settings.seed, "ppo", "probe"),
    )
    dtype, size = ENGINE_DTYPE[config.precision], config.pack_size
    sync, gate = wired(policy, client, probe, dtype=dtype, micro_batch_size=size, device=worker.device)
    return Publisher(sync, gate, stage=worker.runtime.stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One version that the engines hold."""

    sync: SyncReport
    parity: ParityReport
    comparison_seconds: float | None  # None where tensors were not compared

    def metrics(self) -> dict[str, float]:
        """For a line of the log."""
        compared = self.comparison_seconds
        return {
            "sync/seconds": self.sync.seconds,
            "sync/version": float(self.sync.version),
            "sync/parity_max_abs_diff": self.parity.max_abs_diff,
            "sync/parity_mean_abs_diff": self.parity.mean_abs_diff,
            **({} if compared is None else {"sync/comparison_seconds": compared}),
        }


class Publisher:
    """The way from the policy to the engines, with its gate.

    Example: publisher = Publisher(sync, gate, stage="ppo"); publisher.begin(0)
             publisher.check_batch(batch); ...; publisher.publish(has_moved=True)  # version 1
    """

    version: int  # that the engines hold, from `begin` on

    def __init__(self, sync: WeightSync, gate: ParityGate, *, stage: str) -> None:
        self._sync = sync
        self._gate = gate
        self._stage = stage
        self._every = sync.config.compare_tensors_every_syncs
        self._num_syncs = 0  # of this process
        self._move_compared = False
        self._warned = False

    @property
    def has_begun(self) -> bool:
        """Whether this process has sent weights."""
        return self._num_syncs > 0

    def begin(self, version: int) -> Published:
        """The first sync of this process. Its engines have started from the model directory, so the tensors
        are compared where another process has trained the policy since. Raises ParityError, WeightSyncError.
        """
        return self._published(version, compare=version > 0)

    def publish(self, *, has_moved: bool) -> Published:
        """A further sync, as the next version. `has_moved`: this process has updated the policy; before its
        first update nothing shows that an engine ignores what it is sent. Raises ParityError,
        WeightSyncError.
        """
        is_first_move = has_moved and not self._move_compared
        published = self._published(self.version + 1, compare=is_first_move)
        self._move_compared |= has_moved
        return published

    def check_drawn(self, step: int, batch: Batch) -> None:
        """Raises WeightSyncError when other weights than this version drew a batch. `step` counts from 0."""
        if others := versions_of(batch.trajectories) - {self.version}:
            raise WeightSyncError(
                f"{self._stage} step {step + 1}: tokens were drawn by weight versions {sorted(others)}, not "
                f"{self.version}"
            )

    def accepts_batch(self, step: int, batch: JudgedBatch) -> bool:
        """Whether engine and trainer agree about a training batch, by the rule of the probe. For a batch of
        the journal, which can be drawn again; `step` (0-based) is named in the warning.
        """
        report = self._batch_report(batch)
        is_accepted = self._gate.accepts(report)
        if not is_accepted and ranks.is_main():
            logger.warning(
                "%s step %d: log-probs in the journal are %.2g nats from the trainer's (%.2g at most), as if "
                "other weights had sampled them; the step is sampled again",
                self._stage,
                step + 1,
                report.mean_abs_diff,
                report.max_abs_diff,
            )
        return is_accepted

    def check_batch(self, batch: JudgedBatch) -> None:
        """Raises ParityError where engine and trainer disagree about a training batch that was just drawn."""
        report = self._batch_report(batch)
        _raised_by_all(lambda: self._gate.require(report))

    def close(self) -> None:
        """Free what the transport holds. Idempotent."""
        self._sync.close()

    def _published(self, version: int, *, compare: bool) -> Published:
        report = self._sync.sync(version)
        self.version = version
        self._num_syncs += 1
        probe = ranks.from_main(lambda: [to_record(rollout) for rollout in self._gate.probe(version)])
        parity = _of_main(self._gate.measure([from_record(record) for record in probe]))
        _raised_by_all(lambda: self._gate.require(parity))
        seconds = None
        if compare or self._num_syncs % self._every == 0:
            start = time.perf_counter()
            _raised_by_all(lambda: self._tell(self._gate.compare_tensors(version)))
            seconds = time.perf_counter() - start
        return Published(sync=report, parity=parity, comparison_seconds=seconds)

    def _tell(self, found: Diagnosis) -> None:
        """Once per process: what the comparison does not cover."""
        if found.not_compared and not self._warned:
            self._warned = True
            logger.warning(
                "%s: the engines' weights could not all be compared with the trainer's: %s",
                self._stage,
                in_short(found.not_compared),
            )

    def _batch_report(self, batch: JudgedBatch) -> ParityReport:
        diffs_N = engine_differences(batch)
        return _of_main(ParityReport.of(diffs_N, sample="training batch", version=self.version))


def _of_main(report: ParityReport) -> ParityReport:
    """Rank 0's report, on every rank: what is decided by it is decided alike."""
    return ParityReport(**ranks.from_main(lambda: asdict(report)))


def _raised_by_all(check: Callable[[], None]) -> None:
    """`check`, a collective, on every rank; rank 0's ParityError, which names tensors, is raised by all."""
    problem = None
    try:
        check()
    except ParityError as error:
        problem = str(error)
    verdict: str | None = ranks.from_main(lambda: problem)
    if verdict is not None:
        raise ParityError(verdict)
    assert problem is None, "every rank judges the same report"
