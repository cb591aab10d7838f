"""Engines as Ray actors: the only Ray of this package.

    start_actor_engines --> EnginePool (picklable) --> ActorEngine 0..M-1 --one Ray hop--> actor --> VLLMEngine | HFEngine

Owns: the actors, their environment and their end; which engine gets which request. Does not own: the engines inside, and
restarting one (a failed engine ends the run's use of the pool; an error names it). All calls are asynchronous, on any loop.
"""

import asyncio
import os
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle

from rollout.api import Rollout, RolloutEngine, RolloutRequest, WeightUpdate
from rollout.config import EngineConfig
from rollout.engines import open_engine
from rollout.errors import EngineError, EnvironmentProblem, ExpectedError
from rollout.loop import before_deadline

T = TypeVar("T")

MAX_CONCURRENT_CALLS = 10_000
"""Calls an actor may hold at once: far more than batches in flight, so that `abort` never queues behind `submit`."""
GRACE_S = 5.0
"""Added to a deadline that the engine keeps itself: its own error says more than "the actor did not answer"."""
CLOSE_TIMEOUT_S = 20.0


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, max_concurrency=MAX_CONCURRENT_CALLS)
class EngineActor:
    """One engine in a process of its own. Every method is the engine's method of that name."""

    _engine: RolloutEngine

    async def open(self, config: EngineConfig, model_dir: Path, dtype: str, max_model_len: int, log_path: Path,
                   name: str) -> None:
        self._engine = await open_engine(config, model_dir=model_dir, dtype=dtype, max_model_len=max_model_len,
                                         log_path=log_path, name=name)

    async def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        return await self._engine.submit(requests)

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._engine.abort(request_ids)

    async def pause(self) -> None:
        await self._engine.pause()

    async def update(self, update: WeightUpdate) -> None:
        await self._engine.update(update)

    async def resume(self) -> None:
        await self._engine.resume()

    async def diagnose(self, update: WeightUpdate) -> tuple[str, ...]:
        return await self._engine.diagnose(update)

    async def version(self) -> int:
        return await self._engine.version()

    async def close(self) -> None:
        await self._engine.close()


class ActorEngine:
    """A `RolloutEngine` whose engine lives in an actor. Picklable."""

    def __init__(self, actor: ActorHandle, *, config: EngineConfig, name: str) -> None:
        self.name = name
        self._actor = actor
        self._config = config
