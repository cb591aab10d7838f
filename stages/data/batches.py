"""Data order: which rows step `s` reads, as a pure function of seed and step.

    position p = step * batch_size + k  ->  epoch p // num_rows, place p % num_rows in its permutation

There is no iterator state, so resuming is one integer. Owns the order and every derived seed; not the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TypeVar

import numpy as np
from blake3 import blake3

T = TypeVar("T")


def stage_seed(seed: int, *names: str | int) -> int:
    """H(seed, *names) in [0, 2**63): the seed of one generator, e.g. `stage_seed(seed, "ppo", step, rank)`.

    Names are typed and length-prefixed, so ("a", "b") and ("ab",), or 1 and "1", give different seeds.
    """
    hasher = blake3()
    for part in (seed, *names):
        data = f"{type(part).__name__}:{part}".encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(hasher.digest(8), "little") >> 1


def content_share(text: str) -> float:
    """A hash of `text` in [0, 1): below a fraction f for a share f of all texts, whatever file or order they
    come in.
    """
    return int.from_bytes(blake3(text.encode("utf-8", "surrogatepass")).digest(8), "little") / 2**64


def permutation(num_rows: int, seed: int) -> np.ndarray:
    """A seeded permutation of range(num_rows): from Philox's raw stream, so the same under every numpy."""
    return np.argsort(np.random.Philox(key=seed).random_raw(num_rows), kind="stable")


def repeats(num_rows: int, weight: float, seed: int) -> np.ndarray:
    """int64: the rows a weight takes: each floor(weight) times, then a seeded choice of round(fraction *
    num_rows) of them once more. The choice is made once: the same rows in every epoch.
    """
    whole, fraction = divmod(weight, 1)
    chosen = np.sort(permutation(num_rows, seed)[: round(fraction * num_rows)])
    return np.concatenate([np.tile(np.arange(num_rows), int(whole)), chosen])


@lru_cache(maxsize=8)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(num_rows, stage_seed(seed, "epoch", epoch))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """The row indices of every optimizer step.

    Every row is seen once per epoch. Every batch is full: the last partial batch of an epoch is filled up
    with the first rows of the next one, so no row is dropped. With fewer rows than a batch, one batch holds
    rows of several epochs (a row then occurs more than once in it).
    """

    num_rows: int
    batch_size: int
    seed: int  # of the order; use stage_seed(run seed, stage, "order")

    def __post_init__(self) -> None:
        assert self.num_rows > 0 and self.batch_size > 0, "an order needs rows and a batch size"

    def indices(self, step: int) -> tuple[int, ...]:
        """Rows of optimizer step `step` (from 0), all ranks together: batch_size of them."""
        first = step * self.batch_size
        return tuple(self._row(position) for position in range(first, first + self.batch_size))

    def num_steps(self, num_epochs: float, max_steps: int | None = None) -> int:
        """`max_steps`, or the steps after which every row was seen num_epochs times (the last may reach into
        the next epoch).
        """
        if max_steps is not None:
            return max_steps
        return max(1, ceil(num_epochs * self.num_rows / self.batch_size - 1e-9))

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        return int(_epoch_order(self.num_rows, self.seed, epoch)[place])


def rank_share(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """The contiguous share of one rank: sizes differ by at most one, and together they are `items`."""
    start, stop = (len(items) * r // world_size for r in (rank, rank + 1))
    return items[start:stop]
