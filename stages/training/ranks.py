"""What the ranks of a stage tell each other besides gradients: sums, agreements, small records.

    rank 0..W-1 --sum_over_ranks | any_rank | from_main | barrier--> the same value everywhere

Every function here is a collective: all ranks call it, at the same point. Without a process group (one
worker) each is the identity. Records travel as JSON, never as pickles. Owns no process group (distributed).
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Workers of this stage."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the worker that writes files and talks to the engines."""
    return rank() == 0


def barrier() -> None:
    """Return when every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over all ranks, on the device of `values`. Exact where at most one is not zero."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def sums(*values: float) -> list[float]:
    """The sum over all ranks of each number, in float64."""
    total: list[float] = sum_over_ranks(torch.tensor(values, dtype=torch.float64)).tolist()
    return total


def largest(value: float) -> float:
    """The largest `value` of any rank; NaN where one of them is NaN."""
    if world_size() == 1:
        return value
    is_nan = math.isnan(value)  # what MAX makes of it depends on the order of the ranks
    result = torch.tensor([-math.inf if is_nan else value, float(is_nan)], dtype=torch.float64)
    dist.all_reduce(result, dist.ReduceOp.MAX)
    seen, any_nan = result.tolist()
    return math.nan if any_nan else float(seen)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank."""
    return sums(float(flag))[0] > 0


def from_main(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0 (JSON types; tuples arrive as lists), on every rank.

    Raises on rank 0 what `make` raises; the launcher then ends the others.
    """
    if world_size() == 1:
        return make()
    data = torch.tensor([], dtype=torch.uint8)
    if is_main():
        data = torch.frombuffer(bytearray(json.dumps(make()).encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    dist.broadcast(size, src=0)
    if not is_main():
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return json.loads(data.numpy().tobytes())


def shared_out(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """This rank's share of `items` as (item, is_mine). Every rank gets equally many, because a forward
    of a sharded model is a collective. Where the items do not suffice, a rank gets the first one again, not
    as its own.
    """
    for start in range(0, len(items), world_size()):
        index = start + rank()
        yield (items[index], True) if index < len(items) else (items[0], False)
