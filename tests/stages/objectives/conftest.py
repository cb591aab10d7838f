"""A world of N ranks without torch.distributed: a thread per rank, meeting in every all-reduce."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.objectives.masked import SumOverRanks


def _run_on_ranks(world_size: int, body: Callable[[int, SumOverRanks], Any]) -> list[Any]:
    barrier = threading.Barrier(world_size, timeout=10)
    slots: list[Tensor] = [torch.empty(0)] * world_size

    def on_rank(rank: int) -> Any:
        def sum_over_ranks(local: Tensor) -> Tensor:
            slots[rank] = local
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        return body(rank, sum_over_ranks)

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(on_rank, range(world_size)))


@pytest.fixture
def run_on_ranks() -> Callable[[int, Callable[[int, SumOverRanks], Any]], list[Any]]:
    """`run_on_ranks(n, body)`: the results of `body(rank, sum_over_ranks)` on each of n ranks."""
    return _run_on_ranks
