"""Publish: the policy's weights to the engines, and the proof that they arrived. Every rank, together.

    weights --WeightSync--> engines hold `version` --ParityGate--> log-probs of a probe agree
                                  |                `--where due--> every tensor is the trainer's
                                  `--rollouts of a batch--> their log-probs agree, before its update

Tensors are compared after the first update of a process and every `rollout.compare_tensors_every_syncs`: in
bf16 trainer and engine, each right, differ by more than the few steps by which an engine may be behind.

Owns: when what is compared, and that all ranks raise together. Does not own: the comparisons and their limits
(rollout.weight_sync). Rank 0 alone talks to the engines, so it alone knows what they answered.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rollout.api import Diagnosis, from_record, to_record
from rollout.errors import ParityError
from rollout.parity import ParityGate, ParityReport
from rollout.weight_file import in_short
from rollout.weight_sync import SyncReport, WeightSync
from stages.data.experience import Judgement, RolloutPack, engine_differences
from stages.training import ranks

logger = logging.getLogger(__name__)


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
             publisher.check_batch(0, packs, judgements); ...; publisher.publish(1, has_moved=True)
    """

    def __init__(self, sync: WeightSync, gate: ParityGate, *, stage: str) -> None:
        self._sync = sync
        self._gate = gate
        self._stage = stage
        self._every = sync.config.compare_tensors_every_syncs
        self._num_syncs = 0
        self._move_compared = False
        self._warned = False

    def begin(self, version: int) -> Published:
        """The first sync of this process. Its engines have started from the model directory, so the tensors
        are compared where another process has trained the policy since. Raises ParityError, WeightSyncError.
        """
        return self._published(version, compare=version > 0)

    def publish(self, version: int, *, has_moved: bool) -> Published:
        """A further sync; `has_moved`: this process has updated the policy. Before its first update an engine
        that ignores what it is sent cannot be told. Raises ParityError, WeightSyncError.
        """
        is_first_move = has_moved and not self._move_compared
        published = self._published(version, compare=is_first_move)
        self._move_compared |= has_moved
        return published

    def accepts_batch(
        self, version: int, packs: Sequence[RolloutPack], judgements: Sequence[Judgement]
    ) -> bool:
        """Whether engine and trainer agree about a training batch, by the rule of the probe. For a batch of
        the journal, which can be drawn again.
        """
        report = self._batch_report(version, packs, judgements)
        is_accepted = self._gate.accepts(report)
        if not is_accepted and ranks.is_main():
            logger.warning(
                "%s step %d: log-probs in the journal are %.2g nats from the trainer's (%.2g at most), as if "
                "other weights had sampled them; the step is sampled again",
                self._stage,
                version + 1,
                report.mean_abs_diff,
                report.max_abs_diff,
            )
        return is_accepted

    def check_batch(
        self, version: int, packs: Sequence[RolloutPack], judgements: Sequence[Judgement]
    ) -> None:
        """Raises ParityError where engine and trainer disagree about a training batch that was just drawn."""
        report = self._batch_report(version, packs, judgements)
        _raised_by_all(lambda: self._gate.require(report))

    def close(self) -> None:
        """Free what the transport holds. Idempotent."""
        self._sync.close()

    def _published(self, version: int, *, compare: bool) -> Published:
        report = self._sync.sync(version)
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

    def _batch_report(
        self, version: int, packs: Sequence[RolloutPack], judgements: Sequence[Judgement]
    ) -> ParityReport:
        diffs_N = engine_differences(packs, judgements)
        return _of_main(ParityReport.of(diffs_N, sample="training batch", version=version))


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
