"""Inside a vLLM worker: takes weights from the shared file or over gloo, and says on demand which tensors the
worker really holds.

    init (layout) -> start -> update (fetch, verify, load) -> finish (rebuild tied heads, take the version)
    diagnose: fetch -> compare with every live layer (vllm_places) -> `Diagnosis`

Owns: verification before loading, and what vLLM's own reload leaves stale: the tied output head, packed
experts. Does not own: the control calls (vLLM), pausing and caches (vllm_engine), what is sent (weight_sync).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rollout.api import Diagnosis, TensorSpec, WeightUpdate
from rollout.vllm_places import diagnosis, takes_head
from rollout.weight_file import Layout, check_manifest, fetch_tensors, load_verified, nccl_meeting


@dataclass
class FetchInit(WeightTransferInitInfo):
    """What every update will have to hold; from the model directory, not from the trainer."""

    dtype: str
    shapes: dict[str, list[int]]
    timeout_s: float  # for the bytes of one update to arrive


@dataclass
class FetchUpdate(WeightTransferUpdateInfo):
    """A `WeightUpdate` as plain types, which is all that may cross a process boundary."""

    version: int
    location: str
    tensors: list[dict[str, Any]]
    receiver: int

    def record(self) -> WeightUpdate:
        """The typed record again."""
        specs = tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in self.tensors)
        return WeightUpdate(
            version=self.version, location=self.location, tensors=specs, receiver=self.receiver
        )


class FetchReceiver(WeightTransferEngine[FetchInit, FetchUpdate]):
    """Loads whole weight versions, from where the update says. Nothing of the model is touched before all
    checks have passed.
    """

    init_info_cls = FetchInit
    update_info_cls = FetchUpdate
    supports_draft_weight_update = False

    held_version = 0  # 0: the weights of the model directory
    _layout: Layout | None = None
    _timeout_s: float
    _arriving = 0

    def init_transfer_engine(self, init_info: FetchInit) -> None:
        """Remember what a whole update is."""
        shapes = {name: tuple(shape) for name, shape in init_info.shapes.items()}
        self._layout = Layout(dtype=init_info.dtype, shapes=shapes)
        self._timeout_s = init_info.timeout_s

    def start_weight_update(self) -> None:
        """Nothing yet: a refused update leaves the old weights whole."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Overrides the base class, which ends in an accelerator call that the CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FetchUpdate) -> None:
        """Verify, then load layer by layer. WeightSyncError when the update is refused."""
        assert self._layout is not None, "init_transfer_engine comes first"
        update = update_info.record()
        tensors = load_verified(update, self._layout, timeout_s=self._timeout_s)
        known = self._known(update)
        self._start_loading()
        model: Any = self.model  # torch types what a module may have as tensors
        model.load_weights((name, tensors[name]) for name in known)
        self._arriving = update.version

    def finish_weight_update(self) -> None:
        """Rebuild what is derived from the weights, and take the version."""
        finalize_layerwise_reload(self.model, self.model_config)
        self._rebuild_tied_heads()
        self.held_version = self._arriving

    def shutdown(self) -> None:
        """Nothing is kept open between updates."""

    def diagnose(self, update: WeightUpdate) -> Diagnosis:
        """See `RolloutEngine.diagnose`, for this worker."""
        assert self._layout is not None, "init_transfer_engine comes first"
        if self.parallel_config.world_size > 1:
            reason = f"all weights (split over {self.parallel_config.world_size} GPUs)"
            return Diagnosis(differing=(), not_compared=(reason,))
        tensors = fetch_tensors(update, timeout_s=self._timeout_s)
        with set_current_vllm_config(self.vllm_config):
            return diagnosis(self.model, {name: tensors[name] for name in self._known(update)})

    def _known(self, update: WeightUpdate) -> list[str]:
        """Names of `update` without those of tied heads that this architecture has no head for: gemma2 takes
        its embedding for one, and refuses the name. Their bytes come under the name of the embedding anyway.
        An nccl broadcast has no tied names.
        """
        assert self._layout is not None
        return [
            spec.name
            for spec in update.tensors
            if spec.name in self._layout.shapes or takes_head(self.model, spec.name, spec.shape)
        ]

    def _start_loading(self) -> None:
        """Make the model ready for whole new weights, layer by layer.

        On CPU a kernel of fused experts packs their weights when it is made, and vLLM makes it at the first
        load only: later loads would leave plain weights where packed ones are read, with no error. Without
        a kernel, vLLM makes it again. Kernels on a GPU read the weights that a load leaves.
        """
        if self.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, RoutedExperts):
                    module.quant_method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def _rebuild_tied_heads(self) -> None:
        """On CPU an output head keeps a packed copy of its weight. A tied head has no tensor of its own in a
        checkpoint, so a reload leaves that copy as it was: new body, old head, no error. Our sender names it,
        which is enough for the models we know; this is for all others.
        """
        modules = list(self.model.modules())
        embeddings = {
            id(module.weight)
            for module in modules
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
        }
        for module in modules:
            if isinstance(module, ParallelLMHead) and id(module.weight) in embeddings:
                method: Any = module.quant_method
                method.process_weights_after_loading(module)


class NcclReceiver(FetchReceiver):
    """Takes the packed broadcast of `vllm_sender` through vLLM's own nccl engine, joined for one update at a
    time. Diagnosis goes over gloo. NOT YET RUN: there was no GPU.
    """

    def receive_weights(self, update_info: FetchUpdate) -> None:
        """Check what is announced, join, load what arrives. WeightSyncError when the update is refused."""
        assert self._layout is not None, "init_transfer_engine comes first"
        update = update_info.record()
        check_manifest(update, self._layout)
        wire = NCCLWeightTransferEngine(self.config, self.vllm_config, self.device, self.model)
        wire.init_transfer_engine(self.nccl_group_of(update))
        try:
            self._start_loading()
            wire.receive_weights(nccl_tensors_of(update))
            torch.accelerator.synchronize()  # leaving the group aborts what is under way
        finally:
            wire.shutdown()
        self._arriving = update.version

    def nccl_group_of(self, update: WeightUpdate) -> NCCLWeightTransferInitInfo:
        """The group of an update: the sender is rank 0, then come the workers of each engine in turn."""
        world_size, meeting_id = nccl_meeting(update.location)
        return NCCLWeightTransferInitInfo(
            nccl_unique_id_b64=meeting_id,
            rank_offset=1 + update.receiver * self.parallel_config.world_size,
            world_size=world_size,
            packed=True,
        )


def nccl_tensors_of(update: WeightUpdate) -> NCCLWeightTransferUpdateInfo:
    """What is broadcast, in vLLM's words."""
    return NCCLWeightTransferUpdateInfo(
        names=[spec.name for spec in update.tensors],
        dtype_names=[spec.dtype for spec in update.tensors],
        shapes=[list(spec.shape) for spec in update.tensors],
    )


class WorkerExtension:
    """Methods that vLLM adds to its worker class, for `collective_rpc`."""

    weight_transfer_engine: FetchReceiver

    def rlhf_version(self) -> int:
        """The version this worker's weights have; answered by the process that decodes."""
        return self.weight_transfer_engine.held_version

    def rlhf_diagnose(self, update: dict[str, Any]) -> dict[str, Any]:
        """See `FetchReceiver.diagnose`; as plain types, which is all that may cross a process boundary."""
        receiver = self.weight_transfer_engine
        found = receiver.diagnose(receiver.parse_update_info(update).record())
        return dataclasses.asdict(found)
