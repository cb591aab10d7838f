"""What a PPO trainer pulls from: prompts -> engines -> rollouts. Also how a stage opens engines at all.

    stage task:   with open_engines(...) as engines:  source = open_source(engines, ...)
    trainer:      source.next(step) -> RolloutBatch      client.engine for weight sync and parity

`RolloutSource` owns prompt order, seeds and the batch; a plain class: Ray wraps it in an actor, inline runs
it on a thread. Nothing depends on iterator state: what step `s` samples is a function of the seed and `s`.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from rollout.api import Rollout, RolloutEngine, RolloutRequest, Sampling
from rollout.config import EngineConfig
from rollout.engines import open_engine
from rollout.errors import EngineError
from rollout.ground.errors import raise_expected
from rollout.loop import LoopThread
from rollout.transports import LOOPBACK
from stages.bundles import bundles_of
from stages.data.batches import BatchOrder, stage_seed
from stages.runtime import Runtime

Dtype = Literal["float32", "bfloat16"]
GRACE_S = 10.0
"""Added to a deadline that the engine keeps itself: its own error says more, and so comes first."""
ENGINE_DTYPE: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """All rollouts of one PPO iteration, in prompt order; the samples of one prompt stand together."""

    step: int
    prompt_indices: tuple[int, ...]  # per rollout: which prompt of the dataset; groups are keyed by it
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """What is sampled, apart from the engines."""

    prompts: tuple[tuple[int, ...], ...]  # token ids, rendered up to where the assistant writes
    num_prompts: int  # per step
    samples_per_prompt: int
    temperature: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int  # of the run


class RolloutSource:
    """Batches of rollouts by step; each request's seed is H(run seed, index in the prompt order, sample)."""

    def __init__(self, engine: RolloutEngine, plan: SourcePlan) -> None:
        self._engine = engine
        self._plan = plan
        self._order = BatchOrder(
            num_rows=len(plan.prompts),
            batch_size=plan.num_prompts,
            seed=stage_seed(plan.seed, "ppo", "prompts"),
        )
        self._drawing: tuple[int, asyncio.Future[RolloutBatch]] | None = None

    async def next(self, step: int) -> RolloutBatch:
        """The rollouts of iteration `step` (0-based), sampled under the weights now in force. Every rank of a
        trainer asks; they are drawn once. Raises EngineError.
        """
        if self._drawing is None or self._drawing[0] != step:
            self._drawing = step, asyncio.ensure_future(self._draw(step))
        return await asyncio.shield(self._drawing[1])

    async def _draw(self, step: int) -> RolloutBatch:
        plan = self._plan
        drawn = [index for index in self._order.indices(step) for _ in range(plan.samples_per_prompt)]
        requests = [self._request(step, position, index) for position, index in enumerate(drawn)]
        rollouts = await self._engine.submit(requests)
        aborted = sum(rollout.finish_reason == "abort" for rollout in rollouts)
        if aborted:
            raise EngineError(f"step {step + 1}: {aborted} of {len(rollouts)} generations were given up")
        return RolloutBatch(step=step, prompt_indices=tuple(drawn), rollouts=tuple(rollouts))

    def _request(self, step: int, position: int, prompt_index: int) -> RolloutRequest:
        plan = self._plan
        place, sample = divmod(position, plan.samples_per_prompt)
        sampling = Sampling(
            temperature=plan.temperature,
            max_tokens=plan.max_tokens,
            stop_token_ids=plan.stop_token_ids,
            seed=stage_seed(plan.seed, "rollout", step * plan.num_prompts + place, sample),
        )
        return RolloutRequest(
            request_id=f"step{step}-{place}-{sample}",
            prompt_ids=plan.prompts[prompt_index],
            sampling=sampling,
        )


class Source(Protocol):
    """A trainer's handle on a RolloutSource, wherever that lives."""

    def next(self, step: int) -> RolloutBatch:
        """Blocks until the batch is there. EngineError beyond the deadline."""


class EngineClient:
    """The engines, for synchronous code: any process may hold one; it opens its own event loop when first
    used.
    """

    def __init__(self, engine: RolloutEngine, config: EngineConfig, loop: LoopThread | None) -> None:
        self.engine = engine
        self.config = config
        self._loop = loop  # inline engines answer on the loop they were opened on only
        self._is_inline = loop is not None

    @property
    def loop(self) -> LoopThread:
        """The loop on which the engine is called."""
        if self._loop is None:
            self._loop = LoopThread()
        return self._loop

    @property
    def host(self) -> str:
        """This machine's address as the engines see it."""
        if self._is_inline:
            return LOOPBACK
        import ray

        return ray.util.get_node_ip_address()

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """Rollouts in the order of `requests`. Raises EngineError."""
        return self.loop.run(
            self.engine.submit(requests), timeout_s=self.config.generate_timeout_s + GRACE_S, what="generate"
        )

    def close(self) -> None:
        """End the engines, and this process's loop. Raises EngineError."""
        try:
            self.loop.run(self.engine.close(), timeout_s=self.config.sync_timeout_s, what="engine close")
        finally:
            self.loop.close()

    def __getstate__(self) -> dict[str, Any]:
        """Without the loop: another process opens its own."""
        return {"engine": self.engine, "config": self.config, "_loop": None, "_is_inline": False}


@contextlib.contextmanager
def open_engines(
    config: EngineConfig,
    *,
    model_dir: Path,
    dtype: Dtype,
    max_model_len: int,
    runtime: Runtime,
) -> Iterator[EngineClient]:
    """Started engines that hold the weights of `model_dir`; closed on the way out. Raises EngineError."""
    # What this process's allocator keeps for later is what an engine beside it on the GPU lacks: vLLM does
    # not start where less than its share is free. (Nothing happens where CUDA was not used.)
    torch.cuda.empty_cache()
    log_dir = runtime.log_dir / f"{runtime.stage}-engines"
    log_dir.mkdir(parents=True, exist_ok=True)
    if runtime.executor == "ray":
        from rollout.pool import start_actor_engines

        pool = start_actor_engines(
            config,
            model_dir=model_dir,
            dtype=dtype,
            max_model_len=max_model_len,
            log_dir=log_dir,
            num_gpus_each=runtime.resources.num_gpus_per_engine,
            num_cpus_each=runtime.resources.num_cpus_per_engine,
            places=_places(config, runtime),
        )
        client = EngineClient(pool, config, None)
    else:
        loop = LoopThread()
        opening = open_engine(
            config,
            model_dir=model_dir,
            dtype=dtype,
            max_model_len=max_model_len,
            log_path=log_dir / "engine-0.log",
        )
        engine = loop.run(opening, timeout_s=config.start_timeout_s + GRACE_S, what="engine start")
        client = EngineClient(engine, config, loop)
    try:
        yield client
    except BaseException:
        with contextlib.suppress(EngineError):  # what went wrong before says more
            client.close()
        raise
    client.close()


def _places(config: EngineConfig, runtime: Runtime) -> list[Any]:
    """Ray's scheduling strategy for each engine: its bundle of the stage's group, or any node."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundles = bundles_of(runtime.stage, runtime.resources, config)
    indices = [bundles.engine_index(engine) for engine in range(config.num_engines)]
    assert runtime.group is not None, f"{runtime.stage}: engines are opened inside `placed(runtime, rollout)`"
    return [
        "SPREAD"
        if index is None
        else PlacementGroupSchedulingStrategy(runtime.group, placement_group_bundle_index=index)
        for index in indices
    ]


@contextlib.contextmanager
def open_source(client: EngineClient, plan: SourcePlan, *, runtime: Runtime) -> Iterator[Source]:
    """A RolloutSource over the engines: an actor of its own on Ray, on the engines' loop inline."""
    if runtime.executor == "inline":
        yield _LocalSource(RolloutSource(client.engine, plan), client)
        return
    import ray

    actor: Any = ray.remote(RolloutSource).options(num_cpus=0, max_restarts=0).remote(client.engine, plan)
    try:
        yield _ActorSource(actor, client.config.generate_timeout_s + 2 * GRACE_S)
    finally:
        ray.kill(actor)


class _LocalSource:
    def __init__(self, source: RolloutSource, client: EngineClient) -> None:
        self._source = source
        self._client = client

    def next(self, step: int) -> RolloutBatch:
        timeout_s = self._client.config.generate_timeout_s + GRACE_S
        return self._client.loop.run(
            self._source.next(step), timeout_s=timeout_s, what=f"rollouts of step {step + 1}"
        )


class _ActorSource:
    def __init__(self, actor: Any, timeout_s: float) -> None:
        self._actor = actor
        self._timeout_s = timeout_s

    def next(self, step: int) -> RolloutBatch:
        import ray

        try:
            return ray.get(self._actor.next.remote(step), timeout=self._timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise_expected(error)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            raise EngineError(
                f"rollouts of step {step + 1}: {type(error).__name__} after {self._timeout_s:g} s"
            ) from error
