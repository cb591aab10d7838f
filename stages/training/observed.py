"""Further metrics of training: sums over the steps that were taken since the last line of the log.

    micro-batch --add--> sums of the step --close_step--> taken: over all ranks, into the window | dropped
    window --take--> metrics of a line; --state_dict | restore--> checkpoint

Owns: that window, so that a step that was skipped leaves no trace, and a run that went back or was resumed
writes the same lines. Does not own: what is summed and what it means (the classes that inherit).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stages.training import ranks


class Observed:
    """What a stage watches besides its loss. This one watches nothing.

    Every rank calls every method, at the same point.
    """

    def __init__(self) -> None:
        self._of_step: Tensor | None = None
        self._of_window: list[float] = []

    def add(self, values: Tensor) -> None:
        """Numbers of one micro-batch of this rank: float64 [n], the same n each time."""
        self._of_step = values if self._of_step is None else self._of_step + values

    def close_step(self, *, taken: bool) -> None:
        """The step has ended. One that was not taken leaves nothing."""
        values, self._of_step = self._of_step, None
        if not taken or values is None:
            return
        of_step = ranks.sum_over_ranks(values).tolist()
        of_window = self._of_window or [0.0] * len(of_step)
        self._of_window = [sum(pair) for pair in zip(of_window, of_step, strict=True)]

    def take(self) -> Mapping[str, float]:
        """The metrics of the window; a new one begins. {} when nothing was added to it."""
        sums, self._of_window = self._of_window, []
        return self.metrics(sums) if sums else {}

    def metrics(self, sums: list[float]) -> Mapping[str, float]:
        """What the sums of a window amount to."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The window, as JSON; the same on every rank."""
        return {"sums": self._of_window}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; what was added since is forgotten."""
        self._of_step = None
        self._of_window = list(state["sums"])
