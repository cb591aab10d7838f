"""The trainer's end of `rollout.sync: nccl`: from GPU to GPUs by vLLM's own packed broadcast. NOT YET RUN:
there was no GPU.

    pack: names and shapes, nothing gathered --> WeightUpdate(nccl:WORLD:ID) --engines join that group
    serving: a thread gathers layer by layer --packed broadcast, rank 0--> vllm_receiver.NcclReceiver per GPU

Owns: the group of an update and its deadlines. A group lasts for one update, so a pool that changed needs no
rebuilding. Its id travels with the update, through Ray, not through a store that unpickles what it is sent.
What arrives cannot be digested before it is loaded: names, shapes and dtypes are checked, and the parity gate
follows.
"""

import base64
import contextlib
import threading
from collections.abc import Iterator

import torch
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.distributed.weight_transfer.packed_tensor import (
    DEFAULT_PACKED_BUFFER_SIZE_BYTES,
    DEFAULT_PACKED_NUM_BUFFERS,
    packed_nccl_broadcast_producer,
)

from rollout.api import TensorSpec, WeightUpdate
from rollout.config import EngineConfig
from rollout.errors import WeightSyncError
from rollout.weight_file import nccl_location, nccl_meeting, num_bytes
from rollout.weight_source import ModuleSource

SENDER_RANK = 0


class NcclBroadcast:
    """`nccl`: a group of this GPU and every GPU of every engine."""

    def __init__(self, config: EngineConfig) -> None:
        self._timeout_s = config.sync_timeout_s
        self._world_size = 1 + config.num_engines * config.tensor_parallel_size
        self._source: ModuleSource | None = None

    def pack(self, source: ModuleSource, version: int) -> WeightUpdate:
        """See `Transport.pack`: only what will come. The gathering is done while serving."""
        self._source = source
        # It holds this process's address on the interface that NCCL_SOCKET_IFNAME names; without one NCCL
        # takes the first that is not loopback. The launcher of the trainers never names loopback.
        meeting_id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        return WeightUpdate(
            version=version,
            location=nccl_location(self._world_size, base64.b64encode(meeting_id).decode()),
            tensors=tuple(_specs(source)),
        )

    @contextlib.contextmanager
    def serving(self, update: WeightUpdate) -> Iterator[None]:
        """See `Transport.serving`. Raises WeightSyncError when the broadcast failed or does not end; its
        thread is then left behind, for a call of NCCL cannot be given up.
        """
        failures: list[Exception] = []
        thread = threading.Thread(
            target=self._broadcast,
            args=(update, torch.cuda.current_device(), failures),
            name="nccl-sender",
            daemon=True,
        )
        thread.start()
        yield
        thread.join(self._timeout_s)
        if thread.is_alive() or failures:
            reason = failures[0] if failures else f"not done within {self._timeout_s:g} s"
            raise WeightSyncError(
                f"weight version {update.version}: nccl broadcast: {reason}; rebuild the engines"
            )

    def close(self) -> None:
        """See `Transport.close`. Nothing is kept between updates."""

    def _broadcast(self, update: WeightUpdate, device: int, failures: list[Exception]) -> None:
        try:
            torch.cuda.set_device(device)
            world_size, meeting_id = nccl_meeting(update.location)
            group = PyNcclCommunicator.from_unique_id_bytes(
                base64.b64decode(meeting_id), rank=SENDER_RANK, world_size=world_size, device=device
            )
            try:
                packed_nccl_broadcast_producer(
                    iterator=self._announced(update),
                    group=group,
                    src=SENDER_RANK,
                    post_iter_func=lambda item: item[1].to(f"cuda:{device}"),
                    buffer_size_bytes=DEFAULT_PACKED_BUFFER_SIZE_BYTES,
                    num_buffers=DEFAULT_PACKED_NUM_BUFFERS,
                )
                torch.cuda.synchronize(device)
            finally:
                group.destroy()
        except (RuntimeError, ValueError) as error:  # NCCL's and torch's errors: told by the caller's thread
            failures.append(error)

    def _announced(self, update: WeightUpdate) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors in the order of the manifest, by which the receivers cut the stream."""
        assert self._source is not None, "pack comes first"
        specs = iter(update.tensors)
        for group in self._source.groups():
            for name, tensor in group.items():
                spec = next(specs, None)
                if spec is None or (spec.name, spec.shape) != (name, tuple(tensor.shape)):
                    raise ValueError(f"{name} {list(tensor.shape)} was gathered where {spec} was announced")
                yield name, tensor
        if (missing := next(specs, None)) is not None:
            raise ValueError(f"{missing.name} was announced and not gathered")


def _specs(source: ModuleSource) -> Iterator[TensorSpec]:
    offset = 0
    for name, shape in source.shapes().items():
        spec = TensorSpec(name=name, dtype=source.dtype, shape=shape, offset=offset, digest="")
        offset += num_bytes(spec)
        yield spec
