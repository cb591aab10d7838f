"""The loop of every training stage: resume, step, go back, log, checkpoint, stop - once.

    newest checkpoint --restore--> step --finish--> metrics line --> checkpoint --> next step
                                     `-- RollBack: last regular checkpoint --restore--> step

Owns: the step counter, resuming, going back after bad steps, stopping at a step boundary, the rhythm of
metrics and checkpoints. Does not own: what a step is. A recipe gives a `Stepper` for that. Every rank runs
this loop.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from stages.config.training import TrainingConfig
from stages.errors import Interrupted
from stages.runtime import Runtime
from stages.training import ranks
from stages.training.checkpoint import Checkpoints
from stages.training.health import Health, RollBack
from stages.training.metrics import MetricsLog
from stages.training.trainable import Trainable


class Stepper(Protocol):
    """One training: what happens in a step, and what of it a checkpoint holds besides the models.

    Steps count from 0. `step(7, ...)` is the eighth; `finish(8)` follows it, with the number of steps done.
    """

    @property
    def trained(self) -> Mapping[str, Trainable]:
        """What is trained, by the names that a checkpoint gives them."""

    @property
    def health(self) -> Health:
        """Judges every optimizer step. Its state is part of each checkpoint; the loop restores it."""

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """The models are those of `step` now; go on from what `state_dict` gave there.

        Called before the first step, with {} where there is no checkpoint, and again after every return to
        one. What was written of later steps is cut.
        """

    def step(self, step: int, position: int) -> None:
        """Train on the batch of `position`: the step, and all batches that were left out before it.

        Raises RollBack after too many bad optimizer steps. What it has kept by then must do for `finish`:
        without a checkpoint to go back to, training goes on behind the bad data.
        """

    def finish(self, step: int) -> None:
        """What follows each step, also one that ended in bad steps: weights to engines, lines of a log."""

    def metrics(self) -> Mapping[str, float]:
        """A line of the log: what was seen since the last one."""

    def score(self) -> float | None:
        """What a checkpoint of now is kept for: higher is better. None: nothing to compare by."""

    def state_dict(self) -> dict[str, Any]:
        """What `restore` needs, as JSON; the same on every rank."""

    def saved(self) -> None:
        """A checkpoint is on the disk: older work may go."""


def run_loop(stepper: Stepper, config: TrainingConfig, *, max_steps: int, runtime: Runtime) -> None:
    """Train from the newest checkpoint, or from the start, to `max_steps`. This worker has read all that the
    batches and the models are made from.

    Raises DataError when a file of the settings or a given model changed before it was read, TrainingStopped
    when bad steps do not end, Interrupted when the run is to stop.
    """
    runtime.check_files(trusting_stamps=True)
    health = stepper.health
    parts = {name: model.state() for name, model in stepper.trained.items()}
    checkpoints = Checkpoints(runtime.work_dir, keep=config.keep_checkpoints)
    step, saved = checkpoints.restore(parts)
    if saved:
        health.restore(saved["health"])
    log = MetricsLog(runtime.work_dir, max_steps=max_steps, resumed_step=step)
    stepper.restore(step, saved["stepper"] if saved else {})
    while step < max_steps:
        try:
            stepper.step(step, step + health.state.data_offset)
        except RollBack:
            back, saved = checkpoints.roll_back(parts)
            next_step = health.rolled_back(step, back if saved else None, saved["health"] if saved else {})
            if saved:  # else on behind the bad data, as after any step that was skipped
                step = next_step
                log.cut(step)
                stepper.restore(step, saved["stepper"])
                continue
        step += 1
        stepper.finish(step)
        if step % config.log_every_steps == 0 or step == max_steps:
            log(step, stepper.metrics())
        if not health.is_good():
            continue  # a checkpoint is a place to go back to: none in the middle of bad steps
        stopping = ranks.any_rank(runtime.stop_requested())
        due = step % config.checkpoint_every_steps == 0
        if stopping or (due and step < max_steps):
            state = {"stepper": stepper.state_dict(), "health": health.state_dict()}
            checkpoints.save(step, parts, state, score=stepper.score(), regular=due)
            stepper.saved()
        if stopping:
            raise Interrupted(
                f"{runtime.stage}: stopped at step {step} of {max_steps}, state saved; run the same "
                "command to go on"
            )
