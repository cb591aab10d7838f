"""A gate on two real ranks, of which rank 0 alone has the engine: who raises what."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from forks import RANKS
from inline import runtime_in
from ppo_inputs import EOS, Parts, invented, with_turn
from torch import multiprocessing
from wrong_engines import LaggingEngine, SkewedEngine

from rollout.api import RolloutRequest, Sampling, from_record, to_record
from rollout.config import EngineConfig
from rollout.errors import ParityError
from rollout.hf_engine import HFEngine
from rollout.loop import LoopThread
from stages.config.data import DataSource
from stages.config.ppo import PPOConfig
from stages.engines import EngineClient
from stages.rl.publish import Probe, Publisher, wired
from stages.training import ranks
from stages.training.distributed import Worker

CPU = torch.device("cpu")
CONFIG = PPOConfig(data=[DataSource(path="unused")], num_prompts=3, max_response_tokens=6, micro_batch_size=1)
ENGINE = EngineConfig(engine="hf", parity_num_prompts=2, parity_max_tokens=4)
PROMPTS = [(5, 9, 30), (44, 2), (61, 62, 63, 64)]


def raised_on_two(directory: Path, inputs: dict[str, Path]) -> list[dict[str, str]]:
    """{case: what was raised}, of each rank."""
    with RANKS.forking():
        multiprocessing.spawn(_process, args=(directory, inputs), nprocs=2)
    return [json.loads((directory / f"raised-{rank}.json").read_text()) for rank in range(2)]


def _process(rank: int, directory: Path, inputs: dict[str, Path]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", world_size=2, rank=rank)
    worker = Worker(rank=rank, world_size=2, device=CPU, runtime=runtime_in(directory / str(rank), "ppo"))
    parts = Parts(CONFIG, inputs, worker)
    with LoopThread() as loop:
        raised = _cases(parts, loop, inputs["policy"], directory)
    (directory / f"raised-{rank}.json").write_text(json.dumps(raised))
    ranks.barrier()
    dist.destroy_process_group()


def _cases(parts: Parts, loop: LoopThread, model_dir: Path, directory: Path) -> dict[str, str]:
    engine = None
    if ranks.is_main():
        opened = HFEngine.open(ENGINE, model_dir=model_dir, dtype="float32", max_model_len=64, name="engine")
        skewed = SkewedEngine(loop.run(opened, timeout_s=60, what="start"), error=0.2, num_tokens=1)
        engine = LaggingEngine(skewed, lag=1, directory=directory)
    loose = ENGINE.model_copy(update={"parity_max_abs_diff": 100.0})
    strict, lax = (_publisher(parts, engine, loop, config) for config in (ENGINE, loose))
    raised = {"start": _raised(lambda: strict.begin(0))}
    lax.begin(0)
    batch = _batch(parts, engine, loop)
    raised["replayed batch"] = str(strict.accepts_batch(0, batch))
    raised["batch"] = _raised(lambda: strict.check_batch(batch))
    with torch.no_grad():
        for parameter in parts.models.policy.model.parameters():
            parameter.mul_(1.01)
    raised["no update"] = _raised(lambda: lax.publish(has_moved=False))
    with torch.no_grad():
        for parameter in parts.models.policy.model.parameters():
            parameter.mul_(1.01)
    raised["update"] = _raised(lambda: lax.publish(has_moved=True))
    for publisher in (strict, lax):
        publisher.close()
    return raised


def _publisher(parts, engine, loop, config) -> Publisher:
    probe = Probe(prompts=PROMPTS, stop_token_ids=(EOS,), temperature=1.0, seed=7)
    client = EngineClient(engine, config, loop)
    sync, gate = wired(parts.models.policy, client, probe, dtype="float32", micro_batch_size=1, device=CPU)
    return Publisher(sync, gate, stage="ppo")


def _batch(parts: Parts, engine, loop: LoopThread):
    """Three rollouts, the same on both ranks, and what the ranks together say of them."""

    def drawn():
        sampling = Sampling(temperature=1.0, max_tokens=6, stop_token_ids=(EOS,), seed=0)
        requests = [
            RolloutRequest(
                request_id=f"step{index}", prompt_ids=prompt, sampling=replace(sampling, seed=index)
            )
            for index, prompt in enumerate(PROMPTS)
        ]
        rollouts = loop.run(engine.submit(requests), timeout_s=60, what="rollouts")
        return [to_record(rollout) for rollout in rollouts]

    rollouts = [from_record(record) for record in ranks.from_main(drawn)]
    trajectories = [
        invented(index, rollout.prompt_ids, rollout.response_ids) for index, rollout in enumerate(rollouts)
    ]
    sampled = [
        with_turn(trajectory, logprobs=rollout.logprobs)
        for trajectory, rollout in zip(trajectories, rollouts, strict=True)
    ]
    return parts.judged(sampled)


def _raised(call) -> str:
    try:
        call()
    except ParityError as error:
        return str(error)
    return "nothing"
