"""Real engines with something wrong between them and the trainer: what a parity gate is there for."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rollout.api import Diagnosis, Rollout, RolloutEngine, RolloutRequest, WeightUpdate


class PassingOn:
    """A `RolloutEngine` that hands every call on to `engine`."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    async def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        return await self.engine.submit(requests)

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self.engine.abort(request_ids)

    async def pause(self) -> None:
        await self.engine.pause()

    async def update(self, update: WeightUpdate) -> None:
        await self.engine.update(update)

    async def resume(self) -> None:
        await self.engine.resume()

    async def diagnose(self, update: WeightUpdate) -> Diagnosis:
        return await self.engine.diagnose(update)

    async def version(self) -> int:
        return await self.engine.version()

    async def close(self) -> None:
        await self.engine.close()


class LaggingEngine(PassingOn):
    """Holds the weights of `lag` updates before the one it was sent last, from its `keeps_up`-th update on,
    and says nothing of it. Before there were so many: what it started with.
    """

    def __init__(self, engine: RolloutEngine, *, lag: int, directory: Path, keeps_up: int = 0) -> None:
        """`directory`: where past updates are kept."""
        super().__init__(engine)
        self._lag = lag
        self._directory = directory
        self._keeps_up = keeps_up
        self._sent: list[WeightUpdate] = []
        self._claimed = 0

    async def update(self, update: WeightUpdate) -> None:
        path = self._directory / f"update-{len(self._sent)}.bin"
        shutil.copyfile(update.location, path)
        self._sent.append(replace(update, location=str(path)))
        self._claimed = update.version
        place = len(self._sent) - 1
        if place >= self._keeps_up:
            place -= self._lag
        if place >= 0:
            await self.engine.update(self._sent[place])

    async def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        rollouts = await self.engine.submit(requests)
        return [
            replace(rollout, weight_versions=(self._claimed,) * len(rollout.response_ids))
            for rollout in rollouts
        ]

    async def version(self) -> int:
        return self._claimed


class SkewedEngine(PassingOn):
    """Says of the first `num_tokens` tokens of every training rollout a log-prob that is `error` nats off; of
    a probe the truth.
    """

    def __init__(self, engine: RolloutEngine, *, error: float, num_tokens: int) -> None:
        super().__init__(engine)
        self._error = error
        self._num_tokens = num_tokens

    async def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        return [self._skewed(rollout) for rollout in await self.engine.submit(requests)]

    def _skewed(self, rollout: Rollout) -> Rollout:
        if not rollout.request_id.startswith("step"):
            return rollout
        said = rollout.logprobs
        wrong = [logprob + self._error for logprob in said[: self._num_tokens]]
        return replace(rollout, logprobs=(*wrong, *said[self._num_tokens :]))
