"""Iterations: what every stage that learns from its own rollouts does around its steps. A `Stepper`.

    restore: engines get the policy --> step, the recipe's: draw, judge, credit, update
                                   ^      `--> finish: publish(version + 1), lines of the logs, totals
                                   `-----------'

Owns: what an iteration leaves behind: KL coefficient, totals, lines of the logs. Does not own: the step (the
recipe), the updates (update), the weight version (publish), the journal (source).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.config.ppo import PPOConfig
from stages.data.chat.tokenizer import ChatTokenizer
from stages.rl.algorithms import kl_controller
from stages.rl.experience import JudgedBatch
from stages.rl.publish import Publisher
from stages.rl.roles import Judges, with_committed_scores
from stages.rl.source import Source
from stages.rl.totals import Clock, Totals, rollout_lines
from stages.rl.trajectories import Batch
from stages.rl.update import Learner
from stages.training import ranks
from stages.training.metrics import StepLog
from stages.training.trainable import Trainable


class Iterations:
    """A `Stepper` whose steps are the recipe's: each is one batch of rollouts, its updates, one weight sync.

    Example: a step is `clock = iterations.begin(position); ...; iterations.see(batch, seen)`, then
             `iterations.learnt = learner.update(number, experiences)`, which may raise RollBack.
    """

    def __init__(
        self,
        step: Callable[[int, int], None],
        learner: Learner,
        *,
        config: PPOConfig,
        source: Source,
        publisher: Publisher,
        chat: ChatTokenizer,
        rollouts_file: Path,
    ) -> None:
        self.step = step
        self.trained: dict[str, Trainable] = {str(role): model for role, model in learner.trained.items()}
        self.health = learner.health
        self.learnt: Mapping[str, float] = {}  # metrics of the updates on this batch
        self._learner, self._config, self._source = learner, config, source
        self._publisher, self._chat = publisher, chat
        self._rollouts_file = rollouts_file
        self._controller = kl_controller(config)
        self._totals = Totals()

    @property
    def kl_coef(self) -> float:
        """beta in force."""
        return self._controller.coef

    def begin(self, position: int) -> Clock:
        """A step begins, on the batch at `position`; the clock of its phases."""
        self._position, self._clock, self.learnt = position, Clock(), {}
        return self._clock

    def see(self, batch: JudgedBatch, seen: Mapping[str, float]) -> None:
        """The batch of this step, and what was seen of it before its updates."""
        self._batch, self._seen = batch, seen

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
        batch, seen = self._batch, self._seen
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
        seen = {**self._seen, **self.learnt, **self.health.metrics()}
        return {**seen, **self._clock.metrics(), **self._published.metrics()}

    def score(self) -> float:
        """See `Stepper`: of the last batch."""
        return self._seen["rollout/score"]

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

    def asked(*, redraw: bool) -> tuple[Batch, JudgedBatch]:
        with clock.measure("generation"):
            drawn = source.next(position, publisher.version, redraw=redraw)
        publisher.check_drawn(step, drawn)
        with clock.measure("scoring"):
            return drawn, judges.judge(drawn.trajectories)

    drawn, batch = asked(redraw=False)
    if drawn.is_replayed:
        if publisher.accepts_batch(step, batch):
            return drawn, with_committed_scores(batch)
        drawn, batch = asked(redraw=True)
    publisher.check_batch(batch)
    return drawn, batch
