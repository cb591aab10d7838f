"""What a run tells of itself: times of an iteration, totals over resumes too, and some samples as text.

Owns: `Clock` (one iteration), `Totals` (the run; part of each checkpoint), the lines of rollouts.jsonl.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stages.data.chat.tokenizer import ChatTokenizer
from stages.rl.experience import JudgedBatch

Phase = Literal["generation", "scoring", "training", "sync"]


class Clock:
    """Seconds per phase of one iteration, all its parts together."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = {}
        self._start = time.perf_counter()

    def total(self) -> float:
        """Seconds since the iteration began, what no phase covers included."""
        return time.perf_counter() - self._start

    @contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.setdefault(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        return {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}


@dataclass(kw_only=True)
class Totals:
    """Sums over all iterations so far."""

    seconds: dict[str, float] = field(default_factory=dict)  # per phase
    loop_seconds: float = 0.0  # of all iterations, up to the lines of rollouts.jsonl
    responses: int = 0
    sync_seconds: list[float] = field(default_factory=list)  # one per sync
    parity_max_abs_diff: float = 0.0  # worst of all parity checks, nats
    num_comparisons: int = 0  # of all tensors, engine against trainer
    comparison_seconds: float = 0.0  # of all of them
    engine_max_abs_diff: float = 0.0  # worst over all training rollouts, nats
    engine_mean_abs_diff: float = 0.0  # worst mean of a batch of them, nats
    kl_final: float | None = None  # of the last batch, nats per response; None: nothing read the reference
    score_final: float = 0.0  # of the last batch, normalised

    def see_parity(self, max_abs_diff: float) -> None:
        self.parity_max_abs_diff = max(self.parity_max_abs_diff, max_abs_diff)

    def see_comparison(self, seconds: float | None) -> None:
        """`seconds`: what comparing all tensors took; None where nothing was compared."""
        if seconds is not None:
            self.num_comparisons += 1
            self.comparison_seconds += seconds

    def add(
        self,
        clock: Clock,
        summary: Mapping[str, float],
        *,
        responses: int,
        sync_seconds: float,
    ) -> None:
        """One finished iteration."""
        for phase, seconds in clock.seconds.items():
            self.seconds[phase] = self.seconds.setdefault(phase, 0.0) + seconds
        self.loop_seconds += clock.total()
        self.responses += responses
        self.sync_seconds.append(sync_seconds)
        self.engine_max_abs_diff = max(self.engine_max_abs_diff, summary["rollout/engine_max_abs_diff"])
        self.engine_mean_abs_diff = max(self.engine_mean_abs_diff, summary["rollout/engine_mean_abs_diff"])
        self.score_final = summary["rollout/score"]
        if "rollout/kl" in summary:
            self.kl_final = summary["rollout/kl"]

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def metrics(self, *, version: int) -> dict[str, float]:
        """The stage's final metrics."""
        return {
            "parity_max_abs_diff": self.parity_max_abs_diff,
            "tensor_comparisons": float(self.num_comparisons),
            "comparison_seconds": self.comparison_seconds,
            "engine_max_abs_diff": self.engine_max_abs_diff,
            "engine_mean_abs_diff": self.engine_mean_abs_diff,
            "version_final": float(version),
            "sync_seconds_median": statistics.median(self.sync_seconds),
            "samples_per_second": self.responses / self.loop_seconds,
            "generation_seconds": self.seconds["generation"],
            "scoring_seconds": self.seconds["scoring"],
            "training_seconds": self.seconds["training"],
            "sync_seconds": self.seconds["sync"],
            "score_final": self.score_final,
            "steps": float(len(self.sync_seconds)),
            **({} if self.kl_final is None else {"kl_final": self.kl_final}),
        }


def rollout_lines(
    step: int, batch: JudgedBatch, chat: ChatTokenizer, *, max_lines: int
) -> Iterator[dict[str, Any]]:
    """The first `max_lines` trajectories of a step (1-based), as text with what was made of them."""
    for index, trajectory in enumerate(batch.trajectories[:max_lines]):
        turn = trajectory.turn
        yield {
            "step": step,
            "prompt": chat.decode(turn.prompt_ids),
            "response": chat.response_text(turn.response_ids),
            "score": float(batch.scores_B[index]),
            "kl": None if batch.kl_B is None else float(batch.kl_B[index]),
            "version": min(turn.weight_versions),
            "finish_reason": turn.finish_reason,
            "response_ids": list(turn.response_ids),
        }
