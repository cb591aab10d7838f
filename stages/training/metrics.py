"""metrics.jsonl: one object per logged step, written as it happens, cut back on resume.

    recipe --log--> work_dir/metrics.jsonl --> live line of the cli, report.html, the artifact

Owns: the file and the table of metric names. Only recipes log; everything else returns its numbers.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rollout.ground.disk import disk_problems
from rollout.ground.durable import write_whole
from rollout.ground.whole import NotWhole, bad_sectors_as_damage

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

METRICS: dict[str, str] = {
    "train/loss": "loss per token (pretrain, sft; with the routers' balance loss) or per pair (reward), nats",
    "train/lr": "learning rate of this step",
    "train/grad_norm": "global gradient norm before clipping",
    "train/tokens_per_second": "tokens in forward and backward, per second",
    "train/accuracy": "share of training pairs ranked as labelled",
    "train/margin": "mean chosen - rejected score",
    "train/router_aux_loss": "balance loss of the routers without its coefficient; equals "
    "num_experts_per_tok when tokens are spread evenly",
    "train/router_max_load": "load of a layer's busiest expert over an even one, mean over layers",
    "train/router_dead_experts": "experts of all layers that worked for no token since the last line",
    "train/skipped_steps": "optimizer steps skipped so far: not finite, or a spike with on_spike: skip",
    "train/loss_spikes": "losses so far that lay far above the recent ones",
    "rollout/score": "mean normalised reward-model score of the batch",
    "rollout/score_std": "its standard deviation",
    "rollout/kl": "KL to the reference: mean of k1 summed over each response, nats",
    "rollout/length": "mean response tokens",
    "rollout/truncated": "share of responses without an end token",
    "rollout/repeated": "mean share of a response's 4-grams that stood earlier in it",
    "rollout/entropy": "mean entropy of the policy per response token, nats",
    "rollout/kl_coef": "beta in force",
    "rollout/engine_max_abs_diff": "largest |log-prob of the engine - of the trainer| over the batch, nats",
    "rollout/engine_mean_abs_diff": "mean of that over the batch's tokens, nats",
    "rollout/engine_kl_k1": "KL of the engine's distribution to the trainer's per token (k1), nats",
    "rollout/engine_kl_k3": "the same by k3",
    "rollout/ratio_mean": "probability under the trainer over that under the engine, before any limit, of "
    "what rollout_correction compares (tokens where it is off); mean over the batch's tokens",
    "rollout/ratio_min": "smallest of these ratios",
    "rollout/ratio_max": "largest of these ratios",
    "rollout/weight_mean": "mean weight of rollout_correction on the policy loss; 1 when off",
    "rollout/weight_limited": "share of tokens whose weight was truncated or masked",
    "ppo/policy_loss": "clipped policy loss, mean over updates",
    "ppo/value_loss": "clipped value loss, mean over updates",
    "ppo/approx_kl": "KL between anchor and policy (k3), mean over updates",
    "ppo/clip_fraction": "share of tokens whose ratio was clipped",
    "ppo/ratio_first": "largest |ratio - 1| on the first minibatch of the first epoch",
    "ppo/explained_variance": "1 - var(return - value) / var(return)",
    "ppo/policy_grad_norm": "global gradient norm of the policy before clipping",
    "ppo/value_grad_norm": "global gradient norm of the value model before clipping",
    "ppo/lr": "learning rate of the policy",
    "sync/seconds": "time of the weight sync",
    "sync/version": "weight version the engines hold",
    "sync/parity_max_abs_diff": "largest |log-prob difference| of the probe after the sync, nats",
    "sync/parity_mean_abs_diff": "mean |log-prob difference| of that probe, nats",
    "sync/comparison_seconds": "seconds of comparing the engines' tensors with the trainer's, where due",
    "time/generation": "seconds waiting for rollouts",
    "time/scoring": "seconds in reward, reference and value forwards",
    "time/training": "seconds in PPO updates",
    "time/sync": "seconds in sync and parity check",
}


class StepLog:
    """A jsonl file of objects with a `step`, written by rank 0; a resumed stage first drops the lines of
    steps it will take again. EnvironmentProblem when the disk refuses.
    """

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self._path = path
        self.cut(resumed_step)

    def cut(self, last_step: int) -> None:
        """Drop the lines of later steps."""
        if not _writes():
            return
        with disk_problems(self._path):
            kept = [text for text, entry in _sound_lines(self._path) if entry["step"] <= last_step]
            write_whole(self._path, b"".join(text + b"\n" for text in kept))

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append `lines`; each has a `step` (1-based: the steps done so far)."""
        if not _writes():
            return
        with disk_problems(self._path), self._path.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, lines))


class MetricsLog:
    """`metrics.jsonl` of one stage.

    Example: log = MetricsLog(work_dir, max_steps=40, resumed_step=0); log(3, {"train/loss": 2.1})
    """

    def __init__(self, work_dir: Path, *, max_steps: int, resumed_step: int) -> None:
        self._log = StepLog(work_dir / METRICS_FILE, resumed_step=resumed_step)
        self._max_steps = max_steps

    def cut(self, last_step: int) -> None:
        """Drop the lines of later steps: they will be taken again."""
        self._log.cut(last_step)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line for `step` (1-based: the steps done so far)."""
        undeclared = metrics.keys() - METRICS.keys()
        assert not undeclared, f"metrics without a description in METRICS: {undeclared}"
        self._log.write(
            [{"step": step, "max_steps": self._max_steps, "time": round(time.time(), 3), **metrics}]
        )


def _writes() -> bool:
    from stages.training import ranks  # torch: the report reads METRICS without it

    return ranks.is_main()


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a StepLog's file, [] without one. Leaves out a last line that a kill has cut short, and
    with a warning all damaged lines.
    """
    return [entry for _, entry in _sound_lines(path)]


def step_line(text: bytes) -> dict[str, Any] | None:
    """The object in a line of a StepLog's file; None where it is not an object with an integer `step`."""
    try:
        entry = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and type(entry.get("step")) is int else None


def _sound_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.is_file():
        return
    try:
        with bad_sectors_as_damage():
            *lines, _torn = path.read_bytes().split(b"\n")  # bytes: a kill may have cut a character in two
    except NotWhole as error:
        logger.warning("%s: damaged: %s; it begins again", path, error)
        return
    sound = [(text, entry) for text in lines if (entry := step_line(text)) is not None]
    if len(sound) < len(lines):
        logger.warning("%s: damaged: %d of %d lines left out", path, len(lines) - len(sound), len(lines))
    yield from sound


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
