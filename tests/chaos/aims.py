"""What the campaign is going to kill, and when: a seeded list per run. Pure data.

    plan_of(seed, run) --> [Aim(stage, victim, moment, nth, delay_s), ...]   in the order of the stages

A moment can be seen from outside; `delay_s` after its `nth` occurrence the victim is killed.
"""

import random
from dataclasses import dataclass
from typing import Literal

Engine = Literal["vllm", "hf"]
Victim = Literal["driver", "trainer", "stage task", "raylet", "engine actor", "EngineCore", "vLLM worker"]
Moment = Literal[
    "start",  # the stage's process is there: imports, placement, data, models, the engine's start
    "step",  # a line of metrics was written
    "save",  # an unfinished checkpoint appeared
    "journal",  # an unfinished entry of the rollout journal appeared, or one was committed
    "sync",  # the file of a weight sync was opened for another version
    "engine",  # the process of an engine appeared
    "end",  # the last line of metrics was written: the model is saved, sealed, published
]
NUM_KILLS = {"prepare": 1, "pretrain": 2, "sft": 2, "reward": 2, "ppo": 3, "evaluate": 1}
"""Of each stage, in every run."""
ENGINE_VICTIMS: dict[Engine, tuple[Victim, ...]] = {
    "vllm": ("engine actor", "EngineCore", "vLLM worker"),
    "hf": ("engine actor",),
}
LONGEST_DELAY_S: dict[Moment, float] = {
    "start": 2.5,
    "step": 0.1,
    "save": 0.03,
    "journal": 0.2,
    "sync": 0.06,
    "engine": 4.0,
    "end": 0.6,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """One kill, planned."""

    stage: str
    victim: Victim
    moment: Moment
    nth: int
    delay_s: float


def engine_of(run: int) -> Engine:
    """Every second run generates with vLLM, the others with the quicker reference engine."""
    return "vllm" if run % 2 == 0 else "hf"


def plan_of(seed: int, run: int) -> list[Aim]:
    """The kills of one run."""
    draw = random.Random(f"{seed}/{run}")
    return [
        _aim(draw, stage, engine_of(run), first=index == 0)
        for stage, number in NUM_KILLS.items()
        for index in range(number)
    ]


def _aim(draw: random.Random, stage: str, engine: Engine, *, first: bool) -> Aim:
    victim = draw.choice(_victims(stage, engine))
    moment = draw.choice(_moments(stage, victim, first=first))
    return Aim(
        stage=stage,
        victim=victim,
        moment=moment,
        nth=draw.randint(1, 3) if moment in ("step", "save", "journal", "sync") else 1,
        delay_s=round(draw.uniform(0, LONGEST_DELAY_S[moment]), 3),
    )


def _victims(stage: str, engine: Engine) -> tuple[Victim, ...]:
    everywhere: tuple[Victim, ...] = ("driver", "raylet", "stage task")
    if stage == "prepare":
        return everywhere
    if stage in ("pretrain", "sft"):
        return (*everywhere, "trainer", "trainer")
    return (*everywhere, "trainer", *ENGINE_VICTIMS[engine])


def _moments(stage: str, victim: Victim, *, first: bool) -> tuple[Moment, ...]:
    """An engine lives for a part of its stage only; and a stage that was resumed at its end takes no step."""
    if stage == "prepare":
        return ("start",)
    if stage == "evaluate" or (stage == "reward" and victim in ENGINE_VICTIMS["vllm"]):
        return ("engine", "start") if victim not in ENGINE_VICTIMS["vllm"] else ("engine",)
    late: tuple[Moment, ...] = () if first else ("end",)
    training: tuple[Moment, ...] = ("start", "step", "save", "save", *late)
    if stage != "ppo":
        return training
    inside: tuple[Moment, ...] = ("step", "save", "journal", "sync", "sync")
    return inside if victim in ENGINE_VICTIMS["vllm"] else (*inside, *training)
