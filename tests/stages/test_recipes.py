"""The recipes one after another on a tiny model, without Ray: what they write, count, refuse and resume."""

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from blake3 import blake3
from inline import run_recipe, runtime_in
from plain_models import take_step
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rollout.api import Rollout
from rollout.config import EngineConfig
from stages import evaluate, pretrain, reward, sft
from stages.config.data import DataSource
from stages.config.evaluate import EvaluateConfig, EvaluateSettings
from stages.config.model import ModelConfig
from stages.config.ppo import PPOConfig, PPOSettings
from stages.config.prepare import PrepareConfig, PrepareSettings
from stages.config.pretrain import PretrainConfig, PretrainSettings
from stages.config.reward import RewardConfig, RewardSettings
from stages.config.score import ScoreFunction
from stages.config.sft import SFTConfig, SFTSettings
from stages.data.batches import BatchOrder
from stages.data.chat.ids import PairIds
from stages.data.chat.tokenizer import ChatTokenizer
from stages.data.packing import pack
from stages.data.reading.readers import read_prompts
from stages.data.reading.records import Message, Prompt
from stages.errors import DataError, ModelError, TrainingStopped
from stages.rl.source import prompts_of
from stages.training.forwards import sequence_scores
from stages.training.fsdp import Placed
from stages.training.metrics import read_steps
from stages.training.models import freeze, load_reward_model
from stages.training.optimize import Optimizer, Tally
from stages.training.supervised import Supervised
from stages.training.trainable import Outputs, Reads

NOUNS = ["cat", "dog", "house", "tree", "river", "window", "garden", "teacher"]
VERBS = ["sees", "likes", "finds"]
FACTS = [(a, verb, b) for a in NOUNS for verb in VERBS for b in NOUNS if a != b]
MODEL = ModelConfig(
    layers=1, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1, context_length=64
)
STEPS = {
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_steps": 6,
    "log_every_steps": 1,
    "checkpoint_every_steps": 2,
}
HF = EngineConfig(engine="hf", parity_num_prompts=2, parity_max_tokens=4)
SCORE = """
def score(prompt, response, row):
    return {"score": len(response) % 5 / 4, "even": 1.0 - len(response) % 2}
"""


def written(path: Path, rows: list[dict]) -> list[DataSource]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [DataSource(path=str(path))]


def pair_of(a: str, verb: str, b: str) -> dict:
    """The chosen response is always the longer one."""
    return {
        "prompt": f"What {verb} the {b}?",
        "chosen": f"The {a} {verb} the {b}.",
        "rejected": a,
        "verb": verb,
    }


@dataclass
class Chain:
    """Directories and metrics of the stages that have run, by name."""

    root: Path
    outputs: dict[str, Path] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(self, stage, settings, *, inputs: Mapping[str, str] = MappingProxyType({})):
        directory = self.root / stage
        runtime = runtime_in(directory, stage)
        given = self.given(inputs)
        self.metrics[stage] = run_recipe(settings, given, directory / "out", runtime)
        self.outputs[stage] = directory / "out"

    def given(self, inputs: Mapping[str, str]) -> dict[str, Path]:
        """Directories by what a recipe calls them. `inputs`: role -> stage."""
        return {role: self.outputs[stage] for role, stage in inputs.items()}

    def chat(self, stage: str) -> ChatTokenizer:
        return ChatTokenizer.load(self.outputs[stage])


def pretrain_settings(**changes) -> PretrainSettings:
    return PretrainSettings(seed=1, model=MODEL, pretrain=PretrainConfig(**STEPS | changes))


def sft_settings(data: Path, **changes) -> SFTSettings:
    rows = [
        {"prompt": f"What {verb} the {b}?", "completion": f"The {a} {verb} it."} for a, verb, b in FACTS[:40]
    ]
    config = SFTConfig(data=written(data / "sft.jsonl", rows), **STEPS | changes)
    return SFTSettings(seed=1, model=MODEL, sft=config)


def reward_settings(data: Path, *, rows=None, context_length=64, **changes) -> RewardSettings:
    rows = [pair_of(*fact) for fact in FACTS[:60]] if rows is None else rows
    options = {
        "heldout_frac": 0.3,
        "min_accuracy": 0.0,
        "normaliser_prompts": 8,
        "normaliser_max_response_tokens": None if "init_from" in changes else 6,
    }
    config = RewardConfig(data=written(data / "pairs.jsonl", rows), **STEPS | options | changes)
    model = MODEL.model_copy(update={"context_length": context_length})
    return RewardSettings(seed=1, model=model, reward=config, rollout=HF)


def prepare_settings(data: Path) -> PrepareSettings:
    texts = [{"text": f"The {a} {verb} the {b}. It is {len(a)} o'clock."} for a, verb, b in FACTS]
    config = PrepareConfig(
        data=written(data / "corpus.jsonl", texts), vocab_size=320, heldout_frac=0.1, shard_tokens=1024
    )
    return PrepareSettings(seed=1, model=MODEL, prepare=config)


def evaluate_settings(data: Path) -> EvaluateSettings:
    (data / "score.py").write_text(SCORE)
    prompts = written(data / "prompts.jsonl", [{"prompt": f"Who likes the {noun}?"} for noun in NOUNS])
    score = ScoreFunction(path=data / "score.py")
    config = EvaluateConfig(prompts=prompts, score=score, max_prompts=6, max_response_tokens=6)
    return EvaluateSettings(seed=1, model=MODEL, evaluate=config, rollout=HF)


EVALUATED = {
    "corpus": "prepare",
    "base": "pretrain",
    "sft": "sft",
    "reward_model": "reward",
    "ppo": "ppo",
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    """prepare, pretrain, sft, reward and evaluate; the sft model stands for ppo's too."""
    chain = Chain(root=tmp_path_factory.mktemp("recipes"))
    data = chain.root
    chain.run("prepare", prepare_settings(data))
    chain.run("pretrain", pretrain_settings(), inputs={"corpus": "prepare"})
    chain.run("sft", sft_settings(data), inputs={"start": "pretrain"})
    chain.run("reward", reward_settings(data, group_column="verb"), inputs={"start": "sft"})
    chain.outputs["ppo"] = chain.outputs["sft"]
    chain.run("evaluate", evaluate_settings(data), inputs=EVALUATED)
    return chain


def ppo_settings(data: Path) -> PPOSettings:
    prompts = written(data / "ppo.jsonl", [{"prompt": f"Who likes the {noun}?"} for noun in NOUNS])
    config = PPOConfig(
        data=prompts, max_steps=1, num_prompts=4, batch_size=4, micro_batch_size=4, max_response_tokens=6
    )
    return PPOSettings(seed=1, model=MODEL, ppo=config, rollout=HF)


@pytest.mark.parametrize("policy", ["pretrain", "sft"])
def test_pin_9_what_ppo_saves_stops_at_the_end_of_turn_whatever_it_was_tuned_from(chain, policy, tmp_path):
    inputs, runtime = chain.given({"policy": policy, "reward_model": "reward"}), runtime_in(tmp_path, "ppo")
    run_recipe(ppo_settings(tmp_path), inputs, tmp_path / "out", runtime)
    names = ("config.json", "generation_config.json")
    config, generation = (json.loads((tmp_path / "out" / name).read_text()) for name in names)
    chat = chain.chat(policy)
    assert config["eos_token_id"] == chat.end_of_turn_id
    assert generation["eos_token_id"] == list(chat.stop_token_ids)
    kept = [
        (tmp_path / "out" / name).read_bytes() == (inputs["policy"] / name).read_bytes() for name in names
    ]
    assert kept == [policy == "sft"] * 2, "an sft model's own is saved again byte for byte"


def test_every_recipe_says_what_it_measured(chain):
    training = {"loss_final", "tokens_per_second", "steps"}
    assert training | {"parameters", "perplexity_heldout"} <= chain.metrics["pretrain"].keys()
    assert training | {"conversations", "conversations_dropped"} <= chain.metrics["sft"].keys()
    assert (
        training
        | {"pairs", "pairs_heldout", "pairs_dropped", "accuracy_heldout", "margin_heldout", "score_mean"}
        <= chain.metrics["reward"].keys()
    )
    assert {"prompts", "reward_base", "length_sft", "truncated_ppo"} <= chain.metrics["evaluate"].keys()
    assert all(math.isfinite(value) for metrics in chain.metrics.values() for value in metrics.values())
    for stage in ("pretrain", "sft", "reward"):
        steps = [line["step"] for line in read_steps(chain.root / stage / "work" / "metrics.jsonl")]
        assert steps == [1, 2, 3, 4, 5, 6] and chain.metrics[stage]["steps"] == 6


def test_pretrain_learns_and_starts_near_the_uniform_distribution(chain):
    lines = read_steps(chain.root / "pretrain" / "work" / "metrics.jsonl")
    assert lines[0]["train/loss"] == pytest.approx(math.log(320), abs=0.3)
    assert chain.metrics["pretrain"]["loss_final"] < lines[0]["train/loss"] - 0.1
    perplexity = chain.metrics["pretrain"]["perplexity_heldout"]
    assert math.exp(chain.metrics["pretrain"]["loss_final"]) == pytest.approx(perplexity, rel=0.3)


@pytest.mark.parametrize("packing", ["best_fit", "bucket"])
def test_pretrain_learns_from_rows_of_every_packing(chain, tmp_path, packing):
    """The same documents as the chain's, which are packed one after another."""
    prepare = PrepareConfig(
        data=[DataSource(path=str(chain.root / "corpus.jsonl"))],
        vocab_size=320,
        heldout_frac=0.1,
        packing=packing,
    )
    made = Chain(root=tmp_path)
    made.run("prepare", PrepareSettings(seed=1, model=MODEL, prepare=prepare))
    made.run("pretrain", pretrain_settings(), inputs={"corpus": "prepare"})
    lines = read_steps(tmp_path / "pretrain" / "work" / "metrics.jsonl")
    assert lines[0]["train/loss"] == pytest.approx(math.log(320), abs=0.3)
    assert made.metrics["pretrain"]["loss_final"] < lines[0]["train/loss"] - 0.1
    assert made.metrics["prepare"]["tokens_heldout"] == chain.metrics["prepare"]["tokens_heldout"]
    assert 0.8 < made.metrics["prepare"]["packing_utilisation"] <= 1
    assert chain.metrics["prepare"]["packing_utilisation"] == 1


def test_pin_9_the_sft_model_stops_at_every_stop_token_of_its_template(chain):
    chat = chain.chat("sft")
    generation = json.loads((chain.outputs["sft"] / "generation_config.json").read_text())
    config = json.loads((chain.outputs["sft"] / "config.json").read_text())
    assert tuple(generation["eos_token_id"]) == chat.stop_token_ids
    assert {chat.end_of_turn_id, chat.tokenizer.eos_token_id} <= set(chat.stop_token_ids)
    assert config["eos_token_id"] == chat.end_of_turn_id
    assert config["pad_token_id"] == generation["pad_token_id"] == chat.pad_token_id
    assert chat.pad_token_id not in chat.stop_token_ids


def test_held_out_accuracy_is_reported_per_group_and_beside_the_longer_wins_rule(chain):
    metrics = chain.metrics["reward"]
    heldout = reward._examples(reward_settings(chain.root, group_column="verb"), chain.chat("sft")).heldout
    sizes = {verb: sum(example.group == verb for example in heldout) for verb in VERBS}
    assert sum(sizes.values()) == metrics["pairs_heldout"] and min(sizes.values()) > 0
    mean = sum(metrics[f"accuracy_{verb}"] * size for verb, size in sizes.items()) / len(heldout)
    assert metrics["accuracy_heldout"] == pytest.approx(mean, abs=1e-6)
    assert metrics["accuracy_longer_wins"] == 1.0
    assert metrics["pairs"] + metrics["pairs_heldout"] == 60 and metrics["pairs_dropped"] == 0


def test_training_accuracy_and_margin_are_those_of_the_pairs_of_the_steps():
    """Two packs: margins of 1.5 and 0, then -2; a tie is not ranked as labelled."""
    tally = Tally()
    for chosen, rejected in (([2.0, 1.0], [0.5, 1.0]), ([1.0], [3.0])):
        row = pack([[5]] * (2 * len(chosen)))
        scores_B = torch.tensor(chosen + rejected, requires_grad=True)
        tally.add(reward._loss(reward.Pairs(row=row, num_pairs=3), Outputs(scores_B=scores_B)))
    assert reward._ranked_share(tally.sums) == {"train/accuracy": 1 / 3, "train/margin": -0.5 / 3}
    losses = [math.log1p(math.exp(-margin)) for margin in (1.5, 0.0, -2.0)]
    assert tally.loss == pytest.approx(sum(losses) / 3)


class Scripted:
    """A `Trainable` that gives each step the scores that are written down for it."""

    def __init__(self, scores: list[list[float]], config: RewardConfig) -> None:
        self._scores = scores
        self._weight = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self._weight.weight)
        self._optimizer = Optimizer(self._weight, config, lr=0.0, max_steps=len(scores))

    def take_step(self, step, packs, reads, loss_of, accepts):
        def term(pack):
            scores_B = self._weight(torch.tensor(self._scores[step])[:, None])[:, 0]
            return loss_of(pack, Outputs(scores_B=scores_B))

        return take_step(self._optimizer, step, packs, term, accepts)


def test_training_accuracy_and_margin_leave_out_steps_that_were_not_taken(chain, tmp_path):
    """Margins of 1.5 and 0, then a step with a score that is NaN, then margins of -2 and 4."""
    config = reward_settings(chain.root).reward
    pairs = reward.Pairs(row=pack([[5]] * 4), num_pairs=2)
    scores = [[2.0, 1.0, 0.5, 1.0], [math.nan, 9.0, 0.0, 0.0], [1.0, 4.0, 3.0, 0.0]]
    stepper = Supervised(
        Scripted(scores, config),
        config,
        runtime=runtime_in(tmp_path, "reward"),
        reads=Reads(scores=True),
        batch_of=lambda position: [pairs],
        loss_of=reward._loss,
        watched=reward._ranked_share,
    )
    for step in range(3):
        stepper.step(step, step)
    seen = stepper.metrics()
    assert seen["train/skipped_steps"] == 1
    assert seen["train/accuracy"] == 2 / 4 and seen["train/margin"] == 3.5 / 4


def test_no_prompt_is_both_trained_on_and_held_out(chain):
    examples = reward._examples(reward_settings(chain.root), chain.chat("sft"))
    prompts = [{example.ids.prompt for example in part} for part in (examples.train, examples.heldout)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_evaluating_a_model_against_itself_is_a_draw(chain):
    metrics = chain.metrics["evaluate"]
    assert metrics["win_rate_ppo_vs_sft"] == metrics["win_rate_low"] == metrics["win_rate_high"] == 0.5
    assert metrics["kl_ppo_vs_sft"] == 0.0
    for name in ("score", "score_even", "reward", "length", "truncated", "perplexity"):
        assert metrics[f"{name}_ppo"] == metrics[f"{name}_sft"], name
    assert metrics["perplexity_base"] == pytest.approx(chain.metrics["pretrain"]["perplexity_heldout"])


def test_samples_hold_what_the_means_are_of(chain):
    lines = [json.loads(line) for line in (chain.outputs["evaluate"] / "samples.jsonl").open()]
    assert [line["prompt"] for line in lines] == [f"Who likes the {noun}?" for noun in NOUNS[:6]]
    for name in ("base", "sft", "ppo"):
        scores = [line[name]["score"] for line in lines]
        assert scores == [len(line[name]["response"]) % 5 / 4 for line in lines]
        assert chain.metrics["evaluate"][f"score_{name}"] == pytest.approx(sum(scores) / 6)


def gpt2_like_tokenizer(directory: Path) -> Path:
    """One special token, which is BOS, EOS and unknown; no template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=319, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["<|im_start|>user\n", "<|im_start|>assistant\n", *NOUNS, *VERBS], trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(directory)
    return directory


def test_a_tokenizer_with_no_special_token_but_its_end_goes_through_the_chain_and_loads_as_it_is_used(
    tmp_path,
):
    """As GPT-2's: nothing is left to pad with, so no saved model pads with what means something."""
    made = Chain(root=tmp_path)
    texts = [{"text": f"The {a} {verb} the {b}."} for a, verb, b in FACTS[:60]]
    prepare = PrepareConfig(
        data=written(tmp_path / "corpus.jsonl", texts), tokenizer=gpt2_like_tokenizer(tmp_path / "gpt2")
    )
    made.run("prepare", PrepareSettings(seed=1, model=MODEL, prepare=prepare))
    made.run("pretrain", pretrain_settings(max_steps=1), inputs={"corpus": "prepare"})
    made.run("sft", sft_settings(tmp_path, max_steps=1), inputs={"start": "pretrain"})
    made.run("reward", reward_settings(tmp_path, max_steps=1), inputs={"start": "sft"})

    tokenizer = AutoTokenizer.from_pretrained(made.outputs["sft"])
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "gpt2").get_vocab()
    for stage in ("pretrain", "sft"):
        model = AutoModelForCausalLM.from_pretrained(made.outputs[stage])
        assert (model.config.pad_token_id, model.config.eos_token_id) == (None, tokenizer.eos_token_id)
        assert model.get_input_embeddings().weight[tokenizer.eos_token_id].abs().sum() > 0
        assert model.generate(**tokenizer("The cat", return_tensors="pt"), max_new_tokens=2).shape[1] > 1
    ids = (
        made.chat("reward")
        .render((Message(role="user", content="x"), Message(role="assistant", content="y")))
        .ids
    )
    model = Placed(freeze(load_reward_model(made.outputs["reward"])))
    score = sequence_scores(model, [ids], device=torch.device("cpu"))
    plain = AutoModelForSequenceClassification.from_pretrained(made.outputs["reward"])
    torch.testing.assert_close(plain(torch.tensor([ids])).logits[0], score, atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match="no padding token is defined"):
        plain(torch.tensor([ids, ids]))


# The reward model's reading


def rollouts_ended_in_every_way(chat: ChatTokenizer) -> list[Rollout]:
    """The same answer cut off, ended with the end of turn, and ended with another stop token."""
    (other,) = set(chat.stop_token_ids) - {chat.end_of_turn_id}
    prompt = chat.prompt_ids((Message(role="user", content="Who likes the cat?"),))
    answer = chat.text_ids("The dog")
    return [
        Rollout(
            request_id=str(index),
            prompt_ids=prompt,
            response_ids=ids,
            logprobs=(-1.0,) * len(ids),
            finish_reason="stop" if len(ids) > len(answer) else "length",
            weight_versions=(0,) * len(ids),
            seed=0,
        )
        for index, ids in enumerate([answer, (*answer, chat.end_of_turn_id), (*answer, other)])
    ]


def as_trained(chat: ChatTokenizer) -> tuple[int, ...]:
    pair = chat.render_pair(
        (Message(role="user", content="Who likes the cat?"),),
        (Message(role="assistant", content="The dog"),),
        (Message(role="assistant", content="x"),),
    )
    assert pair.chosen.count(chat.end_of_turn_id) == 1 and pair.chosen[-1] == chat.end_of_turn_id
    return (*pair.prompt, *pair.chosen)


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_pin_13_evaluation_scores_a_response_with_the_end_it_was_trained_with_however_it_ended(chain, name):
    chat = chain.chat("sft")
    rollouts = rollouts_ended_in_every_way(chat)
    candidate = evaluate.Candidate(
        name=name, is_tuned=True, model=None, prompts=[], rollouts=rollouts, texts=["The dog"] * 3
    )
    prompt = Prompt(messages=(Message(role="user", content="Who likes the cat?"),), row={})
    assert evaluate._scored_sequences(candidate, [prompt] * 3, chat, 64) == [as_trained(chat)] * 3


def test_pin_13_the_base_models_answer_is_scored_as_a_chat_with_one_end_of_turn(chain):
    chat = chain.chat("sft")
    candidate = evaluate.Candidate(
        name="base", is_tuned=False, model=None, prompts=[], rollouts=[], texts=["The dog"]
    )
    prompt = Prompt(messages=(Message(role="user", content="Who likes the cat?"),), row={})
    assert evaluate._scored_sequences(candidate, [prompt], chat, 64) == [as_trained(chat)]


def test_pin_13_the_normaliser_reads_sampled_responses_with_the_end_they_were_trained_with(
    chain, monkeypatch
):
    chat = chain.chat("sft")

    class Client:
        def generate(self, requests):
            return rollouts_ended_in_every_way(chat)

    @contextmanager
    def no_engines(*args, **kwargs):
        yield Client()

    monkeypatch.setattr(reward, "open_engines", no_engines)
    settings = reward_settings(chain.root)
    sequences = reward._normaliser_sequences(
        settings, chain.outputs["sft"], reward._examples(settings, chat), chat, runtime=None
    )
    assert sequences == [as_trained(chat)] * 3


def test_pin_15_the_normaliser_is_over_responses_that_the_sft_model_samples(chain, monkeypatch, tmp_path):
    read = []

    def remember(model, sequences, **options):
        read.append((list(sequences), scores_in_packs(model, sequences, **options)))
        return read[-1][1]

    scores_in_packs = reward.scores_in_packs
    monkeypatch.setattr(reward, "scores_in_packs", remember)
    settings = reward_settings(tmp_path)
    metrics = run_recipe(
        settings, {"start": chain.outputs["sft"]}, tmp_path / "out", runtime_in(tmp_path, "reward")
    )
    sequences, scores = read[-1]
    chat = chain.chat("sft")
    examples = reward._examples(settings, chat)
    prompts = {example.ids.prompt for example in (*examples.train, *examples.heldout)}
    assert len(sequences) == 8
    for sequence in sequences:
        (prompt,) = [prompt for prompt in prompts if sequence[: len(prompt)] == prompt]
        assert 1 <= len(sequence) - len(prompt) <= 7 and sequence[-1] == chat.end_of_turn_id
    saved = json.loads((tmp_path / "out" / "score_normaliser.json").read_text())
    assert saved == {"mean": float(scores.mean()), "std": float(scores.std())}
    assert saved == {"mean": metrics["score_mean"], "std": metrics["score_std"]}


def test_a_reward_model_from_pretrain_opens_no_engine_and_is_normalised_by_its_held_out_pairs(
    chain, monkeypatch, tmp_path
):
    def no_engines(*args, **kwargs):
        raise AssertionError("init_from: pretrain must not need the sft model or an engine")

    monkeypatch.setattr(reward, "open_engines", no_engines)
    settings = reward_settings(tmp_path, init_from="pretrain")
    runtime = runtime_in(tmp_path, "reward")
    run_recipe(settings, {"start": chain.outputs["pretrain"]}, tmp_path / "out", runtime)
    heldout = reward._examples(settings, chain.chat("pretrain")).heldout
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        scores = torch.stack(
            [
                plain(torch.tensor([ids])).logits[0, 0]
                for example in heldout
                for ids in (example.chosen, example.rejected)
            ]
        )
    saved = json.loads((tmp_path / "out" / "score_normaliser.json").read_text())
    assert saved["mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert saved["std"] == pytest.approx(scores.std().item(), rel=1e-4)


def test_a_reward_model_below_its_gate_stops_the_run_and_leaves_no_model(chain, tmp_path):
    """Every pair stands there both ways, so that exactly half are ranked as labelled."""
    rows = [pair_of(*fact) for fact in FACTS[:20]]
    both = rows + [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    settings = reward_settings(tmp_path, rows=both, min_accuracy=1.0)
    with pytest.raises(
        TrainingStopped, match=r"held-out accuracy 0\.500 is below reward\.min_accuracy 1\.0"
    ) as stop:
        run_recipe(
            settings, {"start": chain.outputs["sft"]}, tmp_path / "out", runtime_in(tmp_path, "reward")
        )
    assert stop.value.exit_code == 5
    assert not list((tmp_path / "out").iterdir())


def test_pin_16_pairs_whose_difference_the_context_cuts_away_are_dropped_and_counted(chain, tmp_path):
    """Both responses end in the same long tail; a context shorter than that tail leaves no difference."""
    tail = " the cat likes the dog" * 6
    same_end = {"prompt": "Who?", "chosen": "yes" + tail, "rejected": "no" + tail, "verb": "likes"}
    rows = [pair_of(*fact) for fact in FACTS[:30]] + [same_end, same_end | {"prompt": "Why?"}]
    chat = chain.chat("sft")
    short, long = (
        reward._examples(
            reward_settings(tmp_path, rows=rows, context_length=context_length, too_long="truncate"), chat
        )
        for context_length in (24, 256)
    )
    assert (short.data["pairs_dropped"], long.data["pairs_dropped"]) == (2, 0)
    assert len(short.train) + len(short.heldout) == 30 and len(long.train) + len(long.heldout) == 32


def test_pin_16_what_is_kept_of_a_pair_ends_with_its_end_of_turn_within_the_context(chain, tmp_path):
    chat = chain.chat("sft")
    long_prompts = [row | {"prompt": row["prompt"] * 6} for row in (pair_of(*fact) for fact in FACTS[:30])]
    cutting = reward_settings(tmp_path, rows=long_prompts, context_length=48, too_long="truncate")
    examples = reward._examples(cutting, chat)
    assert examples.data["pairs_cut"] == 30 and examples.data["pairs_dropped"] == 0
    with pytest.raises(DataError, match=r"pairs\.jsonl: no rows left of 30 \(longer than model"):
        reward._examples(reward_settings(tmp_path, rows=long_prompts, context_length=48), chat)
    for example in (*examples.train, *examples.heldout):
        assert isinstance(example.ids, PairIds) and len(example.chosen) == 48
        assert example.chosen[-1] == example.rejected[-1] == chat.end_of_turn_id


def test_pin_16_the_recipe_reports_the_dropped_pairs(chain, tmp_path):
    tail = " the cat likes the dog" * 24
    same_end = {"prompt": "Who?", "chosen": "yes" + tail, "rejected": "no" + tail, "verb": "likes"}
    settings = reward_settings(
        tmp_path, rows=[*(pair_of(*fact) for fact in FACTS[:30]), same_end], max_steps=1, init_from="pretrain"
    )
    runtime = runtime_in(tmp_path, "reward")
    metrics = run_recipe(settings, {"start": chain.outputs["pretrain"]}, tmp_path / "out", runtime)
    assert metrics["pairs_dropped"] == 1 and metrics["pairs"] + metrics["pairs_heldout"] == 30


@pytest.mark.parametrize("stage", ["sft", "ppo", "evaluate"])
def test_a_source_of_which_nothing_fits_is_named_though_another_one_does(chain, tmp_path, stage):
    long = [{"prompt": f"{number} " * 99, "completion": "Yes."} for number in range(3)]
    data = [
        *written(tmp_path / "short.jsonl", [{"prompt": "Who?", "completion": "Me."}]),
        *written(tmp_path / "long.jsonl", long),
    ]
    shared, chat = {"seed": 1, "model": MODEL}, chain.chat("sft")
    with pytest.raises(DataError, match=r"long\.jsonl: no rows left of 3 \(no "):
        match stage:
            case "sft":
                sft._examples(SFTSettings(**shared, sft=SFTConfig(data=data)), chat)
            case "ppo":
                prompts_of(PPOSettings(**shared, ppo=PPOConfig(data=data), rollout=HF), chat)
            case "evaluate":
                config = EvaluateConfig(prompts=data)
                settings = EvaluateSettings(**shared, evaluate=config, rollout=HF)
                evaluate._fitting(read_prompts(data, seed=0), chat, settings)


def test_pretrain_refuses_rows_of_another_length_and_ids_the_model_does_not_know(
    chain, tmp_path, tied_model_dir
):
    def failure(inputs: dict[str, Path], **model: object) -> str:
        settings = pretrain_settings()
        settings = settings.model_copy(update={"model": settings.model.model_copy(update=model)})
        with pytest.raises(ModelError) as caught:
            run_recipe(settings, inputs, tmp_path / "out", runtime_in(tmp_path, "pretrain"))
        return str(caught.value)

    prepare = {"corpus": chain.outputs["prepare"]}
    assert "rows of 64 tokens, but model.context_length is 32" in failure(prepare, context_length=32)
    assert "its tokenizer and template write ids up to" in failure({**prepare, "start": tied_model_dir})


def test_a_token_that_nothing_writes_needs_no_row_of_the_model_that_pretrain_goes_on_with(tied_model_dir):
    """As `check` says of it: Llama tokenizers have a [PAD] behind the last row."""
    tokenizer = AutoTokenizer.from_pretrained(tied_model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[PAD]"]})
    chat = ChatTokenizer(tokenizer)
    inputs = {"start": tied_model_dir, "corpus": tied_model_dir}
    model = pretrain._initial_model(pretrain_settings(), inputs, chat)
    assert chat.vocab_size == model.inner.config.vocab_size + 1


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "sft", "reward", "evaluate"])
def test_of_a_file_that_changed_while_it_was_read_nothing_is_kept(chain, tmp_path, stage):
    settings, inputs = {
        "prepare": (prepare_settings(chain.root), {}),
        "pretrain": (pretrain_settings(), {"corpus": "prepare"}),
        "sft": (sft_settings(chain.root), {"start": "pretrain"}),
        "reward": (reward_settings(chain.root, group_column="verb"), {"start": "sft"}),
        "evaluate": (evaluate_settings(chain.root), EVALUATED),
    }[stage]

    def found_changed(*, trusting_stamps: bool = False) -> None:
        raise DataError("a.jsonl: changed since the run was planned")

    runtime = replace(runtime_in(tmp_path, stage), check_files=found_changed)
    with pytest.raises(DataError, match="changed since the run was planned"):
        run_recipe(settings, chain.given(inputs), tmp_path / "out", runtime)
    assert not list((tmp_path / "out").iterdir())
    assert {path.name.partition("-")[0] for path in (tmp_path / "work").iterdir()} <= {"blocks", "trainer"}


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_of_a_template_that_changed_before_a_worker_read_it_nothing_is_kept(chain, tmp_path, stage):
    """A resumed stage takes the file of tokens as it is. Its workers read the template again all the same."""
    settings, inputs = {
        "pretrain": (pretrain_settings(), {"corpus": "prepare"}),
        "sft": (sft_settings(chain.root), {"start": "pretrain"}),
        "reward": (reward_settings(chain.root, group_column="verb"), {"start": "sft"}),
    }[stage]
    runtime, given = runtime_in(tmp_path, stage), chain.given(inputs)
    if stage != "pretrain":
        {"sft": sft, "reward": reward}[stage].prepare(settings, given, runtime)

    def found_changed(*, trusting_stamps: bool = False) -> None:
        if trusting_stamps:  # as a worker asks
            raise DataError("chat.jinja: model.chat_template: changed since the run was planned")

    with pytest.raises(DataError, match="changed since the run was planned"):
        run_recipe(settings, given, tmp_path / "out", replace(runtime, check_files=found_changed))
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "work" / "checkpoints").exists()


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_that_no_template_was_found_is_said_once_in_each_execution(chain, tmp_path, stage):
    settings, role, source = {
        "pretrain": (pretrain_settings(), "corpus", "prepare"),
        "sft": (sft_settings(chain.root), "start", "pretrain"),
        "reward": (reward_settings(chain.root, group_column="verb"), "start", "sft"),
    }[stage]
    bare = shutil.copytree(chain.outputs[source], tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    for execution in (1, 2):
        run_recipe(settings, {role: bare}, tmp_path / "out", runtime_in(tmp_path, stage))
        said = (tmp_path / "logs" / f"{stage}.warnings.log").read_text()
        assert said.count("NO CHAT TEMPLATE") == execution


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_rows_are_refused_before_the_stage_asks_for_a_place(chain, tmp_path, stage):
    """Nothing that this asks of a cluster could be granted; no Ray is running."""
    (tmp_path / "rows.jsonl").write_text("{broken\n")
    settings, inputs = {
        "sft": (sft_settings(chain.root), {"start": "pretrain"}),
        "reward": (reward_settings(chain.root), {"start": "sft"}),
    }[stage]
    section = getattr(settings, stage)
    broken = section.data[0].model_copy(update={"path": str(tmp_path / "rows.jsonl")})
    settings = settings.model_copy(update={stage: section.model_copy(update={"data": [broken]})})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
        run_recipe(settings, chain.given(inputs), tmp_path, runtime_in(tmp_path, stage, num_workers=1))


@pytest.mark.parametrize(
    ("roles", "is_judged", "expected", "absent"),
    [
        (["base", "sft"], True, {"score_base", "score_even_sft", "length_sft"}, ("reward", "win_rate", "kl")),
        (["sft", "ppo"], False, {"length_sft", "kl_ppo_vs_sft"},
         ("reward", "win_rate", "score", "perplexity")),
        (["base"], False, {"length_base", "truncated_base"}, ("reward", "win_rate", "kl", "score")),
        (["corpus", "reward_model", "ppo"], False, {"perplexity_ppo", "reward_ppo"},
         ("win_rate", "kl", "score")),
    ],
)  # fmt: skip
def test_an_evaluation_measures_what_the_models_that_are_there_allow(
    chain, tmp_path, roles, is_judged, expected, absent
):
    settings = evaluate_settings(chain.root)
    if not is_judged:
        alone = settings.evaluate.model_copy(update={"score": None})
        settings = settings.model_copy(update={"evaluate": alone})
    given = chain.given({role: EVALUATED[role] for role in roles})
    metrics = run_recipe(settings, given, tmp_path / "out", runtime_in(tmp_path, "evaluate"))
    assert expected <= metrics.keys()
    assert not [key for key in metrics if key.startswith(absent)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").open()]
    models = [role for role in roles if role not in ("corpus", "reward_model")]
    assert all(list(line) == ["prompt", *models] for line in lines)
    parts = {"response"} | ({"reward"} if "reward_model" in roles else set())
    parts |= {"score", "even"} if is_judged else set()
    assert all(line[model].keys() == parts for line in lines for model in models)


# Resuming


class Killed(Exception):
    """Stands for a SIGKILL before a step."""


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_a_killed_stage_goes_on_from_its_checkpoint_and_ends_in_the_same_bits(
    chain, monkeypatch, tmp_path, stage
):
    """Checkpoints are at steps 2 and 4; it dies before the sixth step and takes steps 5 and 6 again."""
    settings, inputs = {
        "pretrain": (pretrain_settings(), {"corpus": "prepare"}),
        "sft": (sft_settings(chain.root), {"start": "pretrain"}),
        "reward": (reward_settings(chain.root, group_column="verb"), {"start": "sft"}),
    }[stage]
    asked: list[int] = []
    indices = BatchOrder.indices

    def dying(self, step):
        if step == 5 and len(asked) == 5:
            raise Killed
        asked.append(step)
        return indices(self, step)

    monkeypatch.setattr(BatchOrder, "indices", dying)
    resumed = Chain(root=tmp_path, outputs=dict(chain.outputs))
    with pytest.raises(Killed):
        resumed.run(stage, settings, inputs=inputs)
    assert not list((tmp_path / stage / "out").iterdir())
    first_four = (tmp_path / stage / "work" / "metrics.jsonl").read_text().split("\n")[:4]
    resumed.run(stage, settings, inputs=inputs)
    assert asked == [0, 1, 2, 3, 4, 4, 5]
    lines = (tmp_path / stage / "work" / "metrics.jsonl").read_text().split("\n")[:-1]
    assert lines[:4] == first_four and len(lines) == 6
    digests = {
        blake3((made.outputs[stage] / "model.safetensors").read_bytes()).hexdigest()
        for made in (chain, resumed)
    }
    assert len(digests) == 1
    timeless = [
        {name: value for name, value in made.metrics[stage].items() if name != "tokens_per_second"}
        for made in (chain, resumed)
    ]
    assert timeless[0] == timeless[1]
