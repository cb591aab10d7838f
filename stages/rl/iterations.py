"""Iterations: the stepper of every stage that learns from its own rollouts.

    engines hold `version` --prepare: draw, judge, credit--> Prepared --Learner--> policy
                                                                 |        `--publish--> version + 1
                                                                 `--> lines of the logs, totals, checkpoint

Owns: what an iteration leaves behind: KL coefficient, totals, lines of the logs. Does not own: what it learns
from (`prepare`, the recipe's), the updates (update), the weight version (publish), the journal (source).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config.ppo import PPOConfig
from stages.data.chat.tokenizer import ChatTokenizer
from stages.rl.algorithms import kl_controller
from stages.rl.experience import Experience, JudgedBatch
from stages.rl.publish import Publisher
from stages.rl.roles import Judges, with_committed_scores
from stages.rl.source import Source
from stages.rl.totals import Clock, Totals, rollout_lines
from stages.rl.trajectories import Batch
from stages.rl.update import Learner
from stages.training import ranks
from stages.training.metrics import StepLog
from stages.training.trainable import Trainable


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What one iteration learns from."""

    batch: JudgedBatch
    experiences: Sequence[Experience]
    seen: Mapping[str, float]  # metrics of the batch


Prepare = Callable[[int, int, float, Clock], Prepared]
"""(step, position, kl_coef, clock) -> the batch of `position`; raises what must end the run."""


class Iterations:
    """A `Stepper`: one batch of rollouts, its updates and one weight sync per step."""

    def __init__(
        self,
        prepare: Prepare,
        learner: Learner,
        *,
        config: PPOConfig,
        source: Source,
        publisher: Publisher,
        chat: ChatTokenizer,
        rollouts_file: Path,
    ) -> None:
        self.trained: dict[str, Trainable] = {str(role): model for role, model in learner.trained.items()}
        self.health = learner.health
        self._prepare, self._learner, self._config = prepare, learner, config
        self._source, self._publisher, self._chat = source, publisher, chat
        self._rollouts_file = rollouts_file
        self._controller = kl_controller(config)
        self._totals = Totals()

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """See `Stepper`. The engines get the policy, so a broken transport fails in the first minute."""
        if state:
            self._controller = self._controller.restored(state["controller"])
            self._totals = Totals(**state["totals"])
        self._rollouts_log = StepLog(self._rollouts_file, resumed_step=step)
        if self._publisher.has_begun:  # training went back: to weights that get a version of their own
            published = self._publisher.publish(has_moved=self._learner.has_moved)
        else:
            published = self._publisher.begin(state["version"] if state else 0)
        self._totals.see_parity(published.parity.max_abs_diff)

    def step(self, step: int, position: int) -> None:
        """See `Stepper`."""
        self._position, self._clock, self._update = position, Clock(), {}
        self._prepared = self._prepare(step, position, self._controller.coef, self._clock)
        with self._clock.measure("training"):
            self._update = self._learner.update(step, self._prepared.experiences)

    def finish(self, step: int) -> None:
        """See `Stepper`."""
        batch, seen = self._prepared.batch, self._prepared.seen
        num_responses = len(batch.trajectories)
        with self._clock.measure("sync"):
            self._published = self._publisher.publish(has_moved=self._learner.has_moved)
        self._totals.see_parity(self._published.parity.max_abs_diff)
        if step > self._config.value_warmup_steps and "rollout/kl" in seen:
            # Until then the policy is the reference, and its KL says nothing about the coefficient.
            self._controller = self._controller.updated(kl=seen["rollout/kl"], num_sequences=num_responses)
        lines = rollout_lines(step, batch, self._chat, max_lines=self._config.num_logged_rollouts)
        self._rollouts_log.write(lines)
        sync_seconds = self._published.sync.seconds
        self._totals.add(self._clock, seen, responses=num_responses, sync_seconds=sync_seconds)
        self._totals.see_comparison(self._published.comparison_seconds)

    def metrics(self) -> Mapping[str, float]:
        """See `Stepper`."""
        learnt = {**self._prepared.seen, **self._update, **self.health.metrics()}
        return {**learnt, **self._clock.metrics(), **self._published.metrics()}

    def score(self) -> float:
        """See `Stepper`: of the last batch."""
        return self._prepared.seen["rollout/score"]

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper`."""
        return {
            "controller": self._controller.state_dict(),
            "totals": self._totals.state_dict(),
            "version": self._publisher.version,
        }

    def saved(self) -> None:
        """See `Stepper`: batches before the oldest checkpoint that is kept are forgotten."""
        config = self._config
        if ranks.is_main():
            kept = config.keep_checkpoints * config.checkpoint_every_steps
            self._source.drop_before(self._position - kept)

    def summary(self) -> dict[str, float]:
        """How the run went. Raises TrainingStopped when the policy never took a step."""
        self.health.check_end("policy loss")
        skipped = {"steps_skipped": float(self.health.state.skipped)}
        return self._totals.metrics(version=self._publisher.version) | skipped


def agreed_batch(
    source: Source, publisher: Publisher, judges: Judges, *, step: int, position: int, clock: Clock
) -> tuple[Batch, JudgedBatch]:
    """The batch at `position`, as it was drawn and as it was judged: engine and trainer agree about it. One
    of the journal that they do not agree about is drawn again. Raises ParityError.
    """

    def asked(*, anew: bool) -> tuple[Batch, JudgedBatch]:
        with clock.measure("generation"):
            drawn = source.next(position, publisher.version, anew=anew)
        with clock.measure("scoring"):
            return drawn, judges.judge(drawn.trajectories)

    drawn, batch = asked(anew=False)
    if drawn.is_replayed:
        if publisher.accepts_batch(step, batch):
            return drawn, with_committed_scores(batch)
        drawn, batch = asked(anew=True)
    publisher.check_batch(batch)
    return drawn, batch
