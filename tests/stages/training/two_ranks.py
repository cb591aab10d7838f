"""One PPO batch judged, assembled and differentiated, on one rank or on two real ones."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from forks import RANKS
from inline import runtime_in
from ppo_inputs import Parts, joined
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor

from stages.config.data import DataSource
from stages.config.ppo import PPOConfig
from stages.training import ranks
from stages.training.distributed import Worker
from stages.training.fsdp import Trained

AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant")
CPU = torch.device("cpu")
CONFIG = PPOConfig(
    data=[DataSource(path="unused")],
    max_steps=3,
    num_prompts=8,
    batch_size=6,  # three packs to a step, then one: never evenly many for two ranks
    micro_batch_size=2,
    max_response_tokens=6,
    num_epochs=1,
    max_grad_norm=1e9,
    truncation="mask",  # some sequences leave the count
    warmup_frac=0.0,
)


def measure(worker: Worker, inputs: dict[str, Path]) -> dict[str, Tensor]:
    """Advantages and returns of the batch, and for every aggregation the gradients of its first step."""
    found: dict[str, Tensor] = {}
    for aggregation in AGGREGATIONS:
        config = CONFIG.model_copy(update={"loss_aggregation": aggregation})
        parts = Parts(config, inputs, worker)
        batch = parts.judged()
        experiences = parts.experiences(batch)
        found["advantages"] = joined(experiences, "advantages_BT")
        found["returns"] = joined(experiences, "returns_BT")
        found["score"] = torch.tensor(parts.metrics(batch)["rollout/score"])
        kept = _Kept()
        for role, model in parts.models.trained.items():
            model.take_step = kept.keeping(role, model)  # type: ignore[method-assign]
        moved = [replace(item, anchor_logprobs_BT=item.anchor_logprobs_BT - 0.05) for item in experiences]
        parts.learner.update(0, moved)
        found |= {f"{aggregation}/{name}": gradient for name, gradient in kept.gradients.items()}
    return found


class _Kept:
    """The gradients of the first step of each model; no step is taken."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def keeping(self, name: str, model: Trained):
        take_step = model.take_step

        def keep(*arguments):
            result = take_step(*arguments[:4], lambda *_: False)
            parameters = model.model.parameters()
            whole = torch.cat([_whole(p.grad).flatten() for p in parameters if p.grad is not None])
            self.gradients.setdefault(name, whole)
            self.gradients.setdefault(f"{name} loss", torch.tensor(result.loss))
            return replace(result, taken=True)

        return keep


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def measure_on_two(directory: Path, inputs: dict[str, Path]) -> dict[str, Tensor]:
    """`measure` in two processes; what rank 0 found."""
    with RANKS.forking():
        multiprocessing.spawn(_process, args=(directory, inputs), nprocs=2)
    return torch.load(directory / "found.pt", weights_only=True)


def _process(rank: int, directory: Path, inputs: dict[str, Path]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", world_size=2, rank=rank)
    worker = Worker(rank=rank, world_size=2, device=CPU, runtime=runtime_in(directory / str(rank), "ppo"))
    found = measure(worker, inputs)
    if ranks.is_main():
        torch.save(found, directory / "found.pt")
    ranks.barrier()
    dist.destroy_process_group()
