"""Parity: the proof after a weight sync that engine and trainer compute the same log-probs.

    engine samples a probe or a batch -> trainer scores it -> beyond the limit? -> which tensors differ
    now and then, whatever the log-probs say: does any tensor differ?

Owns: the limits, the probe, the words of the error. Does not own: the comparison of tensors (weight_sync),
the trainer's log-probs (`LogprobsOf`, training).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from rollout.api import Diagnosis, LogprobsOf, Rollout, RolloutRequest, Sampling
from rollout.errors import EngineError, ParityError
from rollout.weight_file import in_short
from rollout.weight_sync import WeightSync


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """How far engine and trainer are apart on what the engine sampled: the probe, or a training batch."""

    sample: str  # "probe" | "training batch"
    version: int
    num_tokens: int
    max_abs_diff: float  # nats
    mean_abs_diff: float  # nats

    @classmethod
    def of(cls, diffs_N: torch.Tensor, *, sample: str, version: int) -> Self:
        """`diffs_N`: |log-prob of the engine - of the trainer| of every token. NaN stays NaN."""
        return cls(
            sample=sample,
            version=version,
            num_tokens=len(diffs_N),
            max_abs_diff=float(diffs_N.max()),
            mean_abs_diff=float(diffs_N.double().mean()),
        )


class ParityGate:
    """Stops a run whose engine and trainer disagree about log-probs: at the start, after every sync, and
    before the update on a training batch. In bf16, where log-probs cannot tell an engine that is a few steps
    behind, `compare_tensors` does.

    Example, one trainer process: gate.check(version=3). With several: rank 0 calls `probe` and broadcasts,
    then every rank calls `measure` and `require` on the same rollouts, for `logprobs_of` and the diagnosis
    may be collectives.
    """

    def __init__(
        self,
        sync: WeightSync,
        *,
        prompts: Sequence[tuple[int, ...]],
        stop_token_ids: tuple[int, ...],
        temperature: float,
        seed: int,
        logprobs_of: LogprobsOf,
    ) -> None:
        """The first `config.parity_num_prompts` of `prompts` are the probe. `logprobs_of` computes as
        training does.
        """
        self._sync = sync
        self._prompts = list(prompts[: sync.config.parity_num_prompts])
        self._stop_token_ids = stop_token_ids
        self._temperature = temperature
        self._seed = seed
        self._logprobs_of = logprobs_of

    def check(self, version: int) -> ParityReport:
        """Probe and compare. Raises ParityError."""
        return self.compare(self.probe(version))

    def probe(self, version: int) -> list[Rollout]:
        """Rank 0: responses sampled wholly under `version`, the same prompts and seeds every time."""
        requests = [self._request(version, index, prompt) for index, prompt in enumerate(self._prompts)]
        rollouts = self._sync.on_engine(
            lambda engine: engine.submit(requests), "parity probe", self._sync.config.generate_timeout_s
        )
        others = {drawn for rollout in rollouts for drawn in rollout.weight_versions} - {version}
        if others:
            raise ParityError(
                f"the parity probe of weight version {version} was sampled under {sorted(others)}"
            )
        return rollouts

    def compare(self, rollouts: Sequence[Rollout]) -> ParityReport:
        """Every rank, together: `measure` and `require`. Raises ParityError."""
        report = self.measure(rollouts)
        self.require(report)
        return report

    def measure(self, rollouts: Sequence[Rollout]) -> ParityReport:
        """Every rank, together: how far the trainer's log-probs are from those of the probe's `rollouts`."""
        policy = self._logprobs_of(
            [rollout.prompt_ids for rollout in rollouts],
            [rollout.response_ids for rollout in rollouts],
            1.0 if self._temperature == 0 else self._temperature,
        )
        diffs = [
            abs(ours - theirs)
            for rollout, row in zip(rollouts, policy, strict=True)
            for ours, theirs in zip(row, rollout.logprobs, strict=True)
        ]
        diffs_N = torch.tensor(diffs, dtype=torch.float64)
        return ParityReport.of(diffs_N, sample="probe", version=rollouts[0].weight_versions[0])

    def accepts(self, report: ParityReport) -> bool:
        """Whether the report is within the limits of the config; NaN never is. In bf16 a maximum means
        nothing.
        """
        config = self._sync.config
        if self._sync.source.dtype == "float32":
            return report.max_abs_diff <= config.parity_max_abs_diff
        return report.mean_abs_diff < math.log(config.parity_max_mean_ratio)

    def require(self, report: ParityReport) -> None:
        """Every rank, together, with the same report. Raises ParityError unless it is accepted; the tensors
        that differ are named on rank 0.
        """
        if not self.accepts(report):
            raise ParityError(
                f"engine and trainer disagree at weight version {report.version}: log-probs of the "
                f"{report.num_tokens} tokens of the {report.sample} differ by {report.max_abs_diff:.2g} at "
                f"most, {report.mean_abs_diff:.2g} on average; {in_words(self._sync.diagnose())}"
            )

    def compare_tensors(self, version: int) -> Diagnosis:
        """Every rank, together, after the sync of `version`: does the engine hold every tensor of the
        trainer? On rank 0 raises ParityError that names some of those that differ, and EngineError where a
        bf16 engine shows none: nothing else tells that it is behind. An engine that is split over several
        GPUs is not asked, because its tensors are not whole anywhere.
        """
        if (parallel := self._sync.config.tensor_parallel_size) > 1:
            reason = f"all weights (split over {parallel} GPUs)"
            return Diagnosis(differing=(), not_compared=(reason,))
        found = self._sync.diagnose()
        if found.differing:
            raise ParityError(
                f"after the sync of weight version {version}, which reported no error, {in_words(found)}: "
                "it samples from other weights; run again with another rollout.sync, to tell whether the "
                "transport or the engine is at fault"
            )
        if found.not_compared and found.shows_nothing and self._sync.source.dtype != "float32":
            raise EngineError(
                f"after the sync of weight version {version} no tensor of the engine could be compared with "
                f"the trainer's: {in_short(found.not_compared)}; in bf16 nothing else tells an engine "
                "that is behind: raise rollout.comparison_timeout_s where time ran out, or lower "
                "rollout.gpu_memory_frac where memory did"
            )
        return found

    def _request(self, version: int, index: int, prompt: tuple[int, ...]) -> RolloutRequest:
        sampling = Sampling(
            temperature=self._temperature,
            max_tokens=self._sync.config.parity_max_tokens,
            stop_token_ids=self._stop_token_ids,
            seed=self._seed + index,
        )
        return RolloutRequest(request_id=f"parity-{version}-{index}", prompt_ids=prompt, sampling=sampling)


def in_words(diagnosis: Diagnosis) -> str:
    """For one line of an error: which tensors differ, and which are not known to agree."""
    parts = []
    if diagnosis.differing:
        parts.append(f"the engine does not hold the trainer's {in_short(diagnosis.differing)}")
    if diagnosis.not_compared:
        parts.append(f"could not be compared: {in_short(diagnosis.not_compared)}")
    if not parts:
        parts.append(
            "the engine holds every tensor of the trainer, so the two compute differently "
            "(precision, mask, temperature)"
        )
    return "; ".join(parts)
