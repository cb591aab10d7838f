"""The source of rollouts: what a weight version drew is replayed, anything else is drawn."""

import asyncio
import os
from pathlib import Path

import fakes
import pytest
import ray
from fakes import FakeEngine
from inline import runtime_in

from rollout.api import WeightUpdate
from rollout.config import EngineConfig
from rollout.errors import EngineError
from rollout.ground.errors import EnvironmentProblem
from rollout.loop import LoopThread
from stages.engines import EngineClient
from stages.rl.source import RolloutSource, SourcePlan, SourcePrompt, open_source
from stages.runtime import warnings_kept

PLAN = SourcePlan(
    prompts=tuple(SourcePrompt(ids=(5 + index,), row={"answer": str(index)}) for index in range(3)),
    num_prompts=4,
    samples_per_prompt=2,
    temperature=1.0,
    max_tokens=3,
    stop_token_ids=(),
    seed=4,
)
SCORES = {"model": [0.5, -1.25, 0.1 + 0.2, 3.0, 0.0, -0.0, 1e-30, 7.0], "rule": [None, 1.0] * 4}


class Drawing(RolloutSource):
    """Remembers the positions that it drew."""

    def __init__(self, work_dir: Path, engine: FakeEngine | None = None) -> None:
        super().__init__(FakeEngine() if engine is None else engine, PLAN, work_dir)
        self.drawn: list[int] = []

    async def _draw(self, position):
        self.drawn.append(position)
        return await super()._draw(position)


async def engine_of(version: int) -> FakeEngine:
    engine = FakeEngine()
    await engine.pause()
    await engine.update(WeightUpdate(version=version, location="", tensors=()))
    await engine.resume()
    return engine


def test_samples_are_grouped_by_place_and_carry_the_rows_of_their_prompts(tmp_path):
    """Four prompts a batch of a dataset of three: one prompt stands at two places."""
    batch = asyncio.run(Drawing(tmp_path).next(0, 0))
    assert [(one.place, one.sample) for one in batch.trajectories] == [
        (place, sample) for place in range(4) for sample in range(2)
    ]
    for one in batch.trajectories:
        assert one.row == {"answer": str(one.prompt_index)} and one.scores == {}
        assert one.turn.prompt_ids == (5 + one.prompt_index,)
    assert len({one.prompt_index for one in batch.trajectories}) == 3
    assert len({one.turn.response_ids for one in batch.trajectories}) == 8, "each sample has its own seed"


def test_ranks_that_ask_for_the_same_batch_get_one_that_was_drawn_once(tmp_path):
    async def asked():
        source = Drawing(tmp_path)
        return source, await asyncio.gather(source.next(2, 0), source.next(2, 0))

    source, (left, right) = asyncio.run(asked())
    assert left == right and source.drawn == [2]


def test_a_committed_batch_is_replayed_to_the_bit_by_another_process_and_nothing_is_drawn(tmp_path):
    async def committed():
        source = Drawing(tmp_path)
        batch = await source.next(7, 0)
        await source.commit(7, SCORES)
        return batch

    first = asyncio.run(committed())
    later = Drawing(tmp_path)
    again = asyncio.run(later.next(7, 0))
    assert later.drawn == [] and (first.is_replayed, again.is_replayed) == (False, True)
    for drawn, replayed, *scores in zip(
        first.trajectories, again.trajectories, *SCORES.values(), strict=True
    ):
        assert repr(replayed.scores) == repr(dict(zip(SCORES, scores, strict=True)))
        assert (replayed.turns, replayed.row, replayed.seed) == (drawn.turns, drawn.row, drawn.seed)
        assert (replayed.prompt_index, replayed.place) == (drawn.prompt_index, drawn.place)


def test_what_another_weight_version_drew_is_drawn_again(tmp_path):
    """As after training went back: position and step may be the same, the weights are not."""

    async def committed_then(version):
        source = Drawing(tmp_path)
        await source.next(0, 0)
        await source.commit(0, SCORES)
        later = Drawing(tmp_path, await engine_of(version))
        return later, await later.next(0, version)

    later, batch = asyncio.run(committed_then(3))
    assert later.drawn == [0] and not batch.is_replayed
    assert {version for one in batch.trajectories for version in one.weight_versions} == {3}


def test_a_batch_that_the_gate_refused_is_drawn_again_and_replaces_the_committed_one(tmp_path):
    async def refused():
        source = Drawing(tmp_path)
        await source.next(0, 0)
        await source.commit(0, SCORES)
        again = Drawing(tmp_path)
        assert (await again.next(0, 0)).is_replayed
        assert not (await again.next(0, 0, redraw=True)).is_replayed
        others = {**SCORES, "model": [1.0] * 8}
        await again.commit(0, others)
        return again, await Drawing(tmp_path).next(0, 0)

    source, batch = asyncio.run(refused())
    assert source.drawn == [0] and batch.is_replayed
    assert {one.scores["model"] for one in batch.trajectories} == {1.0}


def test_before_the_first_batch_nothing_is_touched_in_the_work_directory(tmp_path):
    """The trainer may still be waiting for the lock that another process holds."""
    source = Drawing(tmp_path)
    assert list(tmp_path.iterdir()) == []
    asyncio.run(source.next(0, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


@pytest.fixture(params=["inline", pytest.param("ray", marks=pytest.mark.ray)])
def opened(request, tmp_path):
    """open(engine): a source over it, inline or in an actor, and the runtime of its stage."""
    on_ray = request.param == "ray"
    if on_ray:
        request.getfixturevalue("ray_cluster")
        ray.cloudpickle.register_pickle_by_value(fakes)  # the source's process does not find it
    loop = None if on_ray else LoopThread()

    def opened(engine):
        client = EngineClient(engine, EngineConfig(generate_timeout_s=20), loop)
        runtime = runtime_in(tmp_path, "ppo", num_workers=int(on_ray))
        return open_source(client, PLAN, runtime=runtime), runtime

    yield opened
    if on_ray:
        ray.cloudpickle.unregister_pickle_by_value(fakes)
    if loop is not None:
        loop.close()


def test_a_handle_draws_commits_replays_and_forgets(opened):
    handle, runtime = opened(FakeEngine())
    with handle as source:
        for position in (0, 1):
            assert not source.next(position, 0).is_replayed
            source.commit(position, SCORES)
        source.drop_before(1)
    names = [path.name for path in (runtime.work_dir / "journal").iterdir()]
    assert names == ["step-000001.rollouts"]
    with opened(FakeEngine())[0] as source:
        assert source.next(1, 0).is_replayed


def test_a_damaged_entry_is_told_where_the_driver_reads_it(opened):
    handle, runtime = opened(FakeEngine())
    (runtime.work_dir / "journal").mkdir()
    path = runtime.work_dir / "journal" / "step-000000.rollouts"
    path.write_bytes(b"rlhf-rollouts 2 " + b"0" * 64 + b"\n")
    with handle as source, warnings_kept(runtime):
        assert not source.next(0, 0).is_replayed
    said = (runtime.log_dir / "ppo.warnings.log").read_text()
    assert said == f"{path}: not the bytes that were written; the step is sampled again\n"


def pid_of(source) -> int:
    """The process in which a handle's source lives."""
    on_ray = hasattr(source, "_actor")
    return ray.get(source._actor.__ray_call__.remote(lambda _: os.getpid())) if on_ray else os.getpid()


def test_a_disk_that_never_answers_is_one_line_about_the_disk_and_not_the_engines(opened, monkeypatch):
    """A pipe that nobody reads stands for it: a write to it hangs, as on a file server that is lost."""
    monkeypatch.setattr("stages.rl.source.JOURNAL_TIMEOUT_S", 0.5)
    handle, runtime = opened(FakeEngine())
    with handle as source:
        source.next(0, 0)
        path = runtime.work_dir / "journal" / f"step-000000.rollouts.{pid_of(source)}.tmp"
        os.mkfifo(path)
        said = (
            "journal of batch 1: not on the disk within 0.5 s; look at the disk of outputs, then run the same"
        )
        try:
            with pytest.raises(EnvironmentProblem, match=said) as caught:
                source.commit(0, SCORES)
        finally:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # lets go of the writer
    assert not isinstance(caught.value, EngineError)


def test_a_source_on_a_node_without_outputs_says_so_and_makes_no_directory_there(opened):
    handle, runtime = opened(FakeEngine())
    runtime.work_dir.rmdir()
    said = f"{runtime.work_dir}: not on .*; outputs must be one file system for all nodes$"
    with handle as source, pytest.raises(EnvironmentProblem, match=said):
        source.next(0, 0)
    assert not runtime.work_dir.exists()


def test_an_engine_that_fails_is_an_error_of_the_handle(opened):
    engine = FakeEngine(max_model_len=1)
    with opened(engine)[0] as source, pytest.raises(EngineError, match="its prompt fills the context"):
        source.next(0, 0)
