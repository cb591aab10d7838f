"""One PPO batch judged, assembled and differentiated, on one rank or on two real ones."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from forks import RANKS
from inline import runtime_in
from ppo_inputs import EOS, some_rollouts
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor

from stages.config.data import DataSource
from stages.config.ppo import PPOConfig
from stages.data.experience import Experience, assemble, pack_rollouts
from stages.training import ranks
from stages.training.distributed import Worker
from stages.training.fsdp import Trained
from stages.training.health import Health
from stages.training.ppo_models import judge_all, load_ppo_models
from stages.training.ppo_update import Learner

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
        models = load_ppo_models(config, inputs, worker)
        packs = pack_rollouts(some_rollouts(), micro_batch_size=2, max_length=6, device=CPU)
        judgements = judge_all(models, packs, config, end_of_turn_id=EOS, stop_token_ids=(EOS,))
        experiences, summary = assemble(packs, judgements, config, kl_coef=0.05)
        found["advantages"] = torch.cat([item.advantages_BT for item in experiences])
        found["returns"] = torch.cat([item.returns_BT for item in experiences])
        found["score"] = torch.tensor(summary["rollout/score"])
        learner = _Differentiated(
            models,
            config,
            correction=config.correction(max_staleness=0),
            seed=0,
            health=Health(config.health, worker.runtime),
        )
        learner.update(0, experiences, kl_coef=0.05)
        found |= {f"{aggregation}/{name}": gradient for name, gradient in learner.gradients.items()}
    return found


class _Differentiated(Learner):
    """Takes no step: keeps the gradients of the first one."""

    def update(self, step: int, experiences: list[Experience], *, kl_coef: float) -> dict[str, float]:
        self.gradients: dict[str, Tensor] = {}
        moved = [replace(item, anchor_logprobs_BT=item.anchor_logprobs_BT - 0.05) for item in experiences]
        for name, model in self.trained.items():
            model.take_step = self._keeping(name, model)  # type: ignore[method-assign]
        return super().update(step, moved, kl_coef=kl_coef)

    def _keeping(self, name: str, model: Trained):
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
