"""Data order: a function of seed and step alone."""

from collections import Counter

import pytest

from stages.data.batches import BatchOrder, permutation, rank_share, stage_seed


@pytest.mark.parametrize(("num_rows", "batch_size"), [(12, 4), (10, 4), (7, 1), (3, 8), (1, 5)])
def test_pin_34_every_row_is_seen_once_per_epoch_and_batches_are_full(num_rows, batch_size):
    """Three epochs, read batch by batch: cut at multiples of num_rows, each is a permutation."""
    order = BatchOrder(num_rows=num_rows, batch_size=batch_size, seed=3)
    steps = order.num_steps(3)
    batches = [order.indices(step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    seen = [row for batch in batches for row in batch]
    for epoch in range(3):
        assert sorted(seen[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_pin_34_the_last_partial_batch_is_filled_up_from_the_next_epoch():
    order = BatchOrder(num_rows=10, batch_size=4, seed=0)
    assert order.num_steps(1) == 3 and order.num_steps(0.1) == 1 and order.num_steps(2) == 5
    third = order.indices(2)
    first_epoch = [row for step in range(2) for row in order.indices(step)] + list(third[:2])
    assert sorted(first_epoch) == list(range(10))


def test_pin_34_resuming_at_a_step_needs_nothing_but_the_step():
    order = BatchOrder(num_rows=100, batch_size=7, seed=5)
    straight = [order.indices(step) for step in range(40)]
    assert [BatchOrder(num_rows=100, batch_size=7, seed=5).indices(step) for step in (39, 20, 0)] == [
        straight[39],
        straight[20],
        straight[0],
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_pin_34_every_row_is_seen_once_per_epoch_under_ranks(world_size):
    order = BatchOrder(num_rows=12, batch_size=4, seed=1)
    seen = Counter(
        row
        for step in range(3)
        for rank in range(world_size)
        for row in rank_share(order.indices(step), rank, world_size)
    )
    assert seen == Counter(range(12))
    sizes = [len(rank_share(order.indices(0), rank, world_size)) for rank in range(world_size)]
    assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_give_different_orders():
    order = BatchOrder(num_rows=50, batch_size=50, seed=1)
    other = BatchOrder(num_rows=50, batch_size=50, seed=2)
    assert len({order.indices(0), order.indices(1), other.indices(0)}) == 3


def test_the_permutation_is_pinned():
    """Would change under another generator, and with it every run's data order."""
    assert permutation(8, 42).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]


def test_stage_seeds_are_63_bit_and_keep_their_parts_apart():
    parts = [("a", "b"), ("ab",), ("a", 1), ("a", "1"), (), ("a",)]
    seeds = [stage_seed(0, *part) for part in parts] + [stage_seed(1)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert stage_seed(0, "ppo", 3, 1) == stage_seed(0, "ppo", 3, 1)
