"""What a stage reserves of a cluster, as bundles: one node each, granted all at once.

    resources.<stage>, rollout --bundles_of--> StageBundles --lacking(nodes)--> what is missing, in words
                                                  `--> the stage's placement group (training/distributed)

Owns: which process sits in which bundle, and what cannot fit. With `rollout.sync: shm` the engines sit in the
first worker's bundle, because they map a file on its node; other transports give each engine its own bundle.
Does not own: reserving (distributed, rollout/pool). Pure; light import.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rollout.config import EngineConfig
from stages.runtime import StageResources

Bundle = Mapping[str, float]
"""Ray resource -> amount, e.g. {"CPU": 4, "GPU": 1}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBundles:
    """The bundles of one stage: the workers', by rank, then the engines' own."""

    stage: str
    workers: tuple[Bundle, ...]
    engines: tuple[Bundle, ...] = ()  # empty: they sit in the first worker's, or reserve nothing
    num_engines: int = 0  # wherever they sit
    with_worker: bool = False  # the engines sit in the first worker's bundle

    @property
    def all(self) -> tuple[Bundle, ...]:
        """In the order of the placement group."""
        return (*self.workers, *self.engines)

    def engine_index(self, engine: int) -> int | None:
        """The bundle of an engine; None for one that reserves nothing and may go anywhere."""
        if self.with_worker:
            return 0
        return len(self.workers) + engine if self.engines else None

    def __str__(self) -> str:
        """Example: "ppo: 8 x {CPU: 4, GPU: 1} + 4 engines x {GPU: 1}"."""
        parts = [_counted(self.workers)]
        if self.engines:
            parts.append(f"{_plural(len(self.engines), 'engine')} x {_text(self.engines[0])}")
        elif self.num_engines:
            where = "with the first worker" if self.with_worker else "anywhere"
            parts.append(f"{_plural(self.num_engines, 'engine')} {where}")
        return f"{self.stage}: {' + '.join(parts)}"


def bundles_of(stage: str, resources: StageResources, rollout: EngineConfig | None) -> StageBundles:
    """`rollout`: None for a stage without engines."""
    worker = _bundle(resources.num_cpus, resources.num_gpus)
    workers = (worker,) * resources.num_workers
    if rollout is None:
        return StageBundles(stage=stage, workers=workers)
    engine = _bundle(resources.num_cpus_per_engine, resources.num_gpus_per_engine)
    if rollout.sync == "shm":
        first = _sum([worker, *[engine] * rollout.num_engines])
        return StageBundles(
            stage=stage, workers=(first, *workers[1:]), num_engines=rollout.num_engines, with_worker=True
        )
    engines = (engine,) * rollout.num_engines if engine else ()
    return StageBundles(stage=stage, workers=workers, engines=engines, num_engines=rollout.num_engines)


def lacking(stages: Sequence[StageBundles], nodes: Mapping[str, Bundle]) -> str | None:
    """Why `stages`, running side by side, can never be placed on `nodes` (name -> resources); None if they
    may be.

    Looks at totals and at how many bundles of a kind the nodes hold when empty: whatever it refuses is
    impossible. What it lets pass may still have to wait, and then meets the placement deadline.
    """
    wanted = [bundle for stage in stages for bundle in stage.all]
    total, there = _sum(wanted), _sum(list(nodes.values()))
    missing = {name: amount - _of(there, name) for name, amount in total.items() if amount > _of(there, name)}
    if missing:
        having = " and ".join(_plural(_of(there, name), name) for name in missing)
        lack = " and ".join(f"{amount:g} {name}" for name, amount in missing.items())
        return f"{_all(stages)}: the cluster has {having} on {_plural(len(nodes), 'node')}; missing {lack}"
    for bundle, count in _kinds(wanted):
        places = sum(_times(bundle, node) for node in nodes.values())
        if places < count:
            return (
                f"{_all(stages)}: a bundle is never split over nodes, and the room on "
                f"{_plural(len(nodes), 'node')} is for {places} x {_text(bundle)}; missing {count - places}"
            )
    return None


def _bundle(num_cpus: float, num_gpus: float) -> Bundle:
    return {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount}


def _sum(bundles: Sequence[Bundle]) -> dict[str, float]:
    names = dict.fromkeys(name for bundle in bundles for name in bundle)
    # rounded as Ray counts, in ten-thousandths
    return {name: round(math.fsum(b[name] for b in bundles if name in b), 4) for name in names}


def _kinds(bundles: Sequence[Bundle]) -> Iterator[tuple[Bundle, int]]:
    """Each kind with how many bundles need at least as much of everything, which cannot share its places."""
    for kind in {_text(bundle): bundle for bundle in bundles}.values():
        larger = [b for b in bundles if all(name in b and b[name] >= kind[name] for name in kind)]
        yield kind, len(larger)


def _times(bundle: Bundle, node: Bundle) -> int:
    """How often `bundle` fits into an empty node."""
    return min(math.floor(_of(node, name) / amount + 1e-9) for name, amount in bundle.items())


def _of(bundle: Bundle, name: str) -> float:
    return sum(amount for key, amount in bundle.items() if key == name)


def _all(stages: Sequence[StageBundles]) -> str:
    return ", side by side with ".join(str(stage) for stage in stages)


def _counted(bundles: Sequence[Bundle]) -> str:
    texts = [_text(bundle) for bundle in bundles]
    return " + ".join(f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts))


def _text(bundle: Bundle) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in bundle.items()) + "}"


def _plural(count: float, name: str) -> str:
    return f"{count:g} {name}{'s' * (count != 1)}"
