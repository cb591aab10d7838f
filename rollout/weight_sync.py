"""Weight sync: trainer -> rollout engines, once per PPO step.

    ModuleSource --one layer at a time--> Transport.pack --pause, update, resume--> engines hold `version`
                                             `--serving: the bytes, by shm, gloo or nccl--^

Owns: order, versions, deadlines, the sync's error, and the comparison of all tensors. Does not own: how bytes
travel (transports), names and gathering (weight_source), bytes and checks (weight_file), loading (engines),
whether engine and trainer agree (parity). Blocks its caller until every engine holds the version.
"""

import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from rollout.api import Diagnosis, RolloutEngine, WeightUpdate
from rollout.config import EngineConfig
from rollout.errors import EngineError, WeightSyncError
from rollout.loop import LoopThread
from rollout.transports import LOOPBACK, GlooStream, Transport, transport_of
from rollout.weight_file import update_bytes
from rollout.weight_source import ModuleSource

T = TypeVar("T")


GRACE_S = 5.0
"""Added to a deadline that the engine keeps itself, so that the engine's own error, which says more, comes
first.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One weight sync, as its sender saw it."""

    version: int
    seconds: float  # from the first gather to the engine's resume
    num_bytes: int  # that each engine took; 0 on ranks that do not send


class _GatheredOnce(ModuleSource):
    """A source whose groups are gathered once and to the end, also where packing them fails halfway: the
    other ranks gather along, and would wait for this one.
    """

    def __init__(self, source: ModuleSource) -> None:
        self._source = source
        self._groups = source.groups()

    def groups(self) -> Iterator[dict[str, torch.Tensor]]:
        """See `ModuleSource.groups`: those that are left."""
        return self._groups

    def aliases(self) -> dict[str, str]:
        """See `ModuleSource.aliases`."""
        return self._source.aliases()

    def gather_the_rest(self) -> None:
        """Nothing, after a packing that succeeded."""
        for _ in self._groups:
            pass


class WeightSync:
    """Moves a trainer's weights into an engine, or into a pool of them.

    Example: sync = WeightSync(ModuleSource(policy, dtype="float32"), engine=engine, loop=loop, config=config)
             sync.sync(version=0); ...; sync.close()
    """

    def __init__(
        self,
        source: ModuleSource,
        *,
        engine: RolloutEngine | None,
        loop: LoopThread | None,
        config: EngineConfig,
        host: str = LOOPBACK,
    ) -> None:
        """Rank 0 gives `engine` and `loop` (the loop that the engine lives on); the other ranks give None and
        only take part in the gather. `host`: this machine's address as the engines see it.
        """
        assert (engine is None) == (loop is None)
        self.source = source
        self.config = config
        self._engine = engine
        self._loop = loop
        self._host = host
        self._transport = None if engine is None else transport_of(config, host)

    def sync(self, version: int) -> SyncReport:
        """Every rank, together. Returns when every engine holds `version` and decodes again.

        Raises WeightSyncError: the engine may hold a mixture and must be rebuilt (it is left paused).
        """
        started, num_bytes = time.perf_counter(), 0
        if self._transport is None:
            self._only_gather()
        else:
            update = self._transport.pack(self.source, version)
            num_bytes = update_bytes(update)
            with self._transport.serving(update):
                self._send(update)
        return SyncReport(version=version, seconds=time.perf_counter() - started, num_bytes=num_bytes)

    def diagnose(self) -> Diagnosis:
        """Every rank, together: which of the trainer's tensors, as they are now, the engine does not hold bit
        for bit, and which could not be compared. Empty on ranks that do not send.

        Raises nothing: what a diagnosis explains must not be hidden by a failure of its own. Whatever keeps
        the tensors from being compared is told in `not_compared`.
        """
        if self._transport is None:
            self._only_gather()
            return Diagnosis(differing=(), not_compared=())
        source = _GatheredOnce(self.source)
        try:
            with self._comparable(self._transport) as transport:
                update = transport.pack(source, version=0)
                with transport.serving(update):
                    return self.on_engine(
                        lambda engine: engine.diagnose(update),
                        "comparison of all tensors",
                        self.config.comparison_timeout_s,
                    )
        except Exception as error:  # the engine's, the transport's or a bug: its caller has more to say
            return Diagnosis.failed(error)
        finally:
            source.gather_the_rest()

    def on_engine(
        self, call: Callable[[RolloutEngine], Coroutine[Any, Any, T]], what: str, timeout_s: float
    ) -> T:
        """Rank 0: one call to the engine, from this thread."""
        assert self._engine is not None and self._loop is not None
        return self._loop.run(call(self._engine), timeout_s=timeout_s + GRACE_S, what=what)

    def close(self) -> None:
        """Free what the transport holds. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    @contextlib.contextmanager
    def _comparable(self, transport: Transport) -> Iterator[Transport]:
        """What holds bytes that engines may compare at leisure: those of an nccl broadcast are nowhere to be
        had again, so they take the room of a whole model in shared memory while they are compared.
        """
        if self.config.sync != "nccl":
            yield transport
            return
        stream = GlooStream(self._host, timeout_s=self.config.sync_timeout_s)
        try:
            yield stream
        finally:
            stream.close()

    def _only_gather(self) -> None:
        for _ in self.source.groups():
            pass

    def _send(self, update: WeightUpdate) -> None:
        timeout_s = self.config.sync_timeout_s
        try:
            self.on_engine(lambda engine: engine.pause(), "pause", timeout_s)
            self.on_engine(lambda engine: engine.update(update), "weight update", timeout_s)
            held = self.on_engine(lambda engine: engine.version(), "version", timeout_s)
            if held != update.version:
                raise WeightSyncError(
                    f"the engine says it holds weight version {held} after an update to "
                    f"{update.version}; rebuild it"
                )
            self.on_engine(lambda engine: engine.resume(), "resume", timeout_s)
        except WeightSyncError:
            raise
        except EngineError as error:
            raise WeightSyncError(
                f"weight version {update.version} did not arrive: {error}; rebuild the engine"
            ) from error
