"""Deadlines hold whatever the other side does."""

import asyncio
import time

import pytest

from rollout.errors import EngineError
from rollout.loop import LoopThread, before_deadline


async def slow() -> None:
    await asyncio.sleep(30)


async def stubborn() -> None:
    while True:
        try:
            await asyncio.sleep(0.3)
            return
        except asyncio.CancelledError:
            continue


async def own_timeout() -> None:
    raise TimeoutError("mine")


def test_a_call_beyond_its_deadline_is_an_error_that_says_what_was_slow():
    with LoopThread() as loop, pytest.raises(EngineError, match=r"weight update: no answer within 0\.05 s"):
        loop.run(slow(), timeout_s=0.05, what="weight update")


def test_a_callees_own_timeout_is_not_taken_for_the_deadline():
    with LoopThread() as loop, pytest.raises(TimeoutError, match="mine"):
        loop.run(own_timeout(), timeout_s=5, what="call")


def test_a_call_that_refuses_to_be_cancelled_does_not_delay_the_deadline():
    async def scenario() -> float:
        started = time.monotonic()
        with pytest.raises(EngineError):
            await before_deadline(stubborn(), timeout_s=0.05, what="call")
        return time.monotonic() - started

    assert asyncio.run(scenario()) < 0.2


def test_closing_a_loop_cancels_what_runs_on_it_and_can_be_repeated():
    loop = LoopThread()
    with pytest.raises(EngineError):
        loop.run(slow(), timeout_s=0.01, what="call")
    loop.close()
    loop.close()
    assert not loop._thread.is_alive()
