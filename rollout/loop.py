"""Deadlines, and one asyncio loop on a daemon thread: how synchronous code (a trainer) drives an asynchronous
engine.

    trainer thread --LoopThread.run(coroutine, timeout_s)--> loop thread --> engine --before_deadline-->
                                                                                    `--while_healthy-->

Owns: the thread, and that no call waits for ever, or long for the dead. Does not own: the engines on it.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from rollout.errors import EngineError
from rollout.ground.errors import GO_ON

T = TypeVar("T")


async def before_deadline(awaitable: Awaitable[T], *, timeout_s: float, what: str) -> T:
    """The awaitable's result or its own error; EngineError, naming `what`, when there is neither in time.

    Unlike `asyncio.wait_for` it tells our deadline from a TimeoutError raised inside, and it does not wait
    for a cancelled call to agree to end: a frozen process never would.
    """
    task = asyncio.create_task(_result_of(awaitable))
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
    finally:
        task.cancel()  # nothing happens to one that is done
    if not done:
        raise EngineError(f"{what}: no answer within {timeout_s:g} s; {GO_ON}")
    return task.result()


async def while_healthy(
    awaitable: Awaitable[T], *, probe: Callable[[], Awaitable[object]], interval_s: float
) -> T:
    """The awaitable's result or its own error; the probe's error, when one of its round trips fails first.

    For calls that may rightly take long: a frozen process looks like a busy one, but answers no probe.
    """
    task = asyncio.create_task(_result_of(awaitable))
    watch = asyncio.create_task(_probe_for_ever(probe, interval_s))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else watch.result()
    finally:
        task.cancel()
        watch.cancel()


async def _probe_for_ever(probe: Callable[[], Awaitable[object]], interval_s: float) -> NoReturn:
    while True:
        await asyncio.sleep(interval_s)
        await probe()


async def _result_of(awaitable: Awaitable[T]) -> T:
    return await awaitable


class LoopThread:
    """An event loop that outlives the calls made on it. Close it after the engines that were opened on it.

    Example: with LoopThread() as loop: rollouts = loop.run(engine.submit(requests), timeout_s=60,
    what="generate")
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="rollout-loop", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float, what: str) -> T:
        """The coroutine's result. Beyond `timeout_s` it is cancelled and EngineError says `what` was too
        slow.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout=timeout_s)
        except concurrent.futures.TimeoutError as error:
            if future.done():  # the coroutine itself raised TimeoutError: not our deadline
                raise
            future.cancel()
            raise EngineError(f"{what}: no answer within {timeout_s:g} s; {GO_ON}") from error

    def close(self) -> None:
        """Cancel what still runs and end the thread. Idempotent."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._cancel_all()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
