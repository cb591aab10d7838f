"""The launcher of every training stage: the same recipe code in this process or in Ray actors, for 1 worker
and for N.

    stage task --launched(train)--> N workers in a placement group of our own --> rank 0's result

Owns: placement and its deadline, process groups, devices, thread counts, sharding. The stage task holds no
tensors.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from ipaddress import ip_address
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from rollout.config import EngineConfig
from rollout.foreign_environment import take_out
from rollout.ground.errors import (
    GO_ON,
    EnvironmentProblem,
    ExpectedError,
    ProcessDied,
    raise_expected,
    root_cause,
)
from stages.bundles import StageBundles, bundles_of, lacking
from stages.runtime import Runtime, hide_gpus, warnings_kept
from stages.training.models import CausalLM, Precision, TokenScorer, compute_head_in_fp32

Result = TypeVar("Result")

LOOPBACK = "127.0.0.1"
PEER_GRACE_S = 5.0
"""After a worker's failure its peers' collectives fail too: how long to wait for the one that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One training process."""

    rank: int
    world_size: int
    device: torch.device
    runtime: Runtime


@contextmanager
def launched(train: Callable[..., Result], runtime: Runtime) -> Iterator[Callable[..., Result]]:
    """Inside, calling what this yields runs `train(worker, **arguments)` on every worker of the stage. It
    returns rank 0's result.

    Raises what `train` raised (ExpectedError), or EnvironmentProblem when workers cannot be placed or die.
    Example: with launched(train, runtime) as call: metrics = call(settings=settings)
    """
    if runtime.executor == "inline":
        torch.set_num_threads(runtime.num_threads)
        _multiply_fp32_in_fp32()
        try:
            with warnings_kept(runtime):
                yield partial(train, Worker(rank=0, world_size=1, device=_device(runtime), runtime=runtime))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    else:
        with placed(runtime) as in_place:
            yield partial(_in_group, train, in_place)


@contextmanager
def placed(runtime: Runtime, rollout: EngineConfig | None = None) -> Iterator[Runtime]:
    """Inside, the stage has the place of all its workers, and of its engines if it opens any (`rollout`):
    granted together, within the placement deadline, or not at all. Raises EnvironmentProblem.

    Example: with placed(runtime, settings.engines) as in_place, launched(train, in_place) as call: call(...)
    """
    if runtime.executor == "inline" or runtime.group is not None:
        yield runtime
        return
    import ray

    bundles = bundles_of(runtime.stage, runtime.resources, rollout)
    group = _placed_group(bundles, runtime.placement_timeout_s)
    try:
        yield replace(runtime, group=group)
    finally:
        ray.util.remove_placement_group(group)


def place(model: CausalLM | TokenScorer, worker: Worker, *, precision: Precision, trained: bool) -> nn.Module:
    """The model on its device in its compute precision, sharded over the workers layer by layer (FSDP2).

    fp32 on one worker is the plain module. bf16 keeps fp32 masters and computes in a bf16 copy through
    `fully_shard`, also on a world of one, so that one worker and several run the same arithmetic. A frozen
    bf16 model on one worker is simply cast. Gradients are *summed* over the workers, not averaged: losses
    arrive divided by the counts of the whole step. The weights must be the same on every worker before.
    """
    if precision == "bf16" and isinstance(model, CausalLM):
        compute_head_in_fp32(model)
    if worker.world_size == 1 and (precision == "fp32" or not trained):
        model.to(worker.device)
        return model if precision == "fp32" else _with_bf16_parameters(model)
    _ensure_process_group(worker)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Inputs stay as the model computes them: some families hand fp32 rotary tables to their layers, and in
    # bf16 those would be other positions than those of the frozen copy and of the engine.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(worker.device.type, (worker.world_size,))
    for part in (*_layers(model), model):
        # Resharded also after a forward without backward: parameters() would be the compute copies until
        # then.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other way to a factor of 1
    return model.to(worker.device)  # the shards are there already; buffers may not be


def _layers(model: CausalLM | TokenScorer) -> list[nn.Module]:
    """The transformer blocks: what is gathered, computed with and let go again as one."""
    blocks = set(model.inner._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in blocks]


def _with_bf16_parameters(model: nn.Module) -> nn.Module:
    """Parameters cast, buffers not, as `fully_shard` does: rotary frequencies in bf16 would be other
    positions.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def worker_environment(runtime: Runtime) -> dict[str, str]:
    """Environment of a worker process: passive waiting, and all cores because trainer and engine alternate.

    Ray hands it on to the engines that the worker opens: what is meant for this process alone (its GPUs, its
    network interfaces) is set inside it.
    """
    threads = max(1, runtime.num_threads // runtime.resources.num_workers)
    return {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}


def _in_group(train: Callable[..., Result], runtime: Runtime, **arguments: Any) -> Result:
    import ray

    actors: list[Any] = []
    try:
        actors += _workers(runtime)
        timeout_s = runtime.placement_timeout_s
        nodes = ray.get([actor.node_address.remote() for actor in actors], timeout=timeout_s)
        host = LOOPBACK if len(set(nodes)) == 1 else nodes[0]
        address = ray.get(actors[0].listen.remote(host), timeout=timeout_s)
        calls = [
            actor.run.remote(train, runtime, rank, address, arguments) for rank, actor in enumerate(actors)
        ]
        return _first_rank_result(calls)
    except ray.exceptions.RayTaskError as error:
        raise_expected(error)
    except ray.exceptions.GetTimeoutError as error:
        raise EnvironmentProblem(
            f"{runtime.stage}: no worker answered within "
            f"{runtime.placement_timeout_s:g} s; see {runtime.log_dir}"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise ProcessDied(
            f"{runtime.stage}: a training worker died (out of memory?); see {runtime.log_dir}, then {GO_ON}"
        ) from error
    finally:
        for actor in actors:
            ray.kill(actor)


def _workers(runtime: Runtime) -> list[Any]:
    """The stage's actors by rank, each in its bundle."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    resources = runtime.resources
    return [
        ray.remote(_TrainingActor)
        .options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                runtime.group, placement_group_bundle_index=index
            ),
            runtime_env={"env_vars": worker_environment(runtime)},
        )
        .remote(has_gpu=bool(resources.num_gpus))
        for index in range(resources.num_workers)
    ]


def _first_rank_result(calls: Sequence[Any]) -> Any:
    """Rank 0's result once all are done. As soon as one fails, the failure that says most of those that
    follow within PEER_GRACE_S: an error meant for the user, else a death, else the first.
    """
    import ray

    pending = list(calls)
    while pending:
        (done,), pending = ray.wait(pending, num_returns=1)
        if (failure := _failure_of(done)) is not None:
            late, _ = (
                ray.wait(pending, num_returns=len(pending), timeout=PEER_GRACE_S) if pending else ([], [])
            )
            failures = [failure, *filter(None, map(_failure_of, late))]
            raise min(failures, key=_obscurity)
    return ray.get(calls[0])


def _failure_of(call: Any) -> Exception | None:
    import ray

    try:
        ray.get(call)
    except ray.exceptions.RayError as error:
        return error
    return None


def _obscurity(error: Exception) -> int:
    import ray

    if isinstance(root_cause(error), ExpectedError):
        return 0
    return 1 if isinstance(error, ray.exceptions.RayActorError) else 2


def _placed_group(bundles: StageBundles, timeout_s: float) -> Any:
    import ray

    group = ray.util.placement_group([dict(bundle) for bundle in bundles.all], strategy="PACK")
    if group.wait(timeout_s):
        return group
    ray.util.remove_placement_group(group)
    free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    never = lacking([bundles], nodes)
    raise EnvironmentProblem(
        f"{bundles}: no place within {timeout_s:g} s; "
        + (never.removeprefix(f"{bundles}: ") if never else f"the cluster has {free} free")
        + f" - lower resources.{bundles.stage} or add nodes"
    )


class _TrainingActor:
    """One worker process of a stage."""

    def __init__(self, *, has_gpu: bool) -> None:
        take_out(os.environ)  # that of another machine, on a cluster
        if not has_gpu:
            hide_gpus()
        _multiply_fp32_in_fp32()

    def node_address(self) -> str:
        """Address of this worker's node."""
        import ray

        return str(ray.util.get_node_ip_address())

    def listen(self, host: str) -> tuple[str, int]:
        """Open the process group's rendezvous, which asks nobody for a token, on that interface alone."""
        self._listener = socket.create_server((host, 0))
        return host, self._listener.getsockname()[1]

    def run(
        self,
        train: Callable[..., Result],
        runtime: Runtime,
        rank: int,
        address: tuple[str, int],
        arguments: dict[str, Any],
    ) -> Result:
        world_size = runtime.resources.num_workers
        worker = Worker(rank=rank, world_size=world_size, device=_device(runtime), runtime=runtime)
        _nccl_talks_through(self.node_address())
        with _exclusive(runtime, rank):
            if worker.world_size == 1:
                self._listener.close()
            else:
                _gloo_talks_through(LOOPBACK if address[0] == LOOPBACK else self.node_address())
                listener = self._listener.detach() if rank == 0 else None
                store = dist.TCPStore(*address, world_size, rank == 0, master_listen_fd=listener)
                _init_process_group(worker, store=store)
            with warnings_kept(runtime):
                return train(worker, **arguments)


def _gloo_talks_through(address: str) -> None:
    """Gloo looks up the host's name otherwise, which often resolves to a loopback address."""
    if (interface := _interface(address)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def _nccl_talks_through(address: str) -> None:
    """NCCL, by the address that other nodes know this one by: never loopback, although all workers may be
    here. The id of a weight sync's group holds an address of this process, and its engines may be elsewhere.
    An interface that the machine's owner has chosen stays. Where nodes are known by names, not by addresses,
    NCCL finds its interface itself.

    `=`: NCCL takes a bare name for the beginning of one, and eth1 for eth10 too.
    """
    if "NCCL_SOCKET_IFNAME" in os.environ or not _others_reach(address):
        return
    if (interface := _interface(address)) is not None:
        os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"


def _others_reach(address: str) -> bool:
    """Whether this is an IP address, and not that of the loopback. False for the name of a host."""
    try:
        return not ip_address(address).is_loopback
    except ValueError:
        return False


def _interface(address: str) -> str | None:
    """The network interface of this machine that has `address`."""
    for interface, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return interface
    return None


def _init_process_group(worker: Worker, **rendezvous: Any) -> None:
    """Gloo for what lies on the CPU (`ranks`), NCCL for what lies on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if worker.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=worker.runtime.collective_timeout_s)
    dist.init_process_group(
        backend, world_size=worker.world_size, rank=worker.rank, timeout=timeout, **rendezvous
    )


@contextmanager
def _exclusive(runtime: Runtime, rank: int) -> Iterator[None]:
    """One trainer at a time per work directory: after a kill, the last run's worker may live on for some
    seconds.
    """
    lock = FileLock(runtime.work_dir / f"trainer-{rank}.lock")
    try:
        lock.acquire(timeout=runtime.placement_timeout_s)
    except Timeout as error:
        raise EnvironmentProblem(
            f"{runtime.stage}: another process is still training in {runtime.work_dir}; end it and run again"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _multiply_fp32_in_fp32() -> None:
    """No TF32 in fp32 matrix products: with its 10 bits the parity gate's 1e-4 nats are out of reach.

    It is torch's default (2.13) unless TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set, as NVIDIA's containers do.
    Convolutions have TF32 by default (`torch.backends.cudnn.allow_tf32`); no model here has any.
    """
    torch.set_float32_matmul_precision("highest")


def _device(runtime: Runtime) -> torch.device:
    if not runtime.resources.num_gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"resources.{runtime.stage}.num_gpus is {runtime.resources.num_gpus:g}, "
            "but torch sees no GPU here"
        )
    return torch.device("cuda", 0)


def _ensure_process_group(worker: Worker) -> None:
    if not dist.is_initialized():
        assert worker.world_size == 1, "the launcher opens the group of several workers"
        _gloo_talks_through(LOOPBACK)
        _init_process_group(worker, store=dist.HashStore())
