"""Iterations: what every stage that learns from its own rollouts does around its steps. A `Stepper`.

    restore: engines get the policy --> step, the recipe's: draw, judge, credit, update
                                   ^      `--> finish: publish(version + 1), lines of the logs, totals
                                   `-----------'

Owns: what an iteration leaves behind: KL coefficient, totals, lines of the logs. Does not own: the step (the
recipe), the updates (update), the weight version (publish), the journal (source).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stages.config.ppo import PPOConfig
from stages.data.chat.tokenizer import ChatTokenizer
from stages.rl.algorithms import kl_controller
from stages.rl.experience import JudgedBatch
from stages.rl.publish import Published, Publisher
from stages.rl.roles import Judges
from stages.rl.source import Source
from stages.rl.totals import Clock, Totals, rollout_lines
from stages.rl.trajectories import Batch
from stages.rl.update import Learner
from stages.training import ranks
from stages.training.metrics import StepLog
from stages.training.trainable import Trainable


@dataclass(slots=True, kw_only=True)
class Iteration:
    """One step as it goes. Whatever it holds when its updates end is logged, also if they end in RollBack."""

    number: int  # of the step, from 0
    position: int  # of its batch
    kl_coef: float  # beta in force
    clock: Clock = field(default_factory=Clock)
    batch: JudgedBatch | None = None
    seen: Mapping[str, float] = field(default_factory=dict)  # metrics of the batch before its updates
    learnt: Mapping[str, float] = field(default_factory=dict)  # metrics of the updates
    published: Published | None = None  # the weights behind them


class Iterations:
    """A `Stepper` whose steps are the recipe's: each is one batch of rollouts, its updates, one weight sync.

    Example: def step(iterations, number, position):
                 now = iterations.begin(number, position)
                 now.batch, now.seen = batch, metrics
                 now.learnt = learner.update(number, experiences)  # may raise RollBack
    """

    def __init__(
        self,
        step: "Callable[[Iterations, int, int], None]",
        learner: Learner,
        *,
        config: PPOConfig,
        source: Source,
        publisher: Publisher,
        chat: ChatTokenizer,
        rollouts_file: Path,
    ) -> None:
        self.step = partial(step, self)
        self.trained: dict[str, Trainable] = {str(role): model for role, model in learner.trained.items()}
        self.health = learner.health
        self._learner, self._config, self._source = learner, config, source
        self._publisher, self._chat = publisher, chat
        self._rollouts_file = rollouts_file
        self._rollouts_log: StepLog | None = None  # opened by `restore`, which cuts it
        self._controller = kl_controller(config)
        self._totals = Totals()
        self._iteration: Iteration | None = None

    def begin(self, number: int, position: int) -> Iteration:
        """Step `number` begins, on the batch at `position`. The step fills the record."""
        self._iteration = Iteration(number=number, position=position, kl_coef=self._controller.coef)
        return self._iteration

    @property
    def _now(self) -> Iteration:
        assert self._iteration is not None, "a step has begun"
        return self._iteration

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

    def finish(self, step: int) -> None:
        """See `Stepper`."""
        now = self._now
        assert now.batch is not None and self._rollouts_log is not None, "a step sees a batch"
        num_responses = len(now.batch.trajectories)
        with now.clock.measure("sync"):
            now.published = self._publisher.publish(has_moved=self._learner.has_moved)
        self._totals.see_parity(now.published.parity.max_abs_diff)
        if step > self._learner.policy_active_from and "rollout/kl" in now.seen:
            # Until then the policy is the reference, and its KL says nothing about the coefficient.
            self._controller = self._controller.updated(
                kl=now.seen["rollout/kl"], num_sequences=num_responses
            )
        lines = rollout_lines(step, now.batch, self._chat, max_lines=self._config.num_logged_rollouts)
        self._rollouts_log.write(lines)
        sync_seconds = now.published.sync.seconds
        self._totals.add(now.clock, now.seen, responses=num_responses, sync_seconds=sync_seconds)
        self._totals.see_comparison(now.published.comparison_seconds)

    def metrics(self) -> Mapping[str, float]:
        """See `Stepper`."""
        now = self._now
        assert now.published is not None, "a finished step has published its weights"
        seen = {**now.seen, **now.learnt, **self.health.metrics()}
        return {**seen, **now.clock.metrics(), **now.published.metrics()}

    def score(self) -> float:
        """See `Stepper`: of the last batch."""
        return self._now.seen["rollout/score"]

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
            self._source.drop_before(self._now.position - kept)

    def summary(self) -> dict[str, float]:
        """How the run went. Raises TrainingStopped when the policy never took a step."""
        self.health.check_end("policy loss")
        skipped = {"steps_skipped": float(self.health.state.skipped)}
        return self._totals.metrics(version=self._publisher.version) | skipped


def agreed_batch(
    source: Source, publisher: Publisher, judges: Judges, now: Iteration
) -> tuple[Batch, JudgedBatch]:
    """The batch of this step, as it was drawn and as it was judged: engine and trainer agree about it. If
    they do not agree about one of the journal, it is drawn again. Raises ParityError, WeightSyncError.
    """

    def asked(*, redraw: bool) -> tuple[Batch, JudgedBatch]:
        with now.clock.measure("generation"):
            drawn = source.next(now.position, publisher.version, redraw=redraw)
        publisher.check_drawn(now.number, drawn)
        with now.clock.measure("scoring"):
            return drawn, judges.judge(drawn.trajectories)

    drawn, batch = asked(redraw=False)
    if drawn.is_replayed:
        if publisher.accepts_batch(now.number, batch):
            return drawn, batch
        drawn, batch = asked(redraw=True)
    publisher.check_batch(batch)
    return drawn, batch
