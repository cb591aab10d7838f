"""Weight sync: trainer -> rollout engines, once per PPO step, and the proof that it worked.

    ModuleSource --one layer at a time--> Transport.pack --pause, update, resume--> engines hold `version`
                                             `--serving: the bytes, by shm or gloo--^
    ParityGate: the engine samples a probe or a batch, the trainer scores it; beyond the limit: which tensors
    differ? And now and then, whatever the log-probs say: do any?

Owns: order, versions, deadlines, what a transport is, the sync's error. Does not own: names and gathering
(weight_source), bytes and checks (weight_file), pairs of hosts (weight_gloo), loading (engines). Blocks its
caller until every engine holds the version.
"""

import atexit
import contextlib
import fcntl
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch

from rollout.api import Diagnosis, Rollout, RolloutEngine, RolloutRequest, Sampling, WeightUpdate
from rollout.config import EngineConfig
from rollout.errors import EngineError, ParityError, WeightSyncError
from rollout.loop import LoopThread
from rollout.run_mark import WEIGHTS_PREFIX, weights_prefix
from rollout.shared_memory import SHARED_MEMORY
from rollout.weight_file import WeightFileWriter, in_short, update_bytes
from rollout.weight_gloo import GlooSender
from rollout.weight_source import ModuleSource

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
"""Where a sender is found by engines on its own host."""
STALE_AFTER_S = 60.0
"""An unlocked directory of ours that is older belongs to a trainer that was killed."""
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


class Transport(Protocol):
    """How the bytes of an update get from the sender to the engines."""

    def pack(self, source: ModuleSource, version: int) -> WeightUpdate:
        """Gather the weights, one layer at a time, and say what an engine has to end up with. A collective
        where the source is one; raises EnvironmentProblem.
        """

    def serving(self, update: WeightUpdate) -> AbstractContextManager[None]:
        """Inside, the engines may take the bytes of `update`."""

    def close(self) -> None:
        """Idempotent."""


class SharedFile:
    """`shm`: one file in shared memory, which every engine on this host maps."""

    def __init__(self) -> None:
        self.directory = _SharedDirectory()

    def pack(self, source: ModuleSource, version: int) -> WeightUpdate:
        """See `Transport.pack`."""
        with WeightFileWriter(self.directory.path / "weights.bin") as writer:
            for group in source.groups():
                for name, tensor in group.items():
                    writer.add(name, tensor)
            for tied, of in source.aliases().items():
                writer.add_alias(tied, of=of)
            return writer.finish(version)

    def serving(self, update: WeightUpdate) -> AbstractContextManager[None]:
        """See `Transport.serving`. The file is there."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """See `Transport.close`."""
        self.directory.remove()


class GlooStream:
    """`gloo`: the same file, which stays here, and its bytes sent to each engine that asks, on any host."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        self._file = SharedFile()
        self._sender = GlooSender(host, timeout_s=timeout_s)
        self._packed: WeightUpdate | None = None

    def pack(self, source: ModuleSource, version: int) -> WeightUpdate:
        """See `Transport.pack`."""
        self._packed = self._file.pack(source, version)
        return replace(self._packed, location=self._sender.new_location())

    def serving(self, update: WeightUpdate) -> AbstractContextManager[None]:
        """See `Transport.serving`."""
        assert self._packed is not None, "pack comes first"
        size = update_bytes(update)
        data = torch.from_file(self._packed.location, shared=False, size=size, dtype=torch.uint8)
        return self._sender.serving(update.location, data)

    def close(self) -> None:
        """See `Transport.close`."""
        self._file.close()
        self._sender.close()


def _transport(config: EngineConfig, host: str) -> Transport:
    if config.sync == "shm":
        return SharedFile()
    if config.sync == "gloo":
        return GlooStream(host, timeout_s=config.sync_timeout_s)
    from rollout.vllm_sender import NcclBroadcast

    return NcclBroadcast(config)


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
        self._transport = None if engine is None else _transport(config, host)

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


LogprobsOf = Callable[[Sequence[tuple[int, ...]], Sequence[tuple[int, ...]], float], list[list[float]]]
"""(prompt_ids, response_ids, temperature) -> log-probs of each response's tokens by the trainer's model, in
nats.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """How far engine and trainer are apart on what the engine sampled: the probe, or a training batch."""

    sample: str  # "probe" | "training batch"
    version: int
    num_tokens: int
    max_abs_diff: float  # nats
    mean_abs_diff: float  # nats

    @classmethod
    def of(cls, diffs_N: torch.Tensor, *, sample: str, version: int) -> Self:
        """`diffs_N`: |log-prob of the engine - of the trainer| of every token. NaN stays NaN."""
        return cls(
            sample=sample,
            version=version,
            num_tokens=len(diffs_N),
            max_abs_diff=float(diffs_N.max()),
            mean_abs_diff=float(diffs_N.double().mean()),
        )


class ParityGate:
    """Stops a run whose engine and trainer disagree about log-probs: at the start, after every sync, and
    before the update on a training batch. In bf16, where log-probs cannot tell an engine that is a few steps
    behind, `compare_tensors` does.

    Example, one trainer process: gate.check(version=3). With several: rank 0 calls `probe` and broadcasts,
    then every rank calls `measure` and `require` on the same rollouts, for `logprobs_of` and the diagnosis
    may be collectives.
    """

    def __init__(
        self,
        sync: WeightSync,
        *,
        prompts: Sequence[tuple[int, ...]],
        stop_token_ids: tuple[int, ...],
        temperature: float,
        seed: int,
        logprobs_of: LogprobsOf,
    ) -> None:
        """The first `config.parity_num_prompts` of `prompts` are the probe. `logprobs_of` computes as
        training does.
        """
        self._sync = sync
        self._prompts = list(prompts[: sync.config.parity_num_prompts])
        self._stop_token_ids = stop_token_ids
        self._temperature = temperature
        self._seed = seed
        self._logprobs_of = logprobs_of

    def check(self, version: int) -> ParityReport:
        """Probe and compare. Raises ParityError."""
        return self.compare(self.probe(version))

    def probe(self, version: int) -> list[Rollout]:
        """Rank 0: responses sampled wholly under `version`, the same prompts and seeds every time."""
        requests = [self._request(version, index, prompt) for index, prompt in enumerate(self._prompts)]
        rollouts = self._sync.on_engine(
            lambda engine: engine.submit(requests), "parity probe", self._sync.config.generate_timeout_s
        )
        others = {drawn for rollout in rollouts for drawn in rollout.weight_versions} - {version}
        if others:
            raise ParityError(
                f"the parity probe of weight version {version} was sampled under {sorted(others)}"
            )
        return rollouts

    def compare(self, rollouts: Sequence[Rollout]) -> ParityReport:
        """Every rank, together: `measure` and `require`. Raises ParityError."""
        report = self.measure(rollouts)
        self.require(report)
        return report

    def measure(self, rollouts: Sequence[Rollout]) -> ParityReport:
        """Every rank, together: how far the trainer's log-probs are from those of the probe's `rollouts`."""
        policy = self._logprobs_of(
            [rollout.prompt_ids for rollout in rollouts],
            [rollout.response_ids for rollout in rollouts],
            1.0 if self._temperature == 0 else self._temperature,
        )
        diffs = [
            abs(ours - theirs)
            for rollout, row in zip(rollouts, policy, strict=True)
            for ours, theirs in zip(row, rollout.logprobs, strict=True)
        ]
        diffs_N = torch.tensor(diffs, dtype=torch.float64)
        return ParityReport.of(diffs_N, sample="probe", version=rollouts[0].weight_versions[0])

    def accepts(self, report: ParityReport) -> bool:
        """Whether the report is within the limits of the config; NaN never is. In bf16 a maximum means
        nothing.
        """
        config = self._sync.config
        if self._sync.source.dtype == "float32":
            return report.max_abs_diff <= config.parity_max_abs_diff
        return report.mean_abs_diff < math.log(config.parity_max_mean_ratio)

    def require(self, report: ParityReport) -> None:
        """Every rank, together, with the same report. Raises ParityError unless it is accepted; the tensors
        that differ are named on rank 0.
        """
        if not self.accepts(report):
            raise ParityError(
                f"engine and trainer disagree at weight version {report.version}: log-probs of the "
                f"{report.num_tokens} tokens of the {report.sample} differ by {report.max_abs_diff:.2g} at "
                f"most, {report.mean_abs_diff:.2g} on average; {in_words(self._sync.diagnose())}"
            )

    def compare_tensors(self, version: int) -> Diagnosis:
        """Every rank, together, after the sync of `version`: does the engine hold every tensor of the
        trainer? On rank 0 raises ParityError that names some of those that differ, and EngineError where a
        bf16 engine shows none: nothing else tells that it is behind. An engine that is split over several
        GPUs is not asked, because its tensors are not whole anywhere.
        """
        if (parallel := self._sync.config.tensor_parallel_size) > 1:
            reason = f"all weights (split over {parallel} GPUs)"
            return Diagnosis(differing=(), not_compared=(reason,))
        found = self._sync.diagnose()
        if found.differing:
            raise ParityError(
                f"after the sync of weight version {version}, which reported no error, {in_words(found)}: "
                "it samples from other weights; run again with another rollout.sync, to tell whether the "
                "transport or the engine is at fault"
            )
        if found.not_compared and found.shows_nothing and self._sync.source.dtype != "float32":
            raise EngineError(
                f"after the sync of weight version {version} no tensor of the engine could be compared with "
                f"the trainer's: {in_short(found.not_compared)}; in bf16 nothing else tells an engine "
                "that is behind: raise rollout.comparison_timeout_s where time ran out, or lower "
                "rollout.gpu_memory_frac where memory did"
            )
        return found

    def _request(self, version: int, index: int, prompt: tuple[int, ...]) -> RolloutRequest:
        sampling = Sampling(
            temperature=self._temperature,
            max_tokens=self._sync.config.parity_max_tokens,
            stop_token_ids=self._stop_token_ids,
            seed=self._seed + index,
        )
        return RolloutRequest(request_id=f"parity-{version}-{index}", prompt_ids=prompt, sampling=sampling)


def in_words(diagnosis: Diagnosis) -> str:
    """For one line of an error: which tensors differ, and which are not known to agree."""
    parts = []
    if diagnosis.differing:
        parts.append(f"the engine does not hold the trainer's {in_short(diagnosis.differing)}")
    if diagnosis.not_compared:
        parts.append(f"could not be compared: {in_short(diagnosis.not_compared)}")
    if not parts:
        parts.append(
            "the engine holds every tensor of the trainer, so the two compute differently "
            "(precision, mask, temperature)"
        )
    return "; ".join(parts)


class _SharedDirectory:
    """A private directory in shared memory. Locked while its owner lives, so that the next trainer can tell
    what one that was killed has left behind, and remove it.
    """

    def __init__(self) -> None:
        _remove_stale()
        self.path = Path(tempfile.mkdtemp(prefix=weights_prefix(), dir=SHARED_MEMORY))
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        atexit.register(self.remove)

    def remove(self) -> None:
        """Idempotent."""
        atexit.unregister(self.remove)
        if self.path.exists():
            shutil.rmtree(self.path)
            os.close(self._lock)


def _remove_stale() -> None:
    for path in SHARED_MEMORY.glob(f"{WEIGHTS_PREFIX}*"):
        # locked: its owner lives
        with contextlib.suppress(FileNotFoundError, PermissionError, BlockingIOError):
            if time.time() - path.stat().st_mtime > STALE_AFTER_S:
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    finally:
        os.close(descriptor)
