"""Engines: how a stage opens the engines it generates with, and how its synchronous code calls them.

    with open_engines(config, model_dir=..., runtime=...) as client: client.generate(requests)
                                                                     client.engine, client.loop, client.host

Owns: where the engines run (actors on Ray, this process inline), the deadline of each call, and their end.
Does not own: what is sampled (rl/source and the recipes), the weights they get later (rl/publish).
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from rollout.api import Rollout, RolloutEngine, RolloutRequest
from rollout.config import EngineConfig
from rollout.engines import open_engine
from rollout.errors import EngineError
from rollout.loop import LoopThread
from rollout.transports import LOOPBACK
from stages.bundles import bundles_of
from stages.runtime import Runtime

Dtype = Literal["float32", "bfloat16"]
GRACE_S = 10.0
"""Added to a deadline that the engine keeps itself: its own error says more, and so comes first."""
ENGINE_DTYPE: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16"}


class EngineClient:
    """The engines, for synchronous code. Any process may hold one, and opens its own event loop."""

    def __init__(self, engine: RolloutEngine, config: EngineConfig, loop: LoopThread | None) -> None:
        self.engine = engine
        self.config = config
        self._loop = loop  # inline engines answer only on the loop they were opened on
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
        from rollout.pool import node_address

        return node_address()

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
    # vLLM does not start where less than its share of the GPU is free, and memory that this process's
    # allocator keeps for later counts as taken. (Nothing happens where CUDA was not used.)
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
    from rollout.pool import places_in

    assert runtime.group is not None, f"{runtime.stage}: engines are opened inside `placed(runtime, rollout)`"
    bundles = bundles_of(runtime.stage, runtime.resources, config)
    indices = [bundles.engine_index(engine) for engine in range(config.num_engines)]
    return places_in(runtime.group, indices)
