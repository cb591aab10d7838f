"""Transports: how the bytes of a weight update get from the trainer to the engines.

    ModuleSource --one layer at a time--> Transport.pack --> WeightUpdate
                                             `--serving: a mapped file (shm), a stream (gloo), GPUs (nccl)

Owns: what a transport is, and the shared memory it holds. Does not own: order, versions, deadlines
(weight_sync), the file's layout and checks (weight_file), pairs of hosts (weight_gloo), nccl (vllm_sender).
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from rollout.api import WeightUpdate
from rollout.config import EngineConfig
from rollout.run_mark import WEIGHTS_PREFIX, weights_prefix
from rollout.shared_memory import SHARED_MEMORY
from rollout.weight_file import WeightFileWriter, update_bytes
from rollout.weight_gloo import GlooSender
from rollout.weight_source import ModuleSource

LOOPBACK = "127.0.0.1"
"""Where a sender is found by engines on its own host."""


STALE_AFTER_S = 60.0
"""An unlocked directory of ours that is older belongs to a trainer that was killed."""


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


def transport_of(config: EngineConfig, host: str) -> Transport:
    if config.sync == "shm":
        return SharedFile()
    if config.sync == "gloo":
        return GlooStream(host, timeout_s=config.sync_timeout_s)
    from rollout.vllm_sender import NcclBroadcast

    return NcclBroadcast(config)


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
