"""Pack plans: which sequences share a row. Numbers in, indices out.

    lengths --plan_packs--> packs of at most so many sequences, token counts about equal (micro-batches)
    lengths --best_fit----> packs of at most so many tokens, as few as can be (rows of a fixed size)

Pure, deterministic, standard library only, so that those who write shards need no torch. Owns no tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """Who shares a row: each pack is a tuple of sequence indices; every index is in exactly one pack."""

    packs: tuple[tuple[int, ...], ...]


def plan_packs(lengths: Sequence[int], micro_batch_size: int) -> PackPlan:
    """ceil(S / micro_batch_size) packs of at most micro_batch_size sequences, token counts about equal.

    Longest first into the pack with the fewest tokens that has room; ties by index, so deterministic.
    """
    num_packs = -(-len(lengths) // micro_batch_size)
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    tokens = [0] * num_packs
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = min(
            (p for p in range(num_packs) if len(packs[p]) < micro_batch_size), key=lambda p: (tokens[p], p)
        )
        packs[target].append(index)
        tokens[target] += lengths[index]
    return PackPlan(packs=tuple(tuple(sorted(members)) for members in packs))


def best_fit(lengths: Sequence[int], capacity: int) -> PackPlan:
    """Packs of at most `capacity` tokens, few of them: best-fit decreasing (Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling", arXiv 2404.10830).

    Longest first into the fullest pack that has room, else into a new one; ties by index, so deterministic.
    At most 11/9 of the fewest packs possible, plus one (Johnson 1973). O(n log n), for the sort: the fullest
    pack with room is found by one look at a bit set of the free sizes, `capacity` bits wide. Every length is
    in 1..capacity: cutting or refusing longer sequences is the caller's business.

    Example: best_fit([3, 5, 2, 4], 7) -> packs ((1, 2), (0, 3))
    """
    assert all(0 < length <= capacity for length in lengths), f"a length is not in 1..{capacity}"
    packs: list[list[int]] = []
    free_sizes = 0  # bit s: a pack has s free slots
    with_free: dict[int, list[int]] = {}  # s -> packs with s free slots
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if candidates := free_sizes >> length:
            free = length + (candidates & -candidates).bit_length() - 1  # the smallest that suffices
            target = with_free[free].pop()
            if not with_free[free]:
                free_sizes ^= 1 << free
        else:
            free, target = capacity, len(packs)
            packs.append([])
        packs[target].append(index)
        with_free.setdefault(free - length, []).append(target)
        free_sizes |= 1 << (free - length)
    return PackPlan(packs=tuple(tuple(sorted(members)) for members in packs))


def utilisation(plan: PackPlan, lengths: Sequence[int], capacity: int) -> float:
    """Tokens per slot of the rows of `plan`, each of `capacity` slots: 1 where none is empty."""
    return sum(lengths[index] for members in plan.packs for index in members) / (len(plan.packs) * capacity)
