"""One worker and two: the same losses, the same whole models, on real ranks in actors of a real Ray."""

import json
from pathlib import Path

import pytest
from inline import run_recipe, runtime_in
from safetensors.torch import load_file

from rollout.config import EngineConfig
from stages.config.data import DataSource
from stages.config.model import ModelConfig
from stages.config.ppo import PPOConfig, PPOSettings
from stages.config.prepare import PrepareConfig, PrepareSettings
from stages.config.pretrain import PretrainConfig, PretrainSettings
from stages.config.reward import RewardConfig, RewardSettings
from stages.config.sft import SFTConfig, SFTSettings
from stages.prepare import run as run_prepare
from stages.training.metrics import read_steps

pytestmark = pytest.mark.ray

NOUNS = ["cat", "dog", "house", "tree", "river", "window", "garden", "teacher"]
FACTS = [(a, verb, b) for a in NOUNS for verb in ("sees", "likes", "finds") for b in NOUNS if a != b]
MODEL = ModelConfig(
    layers=2, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1, context_length=64
)
TRAINING = {
    "batch_size": 8,
    "micro_batch_size": 3,  # shares of four: packs of three and one
    "max_steps": 20,
    "lr": 1e-3,
    "log_every_steps": 1,
    "checkpoint_every_steps": 8,
}
PPO_STEPS = {  # three packs to an optimizer step: two for one worker, one and an empty one for the other
    "batch_size": 6,
    "micro_batch_size": 2,
    "max_steps": 5,
    "checkpoint_every_steps": 2,
    "value_lr": 3e-4,  # the value model starts far off: at 1e-3 rounding grows past 1e-5 within the 20 steps
}
HF = EngineConfig(engine="hf", parity_num_prompts=2, parity_max_tokens=4)
MAX_LOSS_DIFF = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[DataSource]]:
    directory = tmp_path_factory.mktemp("data")
    rows = {
        "text": [{"text": f"The {a} {verb} the {b}."} for a, verb, b in FACTS],
        "sft": [{"prompt": f"What {verb} the {b}?", "completion": f"The {a}."} for a, verb, b in FACTS],
        "pairs": [
            {"prompt": f"What {verb} the {b}?", "chosen": f"The {a} {verb} the {b}.", "rejected": a}
            for a, verb, b in FACTS
        ],
        "prompts": [{"prompt": f"What does the {a} {verb}?"} for a, verb, _ in FACTS],
    }
    for name, lines in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: [DataSource(path=str(directory / f"{name}.jsonl"))] for name in rows}


@pytest.fixture(scope="module")
def chain(data, tmp_path_factory) -> dict[str, Path]:
    """What each stage builds on, made by one worker each."""
    root = tmp_path_factory.mktemp("chain")
    prepare = PrepareSettings(
        seed=0,
        model=MODEL,
        prepare=PrepareConfig(data=data["text"], vocab_size=320, heldout_frac=0.1),
    )
    run_prepare(
        prepare,
        {},
        runtime_in(root / "prepare", "prepare").work_dir.with_name("out"),
        runtime_in(root / "prepare", "prepare"),
    )
    chain = {"prepare": root / "prepare" / "out"}
    for stage in ("pretrain", "sft", "reward", "ppo"):
        losses_of(stage, root, data, chain, num_workers=0)
        chain[stage] = root / f"{stage}-0" / "out"
    return chain


def losses_of(stage, root, data, chain, *, num_workers):
    """Run a stage; every logged line of it. No workers: in this process."""
    directory = root / f"{stage}-{num_workers}"
    runtime = runtime_in(directory, stage, num_workers=num_workers)
    shared = {"seed": 3, "model": MODEL}
    settings, needs = {
        "pretrain": lambda: (
            PretrainSettings(**shared, pretrain=PretrainConfig(**TRAINING)),
            {"corpus": "prepare"},
        ),
        "sft": lambda: (
            SFTSettings(**shared, sft=SFTConfig(data=data["sft"], **TRAINING)),
            {"start": "pretrain"},
        ),
        "reward": lambda: (
            RewardSettings(
                **shared,
                rollout=HF,
                reward=RewardConfig(
                    data=data["pairs"],
                    min_accuracy=0,
                    normaliser_prompts=6,
                    normaliser_max_response_tokens=6,
                    **TRAINING,
                ),
            ),
            {"start": "sft"},
        ),
        "ppo": lambda: (
            PPOSettings(
                **shared,
                rollout=HF,
                ppo=PPOConfig(
                    data=data["prompts"],
                    num_prompts=12,
                    max_response_tokens=6,
                    **{**TRAINING, **PPO_STEPS},
                ),
            ),
            {"policy": "sft", "reward_model": "reward"},
        ),
    }[stage]()
    given = {role: chain[key] for role, key in needs.items()}
    metrics = run_recipe(settings, given, directory / "out", runtime)
    return read_steps(directory / "work" / "metrics.jsonl"), metrics


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_pin_33_two_workers_train_with_the_losses_of_one(stage, chain, data, ray_cluster, tmp_path):
    two, _ = losses_of(stage, tmp_path, data, chain, num_workers=2)
    one = read_steps(chain[stage].parent / "work" / "metrics.jsonl")
    keys = ["ppo/policy_loss", "ppo/value_loss"] if stage == "ppo" else ["train/loss"]
    assert len(one) == len(two) == (5 if stage == "ppo" else 20)
    for key in keys:
        for a, b in zip(one, two, strict=True):
            assert abs(a[key] - b[key]) <= MAX_LOSS_DIFF * max(1.0, abs(a[key])), (key, a, b)
    whole, sharded = (
        load_file(path / "model.safetensors") for path in (chain[stage], tmp_path / f"{stage}-2" / "out")
    )
    assert {name: value.shape for name, value in whole.items()} == {
        name: value.shape for name, value in sharded.items()
    }
    assert max(float((whole[name] - sharded[name]).abs().max()) for name in whole) < 1e-3
