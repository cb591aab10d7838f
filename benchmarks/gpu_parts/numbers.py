"""Whether the numbers hold on this device: engine against trainer, policy against reference, saved against
loaded, and PPO's update.
"""

import asyncio
from pathlib import Path
from typing import Any

import torch

from gpu_parts.setting import VOCABULARY, Asked, Setting
from rollout.api import Rollout, RolloutRequest, Sampling
from rollout.config import EngineConfig
from rollout.engines import open_engine
from rollout.shared_memory import SHARED_MEMORY
from rollout.weight_file import WeightFileWriter, checkpoint_layout, load_verified
from rollout.weight_source import ModuleSource
from stages.config.data import DataSource
from stages.config.model import ModelConfig
from stages.config.ppo import PPOConfig, PPOSettings
from stages.config.sft import SFTConfig
from stages.rl.algorithms import algorithm_of
from stages.rl.experience import experiences_of
from stages.rl.roles import Judges, load_models
from stages.rl.trajectories import Trajectory, Turn
from stages.rl.update import Learner
from stages.training.checkpoint import Checkpoints
from stages.training.distributed import place
from stages.training.forwards import logprobs_in_packs
from stages.training.fsdp import Placed, frozen, trained
from stages.training.health import Health
from stages.training.models import (
    ScoreNormaliser,
    full_state,
    load_causal_lm,
    reward_from_causal_lm,
    save_model,
)
from stages.training.trainable import Outputs, Reads, TermLoss

MAX_DIFFERENCE, MAX_MEAN_RATIO = 1e-4, 1.05
"""`rollout.parity_max_abs_diff` (fp32) and `parity_max_mean_ratio` (bf16), as they are by default."""
NO_DATA = [DataSource(path="unused")]


def parity(setting: Setting) -> None:
    """The reference engine against the trainer, and a policy against its frozen copy, in both precisions."""
    directory = setting.directory("model")
    model = setting.fresh_model(setting.size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)  # fresh weights give flat distributions
    save_model(model, directory, full_state(model))
    del model
    for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        with setting.clean():
            _parity(setting, directory, precision, dtype)


def _parity(setting: Setting, directory: Path, precision: Any, dtype: str) -> None:
    worker = setting.worker("sft")
    policy = load_causal_lm(directory)
    place(policy, worker, precision=precision, trained=True)
    copy = frozen(load_causal_lm(directory), worker, precision=precision)
    rollouts = asyncio.run(_sampled(directory, dtype))
    by_policy, by_frozen = (
        logprobs_in_packs(
            model,
            [rollout.prompt_ids for rollout in rollouts],
            [rollout.response_ids for rollout in rollouts],
            temperature=1.0,
            micro_batch_size=4,
            device=setting.device,
        )
        for model in (Placed(policy), copy)
    )
    differences = torch.cat(
        [
            (logprobs_T - torch.tensor(rollout.logprobs)).abs()
            for logprobs_T, rollout in zip(by_policy, rollouts, strict=True)
        ]
    )
    largest, mean = float(differences.max()), float(differences.mean())
    holds = (
        largest <= MAX_DIFFERENCE if precision == "fp32" else float(differences.mean().exp()) < MAX_MEAN_RATIO
    )
    same = all(torch.equal(a, b) for a, b in zip(by_policy, by_frozen, strict=True))
    setting.say(
        "parity",
        precision=precision,
        max_nats=largest,
        mean_nats=mean,
        gate_holds=holds,
        policy_is_reference=same,
    )


async def _sampled(directory: Path, dtype: str) -> list[Rollout]:
    engine = await open_engine(
        EngineConfig(engine="hf", max_num_seqs=8),
        model_dir=directory,
        dtype=dtype,
        max_model_len=128,
        log_path=directory / "log",
    )
    requests = [
        RolloutRequest(
            request_id=str(index),
            prompt_ids=tuple(range(5, 15 + index)),
            sampling=Sampling(temperature=1.0, max_tokens=16, stop_token_ids=(), seed=index),
        )
        for index in range(4)
    ]
    rollouts = await engine.submit(requests)
    await engine.close()
    return rollouts


def state(setting: Setting) -> None:
    """A checkpoint gives back the weights and the next loss; seconds of what a sync by shared file does."""
    with setting.clean():
        _state(setting)


def _state(setting: Setting) -> None:
    worker, model = setting.worker("sft"), setting.fresh_model(setting.size)
    config = SFTConfig(data=NO_DATA, precision="bf16", warmup_frac=0)
    learner = trained(model, worker, config, lr=1e-4, max_steps=10)
    row = setting.row((9, 20), size=setting.size)
    asked = Asked.of(row, torch.arange(row.num_tokens - 1, device=setting.device))
    reads = Reads(logprobs=True, temperature=1.0)

    def loss_of(_: Asked, now: Outputs) -> TermLoss:
        assert now.logprobs_N is not None
        return TermLoss(loss=-now.logprobs_N.mean())

    def step(index: int) -> float:
        return learner.take_step(index, [asked], reads, loss_of, lambda *_: True).loss

    step(0)
    before = {name: tensor.clone() for name, tensor in full_state(model).items()}
    checkpoints = Checkpoints(worker.runtime.work_dir, keep=1)
    save_s = setting.once(lambda: checkpoints.save(1, {"model": learner.state()}, {}))
    loss = step(1)
    restore_s = setting.once(lambda: checkpoints.restore({"model": learner.state()}))
    restored = all(torch.equal(before[name], tensor) for name, tensor in full_state(model).items())
    same_loss = step(1) == loss
    sync = _sync_by_file(setting, model)
    setting.say(
        "state",
        model=setting.size,
        weights_restored=restored,
        same_next_loss=same_loss,
        save_s=round(save_s, 2),
        restore_s=round(restore_s, 2),
        **sync,
    )


def _sync_by_file(setting: Setting, model: Any) -> dict[str, float]:
    """GiB, and seconds to write, to verify, and to bring up again."""
    directory, path = setting.directory("saved"), SHARED_MEMORY / "rlhf-gpu-check.bin"
    save_model(model, directory, full_state(model))
    source, found = ModuleSource(model.inner, dtype="bfloat16"), {}

    def write() -> None:
        with WeightFileWriter(path) as file:
            for group in source.groups():
                for name, tensor in group.items():
                    file.add(name, tensor)
            for name, of in source.aliases().items():
                file.add_alias(name, of=of)
            found["update"] = file.finish(1)

    def verify() -> None:
        layout = checkpoint_layout(directory, dtype="bfloat16")
        found["tensors"] = load_verified(found["update"], layout, timeout_s=60)

    try:
        write_s, verify_s = setting.once(write), setting.once(verify)
        gib = sum(tensor.nbytes for tensor in found["tensors"].values()) / 2**30
        upload_s = setting.once(lambda: [tensor.to(setting.device) for tensor in found["tensors"].values()])
    finally:
        path.unlink(missing_ok=True)
    seconds = {"write_s": write_s, "verify_s": verify_s, "upload_s": upload_s}
    return {"sync_gib": round(gib, 3)} | {name: round(value, 2) for name, value in seconds.items()}


def ppo(setting: Setting) -> None:
    """Two steps of PPO's trainer on invented rollouts: before the first update KL and ratio are those of one
    model.
    """
    with setting.clean():
        _ppo(setting)


def _ppo(setting: Setting) -> None:
    num, prompt, response = (8, 6, 10) if setting.is_small else (64, 100, 256)
    config = PPOConfig(
        data=NO_DATA,
        precision="bf16",
        max_steps=2,
        num_prompts=num,
        batch_size=num // 2,
        micro_batch_size=min(8, num // 2),
        max_response_tokens=response,
        warmup_frac=0,
        num_epochs=1,
    )
    worker = setting.worker("ppo")
    settings = PPOSettings(
        seed=0, model=ModelConfig(context_length=prompt + response + 1), ppo=config, rollout=EngineConfig()
    )
    algorithm, inputs = algorithm_of(settings), _inputs(setting)
    models = load_models(algorithm, config, worker, policy_dir=inputs["sft"], reward_dir=inputs["reward"])
    judges = Judges(
        models=models,
        config=config,
        value_reads=algorithm.credit.reads,
        end_of_turn_id=2,
        stop_token_ids=(2,),
        device=setting.device,
    )
    health = Health(config.health, worker.runtime)
    learner = Learner(models.trained, algorithm.terms, config, seed=0, health=health)
    trajectories = _invented(setting, num, prompt, response)
    first: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for step in range(2):
        found: dict[str, Any] = {}

        def judge(found: dict[str, Any] = found) -> None:
            found["judged"] = judges.judge(trajectories)

        seconds["judge_s"] = setting.once(judge)
        batch = found["judged"]
        credited = algorithm.credit(batch, kl_coef=0.05)
        experiences = experiences_of(batch, credited, kl_coef=0.05, keeps_anchor=learner.keeps_anchor)

        def update(step: int = step, experiences: Any = experiences, found: dict[str, Any] = found) -> None:
            found["metrics"] = learner.update(step, experiences)

        seconds["update_s"] = setting.once(update)
        if step == 0:
            first = {"first_kl": float(batch.kl_B.mean()), "first_ratio": found["metrics"]["ppo/ratio_first"]}
    tokens = num * (prompt + response)
    setting.say(
        "ppo",
        model=setting.size,
        responses=num,
        tokens=tokens,
        **first,
        peak_gib=setting.peak_gib(),
        tokens_per_s=round(tokens / sum(seconds.values())),
        **{name: round(value, 3) for name, value in seconds.items()},
    )


def _inputs(setting: Setting) -> dict[str, Path]:
    """An sft model and a reward model, fresh."""
    inputs = {name: setting.directory(name) for name in ("sft", "reward")}
    model = setting.fresh_model(setting.size)
    save_model(model, inputs["sft"], full_state(model))
    del model
    reward = reward_from_causal_lm(inputs["sft"], pad_token_id=0)
    save_model(reward, inputs["reward"], full_state(reward))
    ScoreNormaliser(mean=0.0, std=1.0).save(inputs["reward"])
    return inputs


def _invented(setting: Setting, num: int, prompt: int, response: int) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, VOCABULARY[setting.size], (count,), generator=generator).tolist())

    return [
        Trajectory(
            id=str(index),
            prompt_index=index,
            place=index,
            sample=0,
            seed=index,
            turns=(
                Turn(
                    prompt_ids=ids(prompt),
                    response_ids=ids(response),
                    logprobs=(-1.0,) * response,
                    weight_versions=(0,) * response,
                    finish_reason="length",
                ),
            ),
            row={},
            scores={},
        )
        for index in range(num)
    ]
