"""Engines as Ray actors: the only Ray of this package.

    start_actor_engines --> EnginePool --> ActorEngine 0..M-1 --one Ray hop--> actor --> VLLMEngine | HFEngine

Owns: the actors, their environment and their end; which engine gets which request. Does not own: the engines
inside, and restarting one (a failed engine ends the run's use of the pool; an error names it). All calls are
asynchronous, on any loop.
"""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from rollout.api import (
    Diagnosis,
    Rollout,
    RolloutEngine,
    RolloutRequest,
    WeightUpdate,
    joined_diagnosis,
)
from rollout.config import EngineConfig
from rollout.engine_log import MAX_CAUSE_CHARS, cause_since, size_of
from rollout.engines import open_engine
from rollout.errors import EngineError, WeightSyncError
from rollout.ground.errors import GO_ON, ExpectedError, raise_expected, root_cause
from rollout.loop import before_deadline, while_healthy

T = TypeVar("T")

MAX_CONCURRENT_CALLS = 10_000
"""Calls an actor may hold at once: far more than batches in flight, so that `abort` never queues behind
`submit`.
"""
GRACE_S = 5.0
"""Added to a deadline that the engine keeps itself: its own error says more than "the actor did not
answer".
"""
CLOSE_TIMEOUT_S = 15.0
"""An engine takes 3 s to find that its processes do not answer; then it kills them."""


class EngineActor:
    """One engine in a process of its own. Every method is the engine's method of that name."""

    _engine: RolloutEngine

    async def open(
        self, config: EngineConfig, model_dir: Path, dtype: str, max_model_len: int, log_path: Path, name: str
    ) -> None:
        self._engine = await open_engine(
            config,
            model_dir=model_dir,
            dtype=dtype,
            max_model_len=max_model_len,
            log_path=log_path,
            name=name,
        )

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

    async def diagnose(self, update: WeightUpdate) -> Diagnosis:
        return await self._engine.diagnose(update)

    async def version(self) -> int:
        return await self._engine.version()

    async def answers(self) -> None:
        """Nothing but the round trip to this process."""

    async def close(self) -> None:
        await self._engine.close()


class ActorEngine:
    """A `RolloutEngine` whose engine lives in an actor. Picklable."""

    def __init__(self, actor: ActorHandle, *, config: EngineConfig, name: str) -> None:
        self._actor = actor
        self._config = config
        self._name = name

    async def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """See `RolloutEngine.submit`. When the caller gives up, so does the engine."""
        try:
            answer: Awaitable[list[Rollout]] = self._answer(
                self._actor.submit.remote(requests),
                f"{len(requests)} rollouts",
                self._config.generate_timeout_s,
            )
            return await while_healthy(answer, probe=self.version, interval_s=self._config.health_interval_s)
        except BaseException:
            self._actor.abort.remote([request.request_id for request in requests])
            raise

    async def abort(self, request_ids: Sequence[str]) -> None:
        """See `RolloutEngine.abort`."""
        await self._control(self._actor.abort.remote(request_ids), "abort")

    async def pause(self) -> None:
        """See `RolloutEngine.pause`."""
        timeout_s = min(self._config.sync_timeout_s, self._config.health_timeout_s)
        await self._answer(self._actor.pause.remote(), "pause", timeout_s)

    async def update(self, update: WeightUpdate) -> None:
        """See `RolloutEngine.update`."""
        await self._control(self._actor.update.remote(update), "weight update")

    async def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        await self._control(self._actor.resume.remote(), "resume")

    async def diagnose(self, update: WeightUpdate) -> Diagnosis:
        """See `RolloutEngine.diagnose`."""
        return await self._answer(
            self._actor.diagnose.remote(update),
            "comparison of all tensors",
            self._config.comparison_timeout_s,
        )

    async def version(self) -> int:
        """See `RolloutEngine.version`: through the actor to the process that decodes."""
        return await self._answer(self._actor.version.remote(), "version", self._config.health_timeout_s)

    async def close(self) -> None:
        """See `RolloutEngine.close`. An engine that does not answer is killed."""
        try:
            with contextlib.suppress(EngineError):
                await self._answer(self._actor.answers.remote(), "close", 0)
                await self._answer(self._actor.close.remote(), "close", CLOSE_TIMEOUT_S)
        finally:
            ray.kill(self._actor)

    async def _control(self, answer: Awaitable[T], what: str) -> T:
        return await self._answer(answer, what, self._config.sync_timeout_s)

    async def _answer(self, answer: Awaitable[T], what: str, timeout_s: float) -> T:
        """The actor's answer, or an error that names the engine. A bug inside the actor stays Ray's error,
        with its traceback.
        """
        try:
            return await before_deadline(answer, timeout_s=timeout_s + GRACE_S, what=f"{self._name}: {what}")
        except RayTaskError as error:
            raise_expected(error)
        except RayError as error:
            raise EngineError(
                f"{self._name}: {what}: its process is gone ({type(error).__name__}); {GO_ON}"
            ) from error


class EnginePool:
    """A `RolloutEngine` over several: requests go where the fewest tokens are outstanding, control calls go
    to all.

    Picklable: a rollout source and a trainer may both hold it. Each copy balances what it submits itself.
    """

    def __init__(self, engines: Sequence[RolloutEngine]) -> None:
        assert engines
        self._engines = tuple(engines)
        self._outstanding = [0] * len(engines)  # response tokens at most, per engine

    async def submit(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """See `RolloutEngine.submit`. Which engine answers does not change a response: its seed is its
        own.
        """
        owners = [self._assign(request) for request in requests]
        shares = {
            index: [request for request, owner in zip(requests, owners, strict=True) if owner == index]
            for index in dict.fromkeys(owners)
        }
        tasks = [asyncio.ensure_future(self._engines[index].submit(share)) for index, share in shares.items()]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # when one engine has failed, the others' rollouts are not wanted any more
            for request, owner in zip(requests, owners, strict=True):
                self._outstanding[owner] -= request.sampling.max_tokens
        by_id = {rollout.request_id: rollout for answer in answers for rollout in answer}
        return [by_id[request.request_id] for request in requests]

    async def abort(self, request_ids: Sequence[str]) -> None:
        """See `RolloutEngine.abort`. To all: ids that an engine does not know are ignored."""
        await asyncio.gather(*(engine.abort(request_ids) for engine in self._engines))

    async def pause(self) -> None:
        """See `RolloutEngine.pause`."""
        await asyncio.gather(*(engine.pause() for engine in self._engines))

    async def update(self, update: WeightUpdate) -> None:
        """See `RolloutEngine.update`. All take the same bytes."""
        await asyncio.gather(
            *(
                engine.update(dataclasses.replace(update, receiver=index))
                for index, engine in enumerate(self._engines)
            )
        )

    async def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        await asyncio.gather(*(engine.resume() for engine in self._engines))

    async def diagnose(self, update: WeightUpdate) -> Diagnosis:
        """See `RolloutEngine.diagnose`: what any engine lacks. One that fails hides nothing of the others."""
        found = await asyncio.gather(
            *(engine.diagnose(update) for engine in self._engines), return_exceptions=True
        )
        return joined_diagnosis(_as_diagnosis(one) for one in found)

    async def version(self) -> int:
        """See `RolloutEngine.version`. WeightSyncError when the engines do not agree."""
        versions = await asyncio.gather(*(engine.version() for engine in self._engines))
        if len(set(versions)) > 1:
            raise WeightSyncError(f"the engines hold weight versions {versions}; rebuild them")
        return versions[0]

    async def close(self) -> None:
        """See `RolloutEngine.close`."""
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def _assign(self, request: RolloutRequest) -> int:
        index = self._outstanding.index(min(self._outstanding))
        self._outstanding[index] += request.sampling.max_tokens
        return index


def _as_diagnosis(found: Diagnosis | BaseException) -> Diagnosis:
    if isinstance(found, Diagnosis):
        return found
    if isinstance(found, Exception):
        return Diagnosis.failed(found)
    raise found


def places_in(group: Any, bundles: Sequence[int | None]) -> list[Any]:
    """Ray's scheduling strategy for each engine: its bundle of the placement group `group`, or any node where
    that is None.
    """
    return [
        "SPREAD"
        if index is None
        else PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        for index in bundles
    ]


def node_address() -> str:
    """This node's address as the rest of the Ray cluster sees it."""
    return str(ray.util.get_node_ip_address())


def start_actor_engines(
    config: EngineConfig,
    *,
    model_dir: Path,
    dtype: str,
    max_model_len: int,
    log_dir: Path,
    num_gpus_each: float = 0.0,
    num_cpus_each: float = 0.0,
    places: Sequence[Any] | None = None,
) -> EnginePool:
    """Start `config.num_engines` actors in the running Ray cluster; returns when all have answered.

    `places`: Ray's scheduling strategy for each; without, this node (weights arrive through its shared
    memory).

    `dtype`: "float32" or "bfloat16". Engine i logs to `log_dir`/engine-i.log. Close with `await
    pool.close()`. Raises EngineError when one does not start within `config.start_timeout_s`.
    """
    names = [f"engine-{index}" for index in range(config.num_engines)]
    logs = {log: size_of(log) for log in (log_dir / f"{name}.log" for name in names)}
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    where = [here] * config.num_engines if places is None else places
    actors = _actors(where, num_gpus_each=num_gpus_each, num_cpus_each=num_cpus_each)
    opening = [
        actor.open.remote(config, model_dir, dtype, max_model_len, log, name)
        for actor, log, name in zip(actors, logs, names, strict=True)
    ]
    try:
        ray.get(opening, timeout=config.start_timeout_s + GRACE_S)
    except RayError as error:
        for actor in actors:
            ray.kill(actor)
        raise _start_error(error, config, num_gpus_each, logs) from error
    return EnginePool(
        [ActorEngine(actor, config=config, name=name) for actor, name in zip(actors, names, strict=True)]
    )


def _actors(places: Sequence[Any], *, num_gpus_each: float, num_cpus_each: float) -> list[Any]:
    """An actor in each place, without an engine yet. (Ray's types know neither an actor's methods nor all of
    its options.)
    """
    return [
        ray.remote(EngineActor)
        .options(
            num_cpus=num_cpus_each,
            num_gpus=num_gpus_each,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=MAX_CONCURRENT_CALLS,
            scheduling_strategy=place,
            runtime_env={"env_vars": _environment(num_gpus_each)},
        )
        .remote()
        for place in places
    ]


def _environment(num_gpus: float) -> dict[str, str]:
    """Before torch is imported there. Ray would set one thread, and does not hide GPUs from an actor that has
    none.
    """
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "OMP_WAIT_POLICY": "passive"}
    return threads if num_gpus else threads | {"CUDA_VISIBLE_DEVICES": ""}


def _start_error(
    error: RayError, config: EngineConfig, num_gpus: float, logs: Mapping[Path, int]
) -> Exception:
    """`logs`: of the engines, with their bytes from before this start. They have the cause."""
    if isinstance(cause := root_cause(error), ExpectedError):
        return cause
    said = next(filter(None, (cause_since(log, start) for log, start in logs.items())), None)
    see = f"see {next(iter(logs)).parent}"
    if isinstance(error, GetTimeoutError):
        return EngineError(
            f"{config.num_engines} engines with {num_gpus:g} GPUs each did not start within "
            f"{config.start_timeout_s:g} s; {f'{said}; ' if said else ''}give them room, or raise "
            f"rollout.start_timeout_s; {see}"
        )
    in_short = " ".join(str(cause).split())[:MAX_CAUSE_CHARS]
    return EngineError(f"an engine did not start: {said or f'{type(cause).__name__}: {in_short}'}; {see}")
