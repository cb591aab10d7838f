"""What a trainer pulls from: prompts -> engines -> batches of trajectories, and the journal of them.

    trainer --next(position, version)--> journal holds what that version drew? replay it : engines draw
            --commit(position, scores)--> on the disk, before the update that learns from it
            --drop_before(position)--> forgotten, once a checkpoint holds what it taught

`RolloutSource` owns prompt order, seeds, the batch and the journal. It is a plain class: Ray wraps it in an
actor, inline runs it on the engines' loop. Nothing depends on iterator state: what is drawn at a position is
a function of the seed and that position. Every rank asks for each batch, which is drawn once; rank 0 alone
commits and drops. Does not own: the engines (stages.engines), scores, weights.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, Self

from rollout.api import RolloutEngine, RolloutRequest, Sampling
from rollout.errors import EngineError
from rollout.ground.errors import GO_ON, EnvironmentProblem, raise_expected
from stages.config.ppo import PPOSettings
from stages.data.batches import BatchOrder, stage_seed
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.fitting import check_left, data_metrics, fit_prompts, fit_rows
from stages.data.reading.readers import read_prompts
from stages.engines import GRACE_S, EngineClient
from stages.rl.journal import Journal, JournalEntry
from stages.rl.trajectories import Batch, Trajectory, turn_of, versions_of
from stages.runtime import Runtime, warnings_kept

JOURNAL_TIMEOUT_S = 900.0
"""Deadline of the journal: a loaded file server takes minutes for a batch, a lost one takes for ever."""
Scores = Mapping[str, Sequence[float | None]]
"""Source of scores -> one for each trajectory of a batch, in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePrompt:
    """One prompt of the dataset."""

    ids: tuple[int, ...]  # rendered up to where the assistant writes
    row: Mapping[str, Any]  # the further columns of the user's row


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """What is sampled, apart from the engines."""

    prompts: tuple[SourcePrompt, ...]
    num_prompts: int  # per batch
    samples_per_prompt: int
    temperature: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int  # of the run

    @classmethod
    def of(
        cls, settings: PPOSettings, prompts: Sequence[SourcePrompt], *, stop_token_ids: Sequence[int]
    ) -> Self:
        """As the settings say."""
        config = settings.ppo
        return cls(
            prompts=tuple(prompts),
            num_prompts=config.num_prompts,
            samples_per_prompt=config.samples_per_prompt,
            temperature=config.temperature,
            max_tokens=config.max_response_tokens,
            stop_token_ids=tuple(stop_token_ids),
            seed=settings.seed,
        )


def prompts_of(
    settings: PPOSettings, chat: ChatTokenizer
) -> tuple[tuple[SourcePrompt, ...], dict[str, float]]:
    """The prompts in file order, and what became of the rows, as metrics. Raises DataError."""
    config = settings.ppo
    rows = read_prompts(config.data, seed=stage_seed(settings.seed, "ppo", "rows"))
    longest = settings.model.max_prompt_tokens(config.max_response_tokens)
    fitted = fit_rows(rows, partial(fit_prompts, chat, max_prompt_tokens=longest))
    check_left(rows.sizes, fitted)
    kept = tuple(
        SourcePrompt(ids=one.example, row=prompt.row)
        for prompt, one in zip(rows.records, fitted, strict=True)
        if one.example is not None
    )
    return kept, {"prompts": float(len(kept)), **data_metrics(rows, fitted, "prompts")}


class RolloutSource:
    """Draws batches by position. The seed of a request is H(run seed, index in the prompt order, sample)."""

    def __init__(self, engine: RolloutEngine, plan: SourcePlan, work_dir: Path) -> None:
        self._engine = engine
        self._plan = plan
        self._work_dir = work_dir
        self._order = BatchOrder(
            num_rows=len(plan.prompts),
            batch_size=plan.num_prompts,
            seed=stage_seed(plan.seed, "ppo", "prompts"),
        )
        self._asked: tuple[int, int, bool] | None = None
        self._batch: asyncio.Future[Batch]

    async def next(self, position: int, version: int, *, redraw: bool = False) -> Batch:
        """The batch at `position` (0-based): what `version` drew there before, if the journal has it; else
        the engines draw, with the weights that they hold. `redraw`: they draw in any case.

        Raises EngineError, EnvironmentProblem when the disk refuses.
        """
        asked = (position, version, redraw)
        if self._asked != asked:
            self._asked, self._batch = asked, asyncio.ensure_future(self._found_or_drawn(*asked))
        return await asyncio.shield(self._batch)

    async def commit(self, position: int, scores: Scores) -> None:
        """Keep the batch at `position`, the last one that was asked for, with its scores: on the disk when
        this returns. Raises EnvironmentProblem.
        """
        batch = self._batch.result()
        assert batch.position == position, f"asked for {batch.position}, committing {position}"
        assert all(len(column) == len(batch.trajectories) for column in scores.values())
        scored = tuple(
            replace(trajectory, scores={source: column[index] for source, column in scores.items()})
            for index, trajectory in enumerate(batch.trajectories)
        )
        self._journal.write(JournalEntry(position=position, trajectories=scored))

    async def drop_before(self, position: int) -> None:
        """Forget what was committed at earlier positions. Raises EnvironmentProblem."""
        self._journal.drop_before(position)

    @cached_property
    def _journal(self) -> Journal:
        """Opened at its first use, because by then the trainer holds the lock of its work directory."""
        return Journal(self._work_dir)

    async def _found_or_drawn(self, position: int, version: int, redraw: bool) -> Batch:
        if not redraw and (replayed := self._replayed(position, version)) is not None:
            return replayed
        trajectories = await self._draw(position)
        return Batch(position=position, trajectories=trajectories, is_replayed=False)

    def _replayed(self, position: int, version: int) -> Batch | None:
        """The committed batch, unless other weights drew it."""
        entry = self._journal.read(position)
        if entry is None or versions_of(entry.trajectories) != {version}:
            return None
        prompts = self._plan.prompts
        trajectories = tuple(
            replace(trajectory, row=prompts[trajectory.prompt_index].row) for trajectory in entry.trajectories
        )
        return Batch(position=position, trajectories=trajectories, is_replayed=True)

    async def _draw(self, position: int) -> tuple[Trajectory, ...]:
        plan = self._plan
        drawn = [index for index in self._order.indices(position) for _ in range(plan.samples_per_prompt)]
        requests = [self._request(position, number, index) for number, index in enumerate(drawn)]
        rollouts = await self._engine.submit(requests)
        aborted = sum(rollout.finish_reason == "abort" for rollout in rollouts)
        if aborted:
            raise EngineError(f"batch {position + 1}: {aborted} of {len(rollouts)} generations were given up")
        return tuple(
            Trajectory(
                id=rollout.request_id,
                prompt_index=index,
                place=number // plan.samples_per_prompt,
                sample=number % plan.samples_per_prompt,
                seed=rollout.seed,
                turns=(turn_of(rollout),),
                row=plan.prompts[index].row,
                scores={},
            )
            for number, (index, rollout) in enumerate(zip(drawn, rollouts, strict=True))
        )

    def _request(self, position: int, number: int, prompt_index: int) -> RolloutRequest:
        plan = self._plan
        place, sample = divmod(number, plan.samples_per_prompt)
        sampling = Sampling(
            temperature=plan.temperature,
            max_tokens=plan.max_tokens,
            stop_token_ids=plan.stop_token_ids,
            seed=stage_seed(plan.seed, "rollout", position * plan.num_prompts + place, sample),
        )
        return RolloutRequest(
            request_id=f"step{position}-{place}-{sample}",
            prompt_ids=plan.prompts[prompt_index].ids,
            sampling=sampling,
        )


class Source(Protocol):
    """A trainer's handle on a RolloutSource, wherever that lives. Every call blocks until it is done, and
    raises EngineError, or EnvironmentProblem of the disk, beyond its deadline.
    """

    def next(self, position: int, version: int, *, redraw: bool = False) -> Batch:
        """See `RolloutSource.next`."""

    def commit(self, position: int, scores: Scores) -> None:
        """See `RolloutSource.commit`."""

    def drop_before(self, position: int) -> None:
        """See `RolloutSource.drop_before`."""


@contextlib.contextmanager
def open_source(client: EngineClient, plan: SourcePlan, *, runtime: Runtime) -> Iterator[Source]:
    """A RolloutSource over the engines: an actor of its own on Ray, on the engines' loop inline."""
    draw_timeout_s = client.config.generate_timeout_s
    if runtime.executor == "inline":
        yield _LocalSource(RolloutSource(client.engine, plan, runtime.work_dir), client, draw_timeout_s)
        return
    import ray

    actor: Any = ray.remote(_SourceActor).options(num_cpus=0, max_restarts=0)
    actor = actor.remote(client.engine, plan, runtime)
    try:
        yield _ActorSource(actor, draw_timeout_s)
    finally:
        ray.kill(actor)


class _SourceActor(RolloutSource):
    """In a process of its own: what it warns of is written where the driver follows it."""

    def __init__(self, engine: RolloutEngine, plan: SourcePlan, runtime: Runtime) -> None:
        super().__init__(engine, plan, runtime.work_dir)
        self._warnings = contextlib.ExitStack()  # open until the process ends
        self._warnings.enter_context(warnings_kept(runtime))


class _LocalSource:
    def __init__(self, source: RolloutSource, client: EngineClient, draw_timeout_s: float) -> None:
        self._source = source
        self._client = client
        self._draw_timeout_s = draw_timeout_s

    def next(self, position: int, version: int, *, redraw: bool = False) -> Batch:
        return self._client.loop.run(
            self._source.next(position, version, redraw=redraw),
            timeout_s=self._draw_timeout_s + GRACE_S,
            what=f"rollouts of batch {position + 1}",
        )

    def commit(self, position: int, scores: Scores) -> None:
        self._on_disk(self._source.commit(position, scores), f"journal of batch {position + 1}")

    def drop_before(self, position: int) -> None:
        self._on_disk(self._source.drop_before(position), "journal")

    def _on_disk(self, writing: Coroutine[Any, Any, None], what: str) -> None:
        try:
            self._client.loop.run(writing, timeout_s=JOURNAL_TIMEOUT_S, what=what)
        except EngineError as error:  # no engine takes part: it is the deadline's
            raise _slow_disk(what) from error


class _ActorSource:
    def __init__(self, actor: Any, draw_timeout_s: float) -> None:
        self._actor = actor
        self._draw_timeout_s = draw_timeout_s

    def next(self, position: int, version: int, *, redraw: bool = False) -> Batch:
        import ray

        what, timeout_s = f"rollouts of batch {position + 1}", self._draw_timeout_s + 2 * GRACE_S
        try:
            answer = self._actor.next.remote(position, version, redraw=redraw)
            batch: Batch = self._answer(answer, what, timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise EngineError(f"{what}: no answer within {timeout_s:g} s; {GO_ON}") from error
        return batch

    def commit(self, position: int, scores: Scores) -> None:
        self._on_disk(self._actor.commit.remote(position, scores), f"journal of batch {position + 1}")

    def drop_before(self, position: int) -> None:
        self._on_disk(self._actor.drop_before.remote(position), "journal")

    def _on_disk(self, writing: Any, what: str) -> None:
        import ray

        try:
            self._answer(writing, what, JOURNAL_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise _slow_disk(what) from error

    def _answer(self, answer: Any, what: str, timeout_s: float) -> Any:
        """Raises GetTimeoutError, and the errors of the source."""
        import ray

        try:
            return ray.get(answer, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise_expected(error)
        except ray.exceptions.RayActorError as error:
            raise EngineError(f"{what}: the process of the source is gone; {GO_ON}") from error


def _slow_disk(what: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{what}: not on the disk within {JOURNAL_TIMEOUT_S:g} s; look at the disk of outputs, then {GO_ON}"
    )
