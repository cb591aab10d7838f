"""Workers: who works on the blocks of prepare: this process in turn, or Ray Data's workers at once.

    Workers.map(work, given, num) --> work(**given)({"number": n}) for each block n, in order

Owns: where the work is done, its deadlines, that answers come in order. Does not own: the work (prepare).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rollout.ground.errors import GO_ON, EnvironmentProblem, raise_expected
from stages.errors import DataError, Interrupted
from stages.runtime import Runtime

MAX_WORKER_RESTARTS = 2
"""Of one of Ray Data's workers, and of a block: what kills its worker each time ends the stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Who works on the blocks."""

    runtime: Runtime
    on_ray_data: bool

    def map(
        self, work: Callable[..., Any], given: Mapping[str, Any], num: int, *, has_deadline: bool = True
    ) -> Iterator[dict[str, Any]]:
        """`work(**given)({"number": n})` for n below `num`, in order. Raises DataError, Interrupted.

        `has_deadline`: on Ray Data some answer must come within every `collective_timeout_s`.
        """
        numbers = [{"number": number} for number in range(num)]
        spread = self.on_ray_data or self.runtime.resources.num_workers > 1
        if spread and self.runtime.executor == "ray":
            answers = on_ray_data(work, given, numbers, self.runtime, has_deadline=has_deadline)
        else:
            answers = map(work(**given), numbers)
        for answer in answers:
            yield answer
            unless_stopped(self.runtime)


def unless_stopped(runtime: Runtime) -> None:
    if runtime.stop_requested():
        raise Interrupted(f"{runtime.stage}: stopped between two blocks, state saved; {GO_ON}")


def on_ray_data(
    work: Callable[..., Any],
    given: Mapping[str, Any],
    numbers: list[dict[str, int]],
    runtime: Runtime,
    *,
    has_deadline: bool = True,
) -> Iterator[dict[str, Any]]:
    """The same through Ray Data: one process per CPU, or `resources.prepare.num_workers` of them."""
    import ray
    import ray.data

    try:  # Ray Data itself waits for ever
        ray.get(ray.remote(num_cpus=1)(_nothing).remote(), timeout=runtime.placement_timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise EnvironmentProblem(
            f"{runtime.stage}: no CPU to place a worker within {runtime.placement_timeout_s:g} s; free one, "
            "or raise resources.placement_timeout_s"
        ) from None
    num_cpus, wanted = int(ray.cluster_resources()["CPU"]), runtime.resources.num_workers
    num_workers = num_cpus if wanted == 1 else min(wanted, num_cpus)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = runtime.collective_timeout_s if has_deadline else -1
    rows = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map(
        _AsText,  # type: ignore[arg-type]  # a class: one instance per worker
        fn_constructor_kwargs={"work": work, "given": dict(given)},
        concurrency=min(num_workers, len(numbers)),
        num_cpus=1,
        max_restarts=MAX_WORKER_RESTARTS,
        max_task_retries=MAX_WORKER_RESTARTS,
        runtime_env={"env_vars": {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}},
    )
    try:
        for row in rows.iter_rows():
            if row["problem"]:
                raise (Interrupted if row["is_stop"] else DataError)(row["problem"])
            yield json.loads(row["answer"])
    except ray.data.exceptions.ExecutionTimeoutError as error:
        raise EnvironmentProblem(
            f"{runtime.stage}: no block was finished within {runtime.collective_timeout_s:g} s; set a "
            f"smaller {runtime.stage}.block_mb, or raise resources.collective_timeout_s, then {GO_ON}"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise_expected(error)


def _nothing() -> None: ...


class _AsText:
    """A worker whose answers, and what ends it (bad data, a stop), travel as text: Ray Data would make
    columns of the former, and adds lines of its own to the latter.
    """

    def __init__(self, work: Callable[..., Any], given: Mapping[str, Any]) -> None:
        self._work = work(**given)

    def __call__(self, row: Mapping[str, int]) -> dict[str, str | bool]:
        try:
            return {"answer": json.dumps(self._work(row)), "problem": "", "is_stop": False}
        except (DataError, Interrupted) as error:
            return {"answer": "", "problem": str(error), "is_stop": isinstance(error, Interrupted)}
