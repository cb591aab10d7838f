"""A small mixture of experts from scratch: described by `model:`, balanced in training, through the chain."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_runs import CONFIG, STAGES, rlhf, summary_of
from inline import run_recipe, runtime_in, worker_in
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rollout.config import EngineConfig
from stages import pretrain
from stages.config.data import DataSource
from stages.config.model import ModelConfig
from stages.config.ppo import PPOConfig, PPOSettings
from stages.config.prepare import PrepareConfig, PrepareSettings
from stages.config.pretrain import PretrainConfig, PretrainSettings
from stages.config.reward import RewardConfig, RewardSettings
from stages.config.sft import SFTConfig, SFTSettings
from stages.data.corpus.shards import TokenShards
from stages.errors import ModelError
from stages.training.fsdp import outputs_of
from stages.training.metrics import read_steps
from stages.training.models import build_causal_lm
from stages.training.trainable import Reads

NOUNS = ["cat", "dog", "house", "tree", "river", "window", "garden", "teacher"]
FACTS = [(a, verb, b) for a in NOUNS for verb in ("sees", "likes", "finds") for b in NOUNS if a != b]
SIZES = {
    "layers": 2,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_kv_heads": 1,
    "context_length": 64,
}
MIXTURE = ModelConfig(**SIZES, num_experts=4, num_experts_per_tok=2)
DENSE = ModelConfig(**SIZES)
STEPS = {
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_steps": 6,
    "log_every_steps": 1,
    "checkpoint_every_steps": 4,
}
HF = EngineConfig(engine="hf", parity_num_prompts=2, parity_max_tokens=4)
BALANCE = {"train/router_aux_loss", "train/router_max_load", "train/router_dead_experts"}


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
def prepared(data, tmp_path_factory) -> Path:
    config = PrepareConfig(data=data["text"], vocab_size=320, heldout_frac=0.1, shard_tokens=1024)
    return ran(PrepareSettings(seed=1, model=MIXTURE, prepare=config), {}, tmp_path_factory.mktemp("p"))


def ran(settings, inputs: dict[str, Path], directory: Path, *, num_workers: int = 0) -> Path:
    """The stage's model directory; its log is in the work directory beside. No workers: in this process."""
    (stage,) = settings.model_fields_set - {"seed", "model", "rollout"}
    run_recipe(settings, inputs, directory / "out", runtime_in(directory, stage, num_workers=num_workers))
    return directory / "out"


def lines_of(model_dir: Path) -> list[dict]:
    return read_steps(model_dir.parent / "work" / "metrics.jsonl")


def pretrain_settings(model: ModelConfig = MIXTURE, **changes) -> PretrainSettings:
    return PretrainSettings(seed=1, model=model, pretrain=PretrainConfig(**STEPS | changes))


@pytest.fixture(scope="module")
def base(prepared, tmp_path_factory) -> Path:
    return ran(pretrain_settings(), {"corpus": prepared}, tmp_path_factory.mktemp("pretrain"))


def sft_settings(data, model: ModelConfig = MIXTURE, **changes) -> SFTSettings:
    return SFTSettings(seed=1, model=model, sft=SFTConfig(data=data["sft"], **STEPS | changes))


def test_a_mixture_from_scratch_is_a_llama_whose_mlps_are_experts():
    torch.manual_seed(0)
    mixture = build_causal_lm(MIXTURE, vocab_size=320, eos_token_id=2, pad_token_id=0).inner
    dense = build_causal_lm(DENSE, vocab_size=320, eos_token_id=2, pad_token_id=0).inner
    sizes, dense_sizes = (
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if ".mlp." not in name}
        for model in (mixture, dense)
    )
    assert sizes == dense_sizes
    assert tuple(mixture.model.layers[0].mlp.gate.weight.shape) == (4, 64)
    assert tuple(mixture.model.layers[0].mlp.experts.gate_up_proj.shape) == (4, 2 * 48, 64)
    assert mixture.config.num_experts_per_tok == 2 and mixture.config.tie_word_embeddings


def test_pretrain_balances_a_mixture_from_scratch_by_itself_and_logs_how_balanced_it_is(base):
    lines = lines_of(base)
    assert len(lines) == 6 and all(line.keys() >= BALANCE for line in lines)
    assert all(1.9 < line["train/router_aux_loss"] < 4 for line in lines)
    assert all(1 <= line["train/router_max_load"] <= 2 for line in lines)
    assert all(line["train/router_dead_experts"] in range(2 * 4) for line in lines)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.1
    model, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert model.config.model_type == "mixtral" and not info["missing_keys"] and not info["unexpected_keys"]


def test_the_loss_of_a_step_has_the_balance_loss_in_it_times_its_coefficient(prepared, base, tmp_path):
    """The first step, before any update: the same weights and rows, three coefficients."""
    first = {0.01: lines_of(base)[0]}
    for coef in (0.0, 0.5):
        settings = pretrain_settings(router_aux_loss_coef=coef, max_steps=1)
        first[coef] = lines_of(ran(settings, {"corpus": prepared}, tmp_path / str(coef)))[0]
    balance = first[0.0]["train/router_aux_loss"]
    for coef, line in first.items():
        assert line["train/router_aux_loss"] == balance
        assert line["train/loss"] == pytest.approx(first[0.0]["train/loss"] + coef * balance, abs=1e-6)


def test_sft_takes_no_coefficient_from_the_models_own_config(base, data, tmp_path):
    config = json.loads((base / "config.json").read_text())
    assert config["router_aux_loss_coef"] > 0
    (line,) = lines_of(ran(sft_settings(data, max_steps=1), {"start": base}, tmp_path / "default"))
    (off,) = lines_of(
        ran(
            sft_settings(data, max_steps=1, router_aux_loss_coef=0.0),
            {"start": base},
            tmp_path / "off",
        )
    )
    assert line["train/loss"] == off["train/loss"]
    assert line["train/router_aux_loss"] == off["train/router_aux_loss"]


def test_a_coefficient_for_a_dense_model_is_refused_before_the_first_step(prepared, data, tmp_path):
    dense = ran(pretrain_settings(DENSE, max_steps=1), {"corpus": prepared}, tmp_path / "dense")
    assert not BALANCE.intersection(*lines_of(dense))
    with pytest.raises(ModelError, match=r"^sft\.router_aux_loss_coef: .* set 0$"):
        ran(
            sft_settings(data, DENSE, router_aux_loss_coef=0.01),
            {"start": dense},
            tmp_path / "sft",
        )


def test_ranks_share_a_steps_balance_loss_out_by_tokens(prepared, tmp_path):
    """Two ranks with the micro-batches of one: shares add up to one, and so do the losses."""
    shards = TokenShards(prepared)
    worker = worker_in(tmp_path, "pretrain")
    torch.manual_seed(0)
    model = build_causal_lm(MIXTURE, vocab_size=320, eos_token_id=2, pad_token_id=0)

    def loss_of(rows: pretrain.Rows, router_coef: float) -> torch.Tensor:
        now = outputs_of(model, rows, Reads(logprobs=True, router_loss=True, temperature=1.0))
        return pretrain._loss(rows, now, router_coef=router_coef).loss

    def step_of(rank: int, world_size: int) -> list[pretrain.Rows]:
        return pretrain._micro_batches(shards, range(7), 2, replace(worker, rank=rank, world_size=world_size))

    ranks = [step_of(rank, 2) for rank in (0, 1)]
    assert sum(rows.share_of_tokens for rank in ranks for rows in rank) == pytest.approx(1)
    losses = [loss_of(rows, 0.5) for rank in ranks for rows in rank]
    rows = [shards.row(index) for index in range(7)]
    parts = [rows[0:2], rows[2:3], rows[3:5], rows[5:7]]  # ranks of 3 and 4 rows, 2 to a forward
    num_targets = sum(int(row.is_target.sum()) for row in rows)
    num_tokens = sum(len(row.ids) for row in rows)
    wanted = 0.0
    for part in parts:
        whole = pretrain._end_to_end(part, num_targets, num_tokens, worker.device)
        wanted += loss_of(whole, 0.0).item()
        aux = model.inner(**whole.row.model_inputs(), output_router_logits=True).aux_loss.item()
        wanted += 0.5 * sum(len(row.ids) for row in part) / num_tokens * aux
    assert torch.stack(losses).sum().item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_train_the_mixture_of_one_with_the_same_micro_batches(prepared, ray_cluster, tmp_path):
    one, two = (
        lines_of(
            ran(
                pretrain_settings(router_aux_loss_coef=0.1),
                {"corpus": prepared},
                tmp_path / str(num_workers),
                num_workers=num_workers,
            )
        )
        for num_workers in (1, 2)
    )
    for line, other in zip(one, two, strict=True):
        for key in ("train/loss", "train/router_aux_loss", "train/router_max_load"):
            assert line[key] == pytest.approx(other[key], abs=1e-5), key


def test_a_mixture_goes_through_sft_reward_and_ppo_on_the_reference_engine(base, data, tmp_path):
    tuned = ran(sft_settings(data, router_aux_loss_coef=0.01), {"start": base}, tmp_path / "sft")
    assert all(line.keys() >= BALANCE for line in lines_of(tuned))
    options = {
        "heldout_frac": 0.3,
        "min_accuracy": 0.0,
        "normaliser_prompts": 8,
        "normaliser_max_response_tokens": 6,
    }
    config = RewardConfig(data=data["pairs"], **STEPS | options)
    settings = RewardSettings(seed=1, model=MIXTURE, reward=config, rollout=HF)
    rewarded = ran(settings, {"start": tuned}, tmp_path / "reward")
    scorer = AutoModelForSequenceClassification.from_pretrained(rewarded)
    assert type(scorer).__name__ == "MixtralForSequenceClassification"
    config = PPOConfig(
        data=data["prompts"], **STEPS | {"max_steps": 2, "num_prompts": 8}, max_response_tokens=6
    )
    settings = PPOSettings(seed=1, model=MIXTURE, ppo=config, rollout=HF)
    improved = ran(settings, {"policy": tuned, "reward_model": rewarded}, tmp_path / "ppo")
    assert all(line["rollout/engine_max_abs_diff"] <= 1e-5 for line in lines_of(improved))
    before, after = (
        AutoModelForCausalLM.from_pretrained(directory).model.layers[0].mlp.experts.down_proj
        for directory in (tuned, improved)
    )
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_the_whole_chain_runs_with_a_mixture_on_ray_and_vllm(tmp_path):
    """What vLLM's fused experts answer after a sync is what the trainer computes, to the gate's limit."""
    text = CONFIG.replace("num_kv_heads: 1}", "num_kv_heads: 1, num_experts: 4}")
    assert text != CONFIG
    (tmp_path / "tiny.yaml").write_text(text)
    result = rlhf(tmp_path, "run", "tiny.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = summary_of(tmp_path)
    assert list(summary) == STAGES
    metrics = summary["ppo"]["metrics"]
    assert metrics["version_final"] == 2
    assert metrics["parity_max_abs_diff"] <= 1e-4 and metrics["engine_max_abs_diff"] <= 1e-4
    line = read_steps(tmp_path / "outputs/runs/tiny/pretrain/metrics.jsonl")[-1]
    assert line.keys() >= BALANCE


def test_the_number_of_chosen_experts_is_2_where_it_is_not_stated_and_named_as_such():
    assert ModelConfig(**SIZES).identity()["num_experts_per_tok"] == 2
    stated, filled_in = (
        ModelConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
        ModelConfig(**SIZES, num_experts=4),
    )
    assert stated.identity() == filled_in.identity()
    assert ModelConfig(**SIZES, num_experts=4, num_experts_per_tok=1).num_chosen_experts == 1
