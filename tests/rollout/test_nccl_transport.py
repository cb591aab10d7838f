"""The nccl transport as far as a machine without a GPU can tell: what is announced, who has which rank, what
is refused, and that nothing waits for ever. The broadcast itself has not run.
"""

import base64
import dataclasses
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from fakes import FakeEngine
from rigs import CONFIG
from transformers import AutoModelForCausalLM

from rollout import vllm_sender
from rollout.api import WeightUpdate
from rollout.errors import WeightSyncError
from rollout.pool import EnginePool
from rollout.vllm_receiver import FetchUpdate, NcclReceiver, nccl_tensors_of
from rollout.vllm_sender import NcclBroadcast
from rollout.weight_file import checkpoint_layout, nccl_meeting, update_bytes
from rollout.weight_source import ModuleSource

MEETING_ID = bytes(range(128))


@pytest.fixture
def no_gpu(monkeypatch):
    """NCCL and CUDA replaced where the sender calls them; the packed broadcast only drains its iterator."""
    sent = SimpleNamespace(tensors=[], groups=[], fails=None, hangs=threading.Event())
    sent.hangs.set()

    class Group:
        def destroy(self):
            sent.groups[-1]["destroyed"] = True

    def join(meeting_id, *, rank, world_size, device):
        sent.groups.append({"id": meeting_id, "rank": rank, "world_size": world_size, "destroyed": False})
        return Group()

    def broadcast(*, iterator, group, src, **_):
        sent.hangs.wait(60)
        if sent.fails is not None:
            raise sent.fails
        sent.tensors = [(name, tensor.clone()) for name, tensor in iterator]

    library = SimpleNamespace(ncclGetUniqueId=lambda: SimpleNamespace(internal=MEETING_ID))
    monkeypatch.setattr(vllm_sender, "NCCLLibrary", lambda: library)
    monkeypatch.setattr(vllm_sender.PyNcclCommunicator, "from_unique_id_bytes", join)
    monkeypatch.setattr(vllm_sender, "packed_nccl_broadcast_producer", broadcast)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    return sent


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model_dir(request, tied_model_dir, untied_model_dir):
    return tied_model_dir if request.param else untied_model_dir


@pytest.fixture
def source(model_dir) -> ModuleSource:
    return ModuleSource(AutoModelForCausalLM.from_pretrained(model_dir), dtype="bfloat16")


def sender(**changes) -> NcclBroadcast:
    return NcclBroadcast(CONFIG.model_copy(update={"sync": "nccl", "num_engines": 4, **changes}))


def receiver(model_dir, *, tensor_parallel_size: int = 1) -> NcclReceiver:
    made = NcclReceiver.__new__(NcclReceiver)  # its base class wants a loaded model
    made.parallel_config = SimpleNamespace(world_size=tensor_parallel_size)
    made._layout = checkpoint_layout(model_dir, dtype="bfloat16")
    return made


def test_what_is_announced_is_what_a_gather_would_give(source):
    whole = {name: tensor for group in source.groups() for name, tensor in group.items()}
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in whole.items()}
    assert list(source.shapes()) == list(whole), "in the same order: the stream is cut by it"


def test_an_update_names_its_group_and_every_tensor(no_gpu, source, model_dir):
    update = sender(tensor_parallel_size=2).pack(source, version=7)
    assert update.version == 7
    assert nccl_meeting(update.location) == (1 + 4 * 2, base64.b64encode(MEETING_ID).decode())
    assert {spec.name: spec.shape for spec in update.tensors} == checkpoint_layout(
        model_dir, dtype="bfloat16"
    ).shapes
    assert update_bytes(update) == 2 * sum(parameter.numel() for parameter in source._model.parameters())


def test_each_engine_of_a_pool_is_told_which_it_is():
    import asyncio

    async def scenario():
        engines = [FakeEngine() for _ in range(3)]
        pool = EnginePool(engines)
        await pool.pause()
        await pool.update(WeightUpdate(version=4, location="nccl:4:x", tensors=()))
        return [engine.updates[0].receiver for engine in engines]

    assert asyncio.run(scenario()) == [0, 1, 2]


@pytest.mark.parametrize("tensor_parallel_size", [1, 2, 4])
def test_every_gpu_of_every_engine_has_a_rank_of_its_own(no_gpu, source, model_dir, tensor_parallel_size):
    """vLLM adds a worker's own rank to the offset of its engine."""
    update = sender(tensor_parallel_size=tensor_parallel_size).pack(source, version=1)
    ranks = {vllm_sender.SENDER_RANK}
    for engine in range(4):
        group = receiver(model_dir, tensor_parallel_size=tensor_parallel_size).nccl_group_of(
            dataclasses.replace(update, receiver=engine)
        )
        assert group.nccl_unique_id_bytes == MEETING_ID and group.packed
        ranks |= {group.rank_offset + worker for worker in range(tensor_parallel_size)}
    assert ranks == set(range(group.world_size)), "none twice, none missing"


def test_an_update_survives_the_way_to_a_worker_as_plain_types(no_gpu, source):
    update = dataclasses.replace(sender().pack(source, version=1), receiver=2)
    assert FetchUpdate(**dataclasses.asdict(update)).record() == update
    announced = nccl_tensors_of(update)
    assert len(announced.names) == len(announced.shapes) == len(update.tensors)
    assert set(announced.dtype_names) == {"bfloat16"}


def test_a_manifest_that_is_not_whole_is_refused_before_the_worker_joins(no_gpu, source, model_dir):
    update = sender().pack(source, version=1)
    lacking = dataclasses.replace(update, tensors=update.tensors[1:])
    payload = FetchUpdate(**dataclasses.asdict(lacking))
    with pytest.raises(WeightSyncError, match=f"{update.tensors[0].name}: missing"):
        receiver(model_dir).receive_weights(payload)
    assert no_gpu.groups == []


def test_a_broadcast_sends_every_tensor_once_and_leaves_its_group(no_gpu, source):
    transport = sender()
    update = transport.pack(source, version=1)
    with transport.serving(update):
        pass
    assert [name for name, _ in no_gpu.tensors] == [spec.name for spec in update.tensors]
    expected = {name: tensor for group in source.groups() for name, tensor in group.items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in no_gpu.tensors)
    assert no_gpu.groups == [{"id": MEETING_ID, "rank": 0, "world_size": 5, "destroyed": True}]


def test_a_failed_broadcast_is_a_failed_sync(no_gpu, source):
    no_gpu.fails = RuntimeError("NCCL error: unhandled system error")
    transport = sender()
    with (
        pytest.raises(WeightSyncError, match=r"nccl broadcast: NCCL error.*rebuild"),
        transport.serving(transport.pack(source, version=1)),
    ):
        pass
    assert no_gpu.groups[0]["destroyed"]


def test_a_broadcast_that_hangs_is_a_failed_sync_at_the_deadline(no_gpu, source):
    no_gpu.hangs.clear()
    transport = sender(sync_timeout_s=0.5)
    started = time.monotonic()
    with (
        pytest.raises(WeightSyncError, match=r"not done within 0\.5 s"),
        transport.serving(transport.pack(source, version=1)),
    ):
        pass
    assert time.monotonic() - started < 20
    no_gpu.hangs.set()
    for thread in threading.enumerate():
        if thread.name == "nccl-sender":
            thread.join()


def test_weights_that_changed_their_shape_since_they_were_announced_are_not_sent(no_gpu, source):
    transport = sender()
    update = transport.pack(source, version=1)
    wrong = dataclasses.replace(update.tensors[-1], shape=(1, 2, 3))
    with (
        pytest.raises(WeightSyncError, match="was gathered where"),
        transport.serving(dataclasses.replace(update, tensors=(*update.tensors[:-1], wrong))),
    ):
        pass


def test_vllm_knows_a_receiver_for_every_transport():
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from rollout import vllm_receiver
    from rollout.vllm_plugin import RECEIVERS, backend, register

    register()
    for sync, name in RECEIVERS.items():
        loader = WeightTransferEngineFactory._registry[backend(sync)]
        assert loader() is getattr(vllm_receiver, name)
