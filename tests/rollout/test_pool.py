"""The pool's own work on fakes; what only real actors can show - frozen and dead processes - on a real
engine.
"""

import asyncio
import signal
import time
from pathlib import Path

import psutil
import pytest
from fakes import FakeEngine
from rigs import CONFIG, MAX_MODEL_LEN, request

from rollout.errors import EngineError, WeightSyncError
from rollout.pool import EnginePool, start_actor_engines
from rollout.shared_memory import files_of


class Counting(FakeEngine):
    """Remembers the ids it was given; breaks when told to."""

    def __init__(self, *, breaks: bool = False, **settings) -> None:
        super().__init__(**settings)
        self.seen: list[str] = []
        self.breaks = breaks

    async def submit(self, requests):
        self.seen += [one.request_id for one in requests]
        if self.breaks:
            raise EngineError("engine-1: broken")
        return await super().submit(requests)


def test_a_pool_answers_as_one_engine_would():
    requests = [request(index, max_tokens=1 + index % 5) for index in range(20)]

    async def scenario():
        engines = [Counting() for _ in range(3)]
        return await Counting().submit(requests), await EnginePool(engines).submit(requests), engines

    alone, pooled, engines = asyncio.run(scenario())
    assert pooled == alone
    assert all(engine.seen for engine in engines)


def test_requests_go_where_the_fewest_tokens_are_outstanding():
    async def scenario():
        engines = [Counting(), Counting()]
        pool = EnginePool(engines)
        await pool.submit(
            [request(0, max_tokens=30), *(request(index, max_tokens=10) for index in range(1, 4))]
        )
        await pool.submit([request(9, max_tokens=1)])  # all done: the first engine again
        return engines

    long, short = asyncio.run(scenario())
    assert long.seen == ["r-0", "r-9"]
    assert short.seen == ["r-1", "r-2", "r-3"]


def test_one_broken_engine_fails_the_call_by_name_and_stops_the_others():
    async def scenario():
        slow = Counting(token_seconds=0.05)
        with pytest.raises(EngineError, match="engine-1: broken"):
            await EnginePool([slow, Counting(breaks=True)]).submit(
                [request(index, max_tokens=99) for index in range(2)]
            )
        await asyncio.sleep(0.01)
        return slow._in_flight

    assert asyncio.run(scenario()) == set()


def test_control_calls_go_to_all_and_versions_must_agree():
    from rollout.api import WeightUpdate

    async def scenario():
        engines = [FakeEngine(), FakeEngine()]
        pool = EnginePool(engines)
        await pool.pause()
        await pool.update(WeightUpdate(version=4, location="", tensors=()))
        await pool.resume()
        assert await pool.version() == 4
        engines[1]._version = 3
        with pytest.raises(WeightSyncError, match=r"\[4, 3\]"):
            await pool.version()

    asyncio.run(scenario())


def engine_processes(log_dir: Path) -> list[psutil.Process]:
    """The processes of the engine that logs there, scheduler first."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RLHF_ENGINE_LOG") == str(log_dir / "engine-0.log"):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


@pytest.fixture
def frozen_engine(start_ray, loop, tied_model_dir, tmp_path):
    """A pool of one engine whose process that decodes was stopped, and the engine's processes."""
    start_ray()
    config = CONFIG.model_copy(update={"health_timeout_s": 2.0, "health_interval_s": 0.5})
    pool = start_actor_engines(
        config, model_dir=tied_model_dir, dtype="float32", max_model_len=MAX_MODEL_LEN, log_dir=tmp_path
    )
    assert loop.run(pool.version(), timeout_s=10, what="version") == 0
    processes = engine_processes(tmp_path)
    worker = next(process for process in processes if "Worker" in process.name() or process is processes[-1])
    worker.send_signal(signal.SIGSTOP)
    return pool, processes


@pytest.mark.ray
def test_a_frozen_engine_counts_as_dead_and_close_leaves_nothing_behind(frozen_engine, loop):
    pool, processes = frozen_engine
    shared = files_of(process.pid for process in processes)
    assert shared
    started = time.monotonic()
    with pytest.raises(EngineError, match="engine-0: version: no answer within 2 s"):
        loop.run(pool.submit([request(max_tokens=500)]), timeout_s=50, what="submit")
    with pytest.raises(EngineError, match="engine-0: pause: no answer within 2 s"):
        loop.run(pool.pause(), timeout_s=50, what="pause")
    assert time.monotonic() - started < CONFIG.sync_timeout_s
    loop.run(pool.close(), timeout_s=60, what="close")
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    assert not [path for path in shared if path.exists()]


@pytest.mark.ray
def test_a_dead_actor_is_an_error_that_names_the_engine(start_ray, loop, tied_model_dir, tmp_path):
    import ray

    start_ray()
    config = CONFIG.model_copy(update={"engine": "hf"})
    pool = start_actor_engines(
        config, model_dir=tied_model_dir, dtype="float32", max_model_len=64, log_dir=tmp_path
    )
    ray.kill(pool._engines[0]._actor)
    deadline = time.monotonic() + 30  # the kill is only on its way: calls before it still get an answer
    with pytest.raises(EngineError, match="engine-0: version: its process is gone"):
        while time.monotonic() < deadline:
            loop.run(pool.version(), timeout_s=30, what="version")
    loop.run(pool.close(), timeout_s=30, what="close")
    loop.run(pool.close(), timeout_s=30, what="close")


@pytest.mark.ray
def test_two_actors_hold_the_same_version_after_a_sync_and_answer_as_one_does(
    start_ray, loop, tied_model_dir, tmp_path
):
    import pickle

    from transformers import AutoModelForCausalLM

    from rollout.weight_source import ModuleSource
    from rollout.weight_sync import WeightSync

    start_ray()
    config = CONFIG.model_copy(update={"engine": "hf", "num_engines": 2})
    pool = start_actor_engines(
        config, model_dir=tied_model_dir, dtype="float32", max_model_len=64, log_dir=tmp_path
    )
    sync = WeightSync(
        ModuleSource(AutoModelForCausalLM.from_pretrained(tied_model_dir), dtype="float32"),
        engine=pool,
        loop=loop,
        config=config,
    )
    sync.sync(3)
    requests = [request(index, max_tokens=4 + index) for index in range(6)]
    rollouts = loop.run(pickle.loads(pickle.dumps(pool)).submit(requests), timeout_s=60, what="submit")
    alone = loop.run(pool._engines[1].submit(requests), timeout_s=60, what="submit")
    assert [one.response_ids for one in rollouts] == [one.response_ids for one in alone]
    assert len({one.response_ids[:4] for one in rollouts}) > 1
    assert {version for rollout in rollouts for version in rollout.weight_versions} == {3}
    sync.close()
    loop.run(pool.close(), timeout_s=60, what="close")


@pytest.mark.ray
def test_a_model_directory_that_cannot_be_loaded_is_a_clear_error(start_ray, tmp_path):
    start_ray()
    with pytest.raises(Exception, match="save_pretrained") as error:
        start_actor_engines(CONFIG, model_dir=tmp_path, dtype="float32", max_model_len=64, log_dir=tmp_path)
    assert error.value.exit_code == 4
