"""Learning-rate schedules: a step in, the factor of the configured rate out.

    factor
      1 |    /-----___            step counts optimizer steps already taken, from 0
        |   /         ---___      warm-up: (step + 1) / (warmup_steps + 1), so step 0 already learns
        |  /                ---   decay:   1 at step == warmup_steps, final_frac from step == total_steps on
        +--------------------- step

Owns: pure functions of the step (so a resume is one integer). Does not own: the optimizer. Standard library
only.
"""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def constant(*, step: int, warmup_steps: int) -> float:
    """Linear warm-up, then 1. ValueError for a negative argument."""
    return _warmup(step, warmup_steps)


def linear(*, step: int, warmup_steps: int, total_steps: int, final_frac: float) -> float:
    """Linear warm-up, then straight down to `final_frac`. ValueError as in `cosine`."""
    progress = _progress(step, warmup_steps, total_steps, final_frac)
    return _warmup(step, warmup_steps) * (1 - (1 - final_frac) * progress)


def cosine(*, step: int, warmup_steps: int, total_steps: int, final_frac: float) -> float:
    """Linear warm-up, then half a cosine down to `final_frac` (Loshchilov & Hutter 2017, eq. 5, no restarts).

    ValueError for a negative step or warm-up, a warm-up longer than the run, or a fraction outside 0..1.
    """
    progress = _progress(step, warmup_steps, total_steps, final_frac)
    return _warmup(step, warmup_steps) * (
        final_frac + (1 - final_frac) * (1 + math.cos(math.pi * progress)) / 2
    )


def lr_factor(
    *, schedule: Schedule, step: int, warmup_steps: int, total_steps: int, final_frac: float
) -> float:
    """The factor under the schedule a config names; `constant` ignores the last two. ValueError: another."""
    if schedule == "constant":
        return constant(step=step, warmup_steps=warmup_steps)
    if schedule == "linear":
        return linear(step=step, warmup_steps=warmup_steps, total_steps=total_steps, final_frac=final_frac)
    if schedule == "cosine":
        return cosine(step=step, warmup_steps=warmup_steps, total_steps=total_steps, final_frac=final_frac)
    raise ValueError(f"no schedule {schedule!r}; there are constant, linear, cosine")


def _warmup(step: int, warmup_steps: int) -> float:
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"step and warmup_steps must be >= 0, got {step} and {warmup_steps}")
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _progress(step: int, warmup_steps: int, total_steps: int, final_frac: float) -> float:
    """0 until the warm-up ends, 1 from `total_steps` on."""
    if warmup_steps > total_steps:
        raise ValueError(f"a warm-up of {warmup_steps} steps does not fit a run of {total_steps}")
    if not 0 <= final_frac <= 1:
        raise ValueError(f"final_frac must be in 0..1, got {final_frac}")
    if step <= warmup_steps:
        return 0.0
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
