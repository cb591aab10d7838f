"""PPO: one batch judged and updated on tiny models, and whole runs of the recipe on the reference engine."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from fakes import FakeEngine
from inline import run_recipe, runtime_in, worker_in
from ppo_inputs import (
    EOS,
    OTHER_STOP,
    Killed,
    Parts,
    invented,
    joined,
    killed_in_step,
    ppo_inputs,
    some_trajectories,
    with_turn,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rollout.config import EngineConfig
from rollout.errors import WeightSyncError
from rollout.ground.errors import EnvironmentProblem
from stages.config.data import DataSource
from stages.config.model import ModelConfig
from stages.config.ppo import PPOConfig, PPOSettings
from stages.errors import DataError, Interrupted, ModelError, TrainingStopped
from stages.rl.credit import GeneralisedAdvantages
from stages.rl.experience import pack_rollouts
from stages.rl.source import RolloutSource, SourcePlan, SourcePrompt
from stages.rl.update import Learner, minibatches
from stages.training.forwards import sequence_scores
from stages.training.fsdp import Trained, outputs_of
from stages.training.metrics import read_steps
from stages.training.models import CausalLM, TokenScorer
from stages.training.trainable import Reads, StepResult

CPU = torch.device("cpu")
CONFIG = PPOConfig(
    data=[DataSource(path="unused")],
    max_steps=3,
    num_prompts=8,
    batch_size=4,
    micro_batch_size=2,
    max_response_tokens=6,
    num_epochs=2,
    lr=1e-3,
    value_lr=1e-3,
    warmup_frac=0.0,
    checkpoint_every_steps=1,
)


@pytest.fixture(scope="module")
def inputs(tied_model_dir, tmp_path_factory):
    return ppo_inputs(tied_model_dir, tmp_path_factory.mktemp("reward"))


def parts_of(inputs, tmp_path, config=CONFIG):
    return Parts(config, inputs, worker_in(tmp_path, "ppo"))


def test_pin_10_the_ids_that_are_trained_on_are_the_engines_and_never_encoded_again(tied_model_dir):
    """Random ids: as a rule, encoding their text would give others."""
    trajectories = some_trajectories()
    tokenizer = AutoTokenizer.from_pretrained(tied_model_dir)
    assert any(
        tokenizer(tokenizer.decode(one.turn.response_ids))["input_ids"] != list(one.turn.response_ids)
        for one in trajectories
    )
    for pack in pack_rollouts(trajectories, micro_batch_size=3, max_length=6, device=CPU):
        turns = [trajectory.turn for trajectory in pack.trajectories]
        sent = [[*turn.prompt_ids, *turn.response_ids] for turn in turns]
        assert [part.tolist() for part in pack.packed.row.split(pack.packed.row.input_ids_1N[0])] == sent
        trained = [token for turn in turns for token in turn.response_ids]
        assert pack.packed.targets_N.tolist() == trained


@pytest.mark.parametrize("samples_per_prompt", [1, 2])
def test_pin_34_every_prompt_is_sampled_from_once_per_epoch_and_a_resumed_run_goes_on_there(
    samples_per_prompt, tmp_path
):
    """Five prompts, two per step: two epochs take five steps, the third of which spans both."""
    plan = SourcePlan(
        prompts=tuple(SourcePrompt(ids=(5 + index,), row={}) for index in range(5)),
        num_prompts=2,
        samples_per_prompt=samples_per_prompt,
        temperature=1.0,
        max_tokens=3,
        stop_token_ids=(),
        seed=4,
    )

    async def batches(steps):
        source = RolloutSource(FakeEngine(), plan, tmp_path)
        return [await source.next(step, 0) for step in steps]

    straight = asyncio.run(batches(range(5)))
    drawn = [one.prompt_index for batch in straight for one in batch.trajectories if one.sample == 0]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]
    for batch in straight:
        for one in batch.trajectories:
            assert one.turn.prompt_ids == plan.prompts[one.prompt_index].ids
    seeds = [one.seed for batch in straight for one in batch.trajectories]
    assert len(set(seeds)) == len(seeds) == 10 * samples_per_prompt
    assert asyncio.run(batches([3, 4])) == straight[3:]


def test_pin_13_ppo_scores_a_response_as_if_it_had_ended_with_the_end_of_turn_however_it_ended(
    inputs, tmp_path
):
    """Cut off, ended by the end of turn, and ended by another stop token: one and the same score."""
    parts = parts_of(inputs, tmp_path)
    endings = {"length": (9, 12), "stop": (9, 12, EOS), "other": (9, 12, OTHER_STOP)}
    prompt = some_trajectories(1)[0].turn.prompt_ids
    trajectories = [
        invented(index, prompt, ids, "length" if name == "length" else "stop")
        for index, (name, ids) in enumerate(endings.items())
    ]
    scores = parts.judged(trajectories, size=3).scores_B
    raw = sequence_scores(parts.models.reward_model, [(*prompt, 9, 12, EOS)], device=CPU)
    torch.testing.assert_close(scores, ((raw - 0.1) / 1.5).expand(3), atol=1e-6, rtol=0)


def test_pin_4_the_first_ratio_is_exactly_one_and_close_to_it_under_another_split(inputs, tmp_path):
    parts = parts_of(inputs, tmp_path)
    batch, whole = parts.judged(), parts.judged(size=8)
    by_id = dict(zip([one.id for one in batch.trajectories], batch.anchor_logprobs_BT, strict=True))
    for trajectory, row in zip(whole.trajectories, whole.anchor_logprobs_BT, strict=True):
        torch.testing.assert_close(row, by_id[trajectory.id], atol=1e-5, rtol=0)
    assert parts.learner.update(0, parts.experiences(batch))["ppo/ratio_first"] == 0.0


def test_pin_4_epochs_shuffle_packs_and_never_tear_them():
    packs = list(range(6))
    epochs = [minibatches(packs, packs_per_step=2, seed=seed) for seed in range(4)]
    assert all(sorted(pack for step in epoch for pack in step) == packs for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) > 1
    assert minibatches(packs, packs_per_step=2, seed=3) == epochs[3]


def test_pin_4_with_one_update_per_batch_the_anchor_is_the_detached_policy(inputs, tmp_path):
    config = CONFIG.model_copy(update={"num_epochs": 1, "batch_size": 8})
    parts = parts_of(inputs, tmp_path, config)
    experiences = parts.experiences(parts.judged())
    assert all(item.anchor_logprobs_BT is None for item in experiences)
    with torch.no_grad():
        for parameter in parts.models.policy.model.parameters():
            parameter.mul_(1.05)
    metrics = parts.learner.update(0, experiences)
    assert metrics["ppo/ratio_first"] == 0.0 and metrics["ppo/clip_fraction"] == 0.0


def test_pin_19_rewards_of_a_response_add_up_to_score_minus_beta_kl(inputs, tmp_path):
    config = CONFIG.model_copy(
        update={"gae_lambda": 1.0, "whiten_advantages": False, "missing_eos_penalty": 0.0}
    )
    parts = parts_of(inputs, tmp_path, config)
    with torch.no_grad():
        for parameter in parts.models.policy.model.parameters():
            parameter.mul_(1.05)
    batch = parts.judged()
    returns_BT = joined(parts.experiences(batch, kl_coef=0.3), "returns_BT")
    assert batch.kl_B.abs().min() > 0
    torch.testing.assert_close(returns_BT[:, 0], batch.scores_B - 0.3 * batch.kl_B, atol=1e-5, rtol=0)


def test_pin_20_a_truncated_response_is_penalised_left_out_or_bootstrapped(inputs, tmp_path):
    results = {}
    for truncation in ("penalty", "mask", "bootstrap"):
        config = CONFIG.model_copy(
            update={"truncation": truncation, "gae_lambda": 1.0, "whiten_advantages": False, "kl_coef": 0.0}
        )
        parts = parts_of(inputs, tmp_path, config)
        batch = parts.judged()
        results[truncation] = batch, parts.experiences(batch, kl_coef=0.0)
    batch, experiences = results["penalty"]
    expected = batch.scores_B - 1.0 * batch.truncated_B
    torch.testing.assert_close(joined(experiences, "returns_BT")[:, 0], expected, atol=1e-5, rtol=0)
    batch, experiences = results["mask"]
    mask_BT, cut_B = joined(experiences, "mask_BT"), batch.truncated_B
    assert not mask_BT[cut_B].any() and torch.equal(mask_BT[~cut_B], batch.layout_BT[~cut_B])
    assert batch.layout_BT[cut_B].any(-1).all(), "left out of what is learned from, and laid out all the same"
    batch, experiences = results["bootstrap"]
    expected = torch.where(batch.truncated_B, batch.final_values_B, batch.scores_B)
    torch.testing.assert_close(joined(experiences, "returns_BT")[:, 0], expected, atol=1e-5, rtol=0)


def test_pin_22_returns_are_of_unwhitened_advantages_and_whitening_is_once_over_the_batch(inputs, tmp_path):
    parts = parts_of(inputs, tmp_path)
    batch = parts.judged()
    plain = CONFIG.model_copy(update={"whiten_advantages": False})
    whitened = parts.algorithm.credit(batch, kl_coef=0.05)
    unwhitened = GeneralisedAdvantages(config=plain)(batch, kl_coef=0.05)
    assert torch.equal(whitened.returns_BT, unwhitened.returns_BT)
    values = whitened.advantages_BT[whitened.mask_BT]
    assert abs(float(values.mean())) < 1e-5 and float(values.std(unbiased=False)) == pytest.approx(
        1, abs=1e-3
    )


def test_pin_24_scores_are_normalised_then_clipped_before_the_kl_is_taken(inputs, tmp_path):
    wide = CONFIG.model_copy(update={"score_clip": None})
    narrow = CONFIG.model_copy(update={"score_clip": 0.05})
    unclipped = parts_of(inputs, tmp_path, wide).judged()
    parts = parts_of(inputs, tmp_path, narrow)
    clipped = parts.judged()
    assert torch.equal(unclipped.scores_B.clamp(-0.05, 0.05), clipped.scores_B)
    first = clipped.packs[0]
    raw = parts.models.reward_model.outputs(first.packed, Reads(scores=True)).scores_B
    ended, scores_B = ~first.truncated_B, unclipped.scores_B[: len(first.trajectories)]
    torch.testing.assert_close(scores_B[ended], ((raw - 0.1) / 1.5)[ended], atol=1e-5, rtol=0)


def test_pin_28_the_config_refuses_kl_choices_that_optimise_something_else():
    for placement, estimator in (
        ("reward", "k2"),
        ("reward", "k3"),
        ("loss", "k1"),
        ("loss", "k3"),
        ("kl_surrogate", "k1"),
    ):
        with pytest.raises(ValueError, match="does not optimise"):
            PPOConfig(data=[DataSource(path="x")], kl_placement=placement, kl_estimator=estimator)


@pytest.mark.parametrize(
    ("placement", "estimator"), [("loss", "k2"), ("kl_surrogate", "k2"), ("kl_surrogate", "k3")]
)
def test_a_kl_in_the_loss_pulls_the_policy_back_to_the_reference(inputs, tmp_path, placement, estimator):
    config = CONFIG.model_copy(
        update={"kl_placement": placement, "kl_estimator": estimator, "num_epochs": 4, "lr": 1e-4}
    )

    def kl_after(kl_coef):
        parts = parts_of(inputs, tmp_path, config)
        perturbed(parts.models.policy.model)
        batch = parts.judged()
        silent = [
            replace(item, advantages_BT=torch.zeros_like(item.advantages_BT))
            for item in parts.experiences(batch, kl_coef=kl_coef)
        ]
        for step in range(3):
            parts.learner.update(step, silent)
        return float(parts.judges.judge_packs(batch.packs).kl_B.square().mean())

    assert kl_after(1.0) < 0.7 * kl_after(0.0)


def perturbed(model):
    """The model, away from where it was."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(noise, alpha=0.03)
    return model


def gradient_of_the_policy(inputs, tmp_path, monkeypatch, config):
    """Of one optimizer step of a policy away from its reference, on responses of 40, 9 and 2 tokens."""
    parts = parts_of(inputs, tmp_path, config)
    perturbed(parts.models.policy.model)
    generator = torch.Generator().manual_seed(11)
    trajectories = [
        invented(
            index,
            trajectory.turn.prompt_ids,
            torch.randint(5, 300, (length,), generator=generator).tolist(),
            trajectory.turn.finish_reason,
        )
        for index, (trajectory, length) in enumerate(zip(some_trajectories(3), (40, 9, 2), strict=True))
    ]
    experiences = parts.experiences(parts.judged(trajectories), kl_coef=config.kl_coef)
    found = {}

    def differentiate(self, step, packs, reads, loss_of, accepts):
        loss = sum(loss_of(pack, outputs_of(self.model, pack, reads)).loss for pack in packs)
        parts = torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True)
        found[self] = torch.cat([part.flatten() for part in parts if part is not None])
        return StepResult(loss=float(loss.detach()), grad_norm=0.0, lr=0.0, taken=True, sums={}, extremes={})

    with monkeypatch.context() as patch:
        patch.setattr(Trained, "take_step", differentiate)
        parts.learner.update(0, experiences)
    return found[parts.models.policy]


def test_kl_coef_weighs_the_kl_loss_against_the_policy_loss_in_every_aggregation_alike(
    inputs, tmp_path, monkeypatch
):
    """The step's whole gradient, times what the policy loss is divided by, is one and the same."""
    shared = {
        "kl_placement": "loss",
        "kl_estimator": "k2",
        "num_prompts": 3,
        "batch_size": 3,
        "micro_batch_size": 3,
        "num_epochs": 1,
        "max_response_tokens": 40,
    }
    counts = {"token_mean": 51, "sequence_mean_token_sum": 3, "constant": 3 * 40}
    whole = {}
    for kl_coef in (0.0, 0.5):
        for aggregation, count in counts.items():
            changes = {"loss_aggregation": aggregation, "kl_coef": kl_coef}
            config = CONFIG.model_copy(update=shared | changes)
            gradient = gradient_of_the_policy(inputs, tmp_path, monkeypatch, config)
            whole[kl_coef, aggregation] = gradient * count
    for kl_coef in (0.0, 0.5):
        expected = whole[kl_coef, "sequence_mean_token_sum"]
        for aggregation in counts:
            difference = (whole[kl_coef, aggregation] - expected).norm()
            assert difference < 1e-4 * expected.norm(), (kl_coef, aggregation)
    of_kl = whole[0.5, "token_mean"] - whole[0.0, "token_mean"]
    assert of_kl.norm() > 0.05 * whole[0.0, "token_mean"].norm()


def test_pin_30_the_move_of_an_update_and_the_kl_to_the_reference_are_two_metrics(inputs, tmp_path):
    parts = parts_of(inputs, tmp_path)
    batch = parts.judged()
    assert parts.metrics(batch)["rollout/kl"] == pytest.approx(0.0, abs=1e-5)
    assert parts.learner.update(0, parts.experiences(batch))["ppo/approx_kl"] > 1e-6


def test_without_a_kl_weight_no_reference_is_loaded(inputs, tmp_path):
    parts = parts_of(inputs, tmp_path, CONFIG.model_copy(update={"kl_coef": 0.0}))
    batch = parts.judged()
    assert parts.models.reference is None and batch.kl_B is None
    assert "rollout/kl" not in parts.metrics(batch, kl_coef=0.0)


def test_value_warm_up_leaves_the_policy_alone(inputs, tmp_path):
    parts = parts_of(inputs, tmp_path, CONFIG.model_copy(update={"value_warmup_steps": 1}))
    experiences = parts.experiences(parts.judged())
    policy, value = parts.models.policy.model, parts.models.value.model
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    head = value.head.weight.detach().clone()
    parts.learner.update(0, experiences)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    assert not parts.learner.has_moved and not torch.equal(head, value.head.weight)
    parts.learner.update(1, experiences)
    assert parts.learner.has_moved


# Whole runs.


def times(loss_of, factor):
    """`loss_of` with its loss multiplied."""

    def multiplied(pack, now):
        term = loss_of(pack, now)
        return replace(term, loss=term.loss * factor)

    return multiplied


def settings_for(prompts: Path, **changes) -> PPOSettings:
    config = CONFIG.model_copy(update={"data": [DataSource(path=str(prompts))], **changes})
    return PPOSettings(
        seed=3,
        model=ModelConfig(context_length=64),
        ppo=config,
        rollout=EngineConfig(engine="hf", parity_num_prompts=2, parity_max_tokens=4),
    )


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = [
        "the cat",
        "a dog",
        "two and three",
        "please say",
        "the house",
        "red mat",
        "thank you",
        "ran to",
        "sat on",
    ]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def run_in(directory, settings, inputs):
    runtime = runtime_in(directory, "ppo")
    metrics = run_recipe(settings, inputs, directory / "out", runtime)
    weights = blake3((directory / "out" / "model.safetensors").read_bytes()).hexdigest()
    return metrics, weights, (directory / "out" / "rollouts.jsonl").read_text()


def test_pin_35_the_same_run_twice_gives_identical_token_ids_and_weights(inputs, prompts, tmp_path):
    first = run_in(tmp_path / "first", settings_for(prompts), inputs)
    second = run_in(tmp_path / "second", settings_for(prompts), inputs)
    assert first[1:] == second[1:]
    metrics = first[0]
    assert metrics["version_final"] == 3.0 and metrics["parity_max_abs_diff"] <= 1e-5
    assert metrics["samples_per_second"] > 0 and metrics["sync_seconds_median"] > 0


def run_killed_in_step(step_to_die_in, directory, settings, inputs, monkeypatch):
    with killed_in_step(step_to_die_in, monkeypatch):
        run_in(directory, settings, inputs)


@pytest.mark.parametrize(("precision", "step"), [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 2)])
def test_pin_40_a_run_that_died_and_went_on_ends_in_the_same_bits(
    inputs, prompts, tmp_path, monkeypatch, precision, step
):
    """Nine prompts, eight to a step: every iteration but the first reaches over the end of an epoch."""
    settings = settings_for(prompts, precision=precision)
    _, whole, rollouts = run_in(tmp_path / "whole", settings, inputs)
    run_killed_in_step(step, tmp_path / "killed", settings, inputs, monkeypatch)
    metrics, resumed, resumed_rollouts = run_in(tmp_path / "killed", settings, inputs)
    assert (resumed, resumed_rollouts) == (whole, rollouts)
    assert metrics["steps"] == 3.0
    saved = load_file(tmp_path / "whole" / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_pin_29_the_adaptive_kl_coef_goes_on_where_a_killed_run_left_it(
    inputs, prompts, tmp_path, monkeypatch
):
    """The target is out of reach and the horizon one batch: beta falls by a fifth in every iteration."""
    settings = settings_for(
        prompts, kl_controller="adaptive", kl_coef=0.5, kl_target=1e6, kl_horizon=8, checkpoint_every_steps=2
    )

    def coefs(directory):
        return [line["rollout/kl_coef"] for line in read_steps(directory / "work" / "metrics.jsonl")]

    _, whole, rollouts = run_in(tmp_path / "whole", settings, inputs)
    run_killed_in_step(2, tmp_path / "killed", settings, inputs, monkeypatch)
    _, resumed, resumed_rollouts = run_in(tmp_path / "killed", settings, inputs)
    assert coefs(tmp_path / "whole") == pytest.approx([0.5, 0.4, 0.32])
    assert coefs(tmp_path / "killed") == coefs(tmp_path / "whole")
    assert (resumed, resumed_rollouts) == (whole, rollouts)


def test_pin_29_the_adaptive_kl_coef_waits_for_the_policy_to_start_learning(inputs, prompts, tmp_path):
    """While the value model warms up the policy is the reference, and a KL of 0 says nothing about beta."""
    adaptive = {"kl_controller": "adaptive", "kl_coef": 0.5, "kl_target": 1e6, "kl_horizon": 8}
    run_in(tmp_path, settings_for(prompts, value_warmup_steps=1, max_steps=3, **adaptive), inputs)
    lines = read_steps(tmp_path / "work" / "metrics.jsonl")
    assert [line["rollout/kl_coef"] for line in lines] == pytest.approx([0.5, 0.5, 0.4])


def test_a_run_killed_in_its_update_replays_the_journal_and_samples_nothing_again(
    inputs, prompts, tmp_path, monkeypatch
):
    """The third batch waits in the journal, and the second: its checkpoint is gone, too."""
    settings = settings_for(prompts, max_steps=4, checkpoint_every_steps=1)
    drawn = []
    draw = RolloutSource._draw

    async def counting(self, step):
        drawn.append(step)
        return await draw(self, step)

    monkeypatch.setattr(RolloutSource, "_draw", counting)
    _, whole, rollouts = run_in(tmp_path / "whole", settings, inputs)
    assert drawn == [0, 1, 2, 3]
    run_killed_in_step(2, tmp_path / "killed", settings, inputs, monkeypatch)
    shutil.rmtree(tmp_path / "killed" / "work" / "checkpoints" / "step-000002")
    drawn.clear()
    _, resumed, resumed_rollouts = run_in(tmp_path / "killed", settings, inputs)
    assert drawn == [3]
    assert (resumed, resumed_rollouts) == (whole, rollouts)


@pytest.mark.parametrize(("kinds", "skipped"), [((CausalLM, TokenScorer), 7.0), ((CausalLM,), 4.0)])
def test_after_bad_updates_the_policy_goes_back_its_prompts_are_left_out_and_a_kill_changes_nothing(
    inputs, prompts, tmp_path, monkeypatch, caplog, kinds, skipped
):
    """No loss on the batch of position 1 is a number: back to step 1, on with position 2."""
    settings = settings_for(prompts, checkpoint_every_steps=1)
    positions = []
    draw, take_step = RolloutSource._draw, Trained.take_step

    async def remembering(self, step):
        positions.append(step)
        return await draw(self, step)

    def spoiled(self, step, packs, reads, loss_of, accepts):
        bad = torch.nan if positions[-1] == 1 and isinstance(self.model, kinds) else 1.0
        return take_step(self, step, packs, reads, times(loss_of, bad), accepts)

    monkeypatch.setattr(RolloutSource, "_draw", remembering)
    with monkeypatch.context() as patch:
        patch.setattr(Trained, "take_step", spoiled)
        metrics, whole, rollouts = run_in(tmp_path / "whole", settings, inputs)
        assert positions == [0, 1, 2, 3] and metrics["steps_skipped"] == skipped
        said = "ppo step 2: 4 bad steps in a row; back to step 1, leaving out the 1 batches since then"
        assert said in caplog.text
        assert said in (tmp_path / "whole" / "logs" / "ppo.warnings.log").read_text().splitlines()
        run_killed_in_step(2, tmp_path / "killed", settings, inputs, monkeypatch)
        _, resumed, resumed_rollouts = run_in(tmp_path / "killed", settings, inputs)
    assert (resumed, resumed_rollouts) == (whole, rollouts)
    lines = read_steps(tmp_path / "whole" / "work" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["train/skipped_steps"] == skipped
    versions = [line["sync/version"] for line in lines]
    assert versions == [1.0, 3.0, 4.0], "the weights it went back to are version 2: no number names two"
    assert metrics["version_final"] == 4.0


def test_tokens_of_other_weights_end_the_run_in_a_line_that_names_the_step_and_not_the_batch(
    inputs, prompts, tmp_path, monkeypatch
):
    """The batch of position 1 was left out, so step 2 is on that of position 2, drawn by weight version 9."""
    positions = []
    draw, take_step = RolloutSource._draw, Trained.take_step

    async def drawn_by_others(self, position):
        positions.append(position)
        trajectories = await draw(self, position)
        if position < 2:
            return trajectories
        return tuple(
            with_turn(one, weight_versions=(9,) * len(one.turn.response_ids)) for one in trajectories
        )

    def spoiled(self, step, packs, reads, loss_of, accepts):
        bad = torch.nan if positions[-1] == 1 else 1.0
        return take_step(self, step, packs, reads, times(loss_of, bad), accepts)

    monkeypatch.setattr(RolloutSource, "_draw", drawn_by_others)
    monkeypatch.setattr(Trained, "take_step", spoiled)
    said = r"^ppo step 2: tokens were drawn by weight versions \[9\], not 2$"
    with pytest.raises(WeightSyncError, match=said):
        run_in(tmp_path / "run", settings_for(prompts, checkpoint_every_steps=1), inputs)
    assert positions == [0, 1, 2]


def test_a_run_stopped_before_and_killed_after_going_back_ends_in_the_same_bits_and_samples_nothing_again(
    inputs, prompts, tmp_path, monkeypatch
):
    """Stopped behind step 3; no loss on the batch of position 3 is a number: back to step 2, on with 4."""
    settings = settings_for(prompts, max_steps=4, checkpoint_every_steps=2, keep_checkpoints=1)
    positions, drawn = [], []
    find, draw, take_step, update = (
        RolloutSource._found_or_drawn,
        RolloutSource._draw,
        Trained.take_step,
        Learner.update,
    )

    async def remembering(self, position, version, redraw):
        positions.append(position)
        return await find(self, position, version, redraw)

    async def counting(self, step):
        drawn.append(step)
        return await draw(self, step)

    def spoiled(self, step, packs, reads, loss_of, accepts):
        bad = torch.nan if positions[-1] == 3 else 1.0
        return take_step(self, step, packs, reads, times(loss_of, bad), accepts)

    def stopping(self, step, experiences):
        if positions[-1] == 2:
            (tmp_path / "resumed" / "stop").touch()
        return update(self, step, experiences)

    def dying(self, step, experiences):
        if positions[-1] == 4:
            raise Killed
        return update(self, step, experiences)

    monkeypatch.setattr(RolloutSource, "_found_or_drawn", remembering)
    monkeypatch.setattr(RolloutSource, "_draw", counting)
    monkeypatch.setattr(Trained, "take_step", spoiled)
    _, whole, rollouts = run_in(tmp_path / "whole", settings, inputs)
    assert positions == drawn == [0, 1, 2, 3, 4, 5]
    positions.clear()
    drawn.clear()
    for interrupted, end in ((stopping, Interrupted), (dying, Killed)):
        with monkeypatch.context() as patch:
            patch.setattr(Learner, "update", interrupted)
            with pytest.raises(end):
                run_in(tmp_path / "resumed", settings, inputs)
        (tmp_path / "resumed" / "stop").unlink(missing_ok=True)
    _, resumed, resumed_rollouts = run_in(tmp_path / "resumed", settings, inputs)
    assert positions == [0, 1, 2, 3, 4, 2, 3, 4, 5] and drawn == [0, 1, 2, 3, 4, 5]
    assert (resumed, resumed_rollouts) == (whole, rollouts)


@pytest.mark.parametrize("value_warmup_steps", [0, 2])
def test_a_run_that_is_asked_to_stop_saves_its_state_behind_the_iteration_and_goes_on_in_the_same_bits(
    inputs, prompts, tmp_path, monkeypatch, value_warmup_steps
):
    """Within the warm-up too, where the policy's optimizer has not taken a step yet."""
    settings = settings_for(prompts, checkpoint_every_steps=50, value_warmup_steps=value_warmup_steps)
    _, whole, rollouts = run_in(tmp_path / "whole", settings, inputs)
    update = Learner.update

    def stopping(self, step, experiences):
        if step == 1:
            (tmp_path / "stopped" / "stop").touch()
        return update(self, step, experiences)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", stopping)
        with pytest.raises(Interrupted, match="ppo: stopped at step 2 of 3, state saved"):
            run_in(tmp_path / "stopped", settings, inputs)
    (tmp_path / "stopped" / "stop").unlink()
    _, resumed, resumed_rollouts = run_in(tmp_path / "stopped", settings, inputs)
    assert (resumed, resumed_rollouts) == (whole, rollouts)


@pytest.mark.engine
@pytest.mark.slow
def test_a_bf16_run_with_vllm_passes_its_parity_gate_and_saves_fp32_weights_that_moved(
    inputs, prompts, tmp_path
):
    engine = EngineConfig(kv_cache_mib=64, max_num_seqs=16, parity_num_prompts=2, parity_max_tokens=8)
    settings = settings_for(prompts, precision="bf16", max_steps=2).model_copy(update={"rollout": engine})
    metrics, _, _ = run_in(tmp_path, settings, inputs)
    assert metrics["version_final"] == 2.0 and 0 < metrics["parity_max_abs_diff"] < 0.5
    lines = read_steps(tmp_path / "work" / "metrics.jsonl")
    assert [line["ppo/ratio_first"] for line in lines] == [0.0, 0.0]
    assert lines[0]["rollout/kl"] == 0.0 and lines[1]["rollout/kl"] != 0.0
    before, after = (
        load_file(directory / "model.safetensors") for directory in (inputs["policy"], tmp_path / "out")
    )
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_disk_that_does_not_take_the_rollouts_is_one_line(inputs, prompts, tmp_path):
    (tmp_path / "out" / "rollouts.jsonl").mkdir(parents=True)
    with pytest.raises(EnvironmentProblem, match=r"rollouts\.jsonl: Is a directory; .*go on$"):
        run_in(tmp_path, settings_for(prompts, max_steps=1), inputs)


def test_the_policys_learning_rate_warms_up_and_decays_over_the_steps_that_the_policy_takes(
    inputs, prompts, tmp_path, monkeypatch
):
    """Five iterations of two updates each, the first two of the value model alone: six policy updates, one of
    which warms up. Killed and resumed in the middle, it logs the same.
    """
    settings = settings_for(
        prompts,
        max_steps=5,
        value_warmup_steps=2,
        num_epochs=1,
        warmup_frac=1 / 6,
        lr_schedule="linear",
        min_lr_frac=0.0,
    )

    def rates(directory):
        lines = read_steps(directory / "work" / "metrics.jsonl")
        return [line.get("ppo/lr") for line in lines]

    _, whole, _ = run_in(tmp_path / "whole", settings, inputs)
    factors = [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]
    means = [1e-3 * (factors[index] + factors[index + 1]) / 2 for index in (0, 2, 4)]
    assert rates(tmp_path / "whole") == [None, None, *map(pytest.approx, means)]
    run_killed_in_step(3, tmp_path / "killed", settings, inputs, monkeypatch)
    _, resumed, _ = run_in(tmp_path / "killed", settings, inputs)
    assert rates(tmp_path / "killed") == rates(tmp_path / "whole") and resumed == whole


def test_a_run_whose_only_iteration_ends_in_bad_steps_keeps_what_was_learnt_before_them(
    inputs, prompts, tmp_path, monkeypatch
):
    """Of its ten updates of the policy the last four are no numbers, and there is no checkpoint to go back
    to.
    """
    settings = settings_for(prompts, max_steps=1, num_epochs=5)
    take_step = Trained.take_step

    def spoiled(self, step, packs, reads, loss_of, accepts):
        bad = torch.nan if step >= 6 and isinstance(self.model, CausalLM) else 1.0
        return take_step(self, step, packs, reads, times(loss_of, bad), accepts)

    monkeypatch.setattr(Trained, "take_step", spoiled)
    metrics, _, rollouts = run_in(tmp_path, settings, inputs)
    assert metrics["steps"] == metrics["version_final"] == 1.0 and metrics["steps_skipped"] == 4.0
    assert metrics["training_seconds"] > 0 and len(rollouts.splitlines()) == 8
    (line,) = read_steps(tmp_path / "work" / "metrics.jsonl")
    assert line["step"] == 1 and line["train/skipped_steps"] == 4.0
    assert line["rollout/score"] == metrics["score_final"]
    before, after = (
        load_file(directory / "model.safetensors") for directory in (inputs["policy"], tmp_path / "out")
    )
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_run_that_trained_on_no_token_at_all_is_no_success(inputs, prompts, tmp_path):
    """No response of one token has an end; what is cut off is left out."""
    settings = settings_for(prompts, max_response_tokens=1, truncation="mask", max_steps=2)
    with pytest.raises(
        TrainingStopped,
        match=r"^ppo: none of the steps was taken: every response of a batch was cut off, .*penalty$",
    ):
        run_in(tmp_path, settings, inputs)
    assert not list((tmp_path / "out").iterdir())


def test_a_kl_beyond_its_cap_stops_the_run(inputs, prompts, tmp_path):
    with pytest.raises(TrainingStopped, match=r"ppo step \d+: KL to the reference is .* above ppo\.max_kl"):
        run_in(tmp_path, settings_for(prompts, lr=0.5, max_steps=3, max_kl=0.5, max_grad_norm=1e3), inputs)


def test_of_a_file_that_changed_while_it_was_read_nothing_is_kept(inputs, prompts, tmp_path):
    def found_changed(*, trusting_stamps: bool = False) -> None:
        raise DataError("prompts.jsonl: changed since the run was planned")

    runtime = replace(runtime_in(tmp_path, "ppo"), check_files=found_changed)
    with pytest.raises(DataError, match="changed since the run was planned"):
        run_recipe(settings_for(prompts), inputs, tmp_path / "out", runtime)
    assert not list((tmp_path / "out").iterdir()) and not list((tmp_path / "work").iterdir())


def test_pin_18_a_reward_model_with_another_tokenizer_is_refused(inputs, prompts, tmp_path):
    other = tmp_path / "reward"
    other.mkdir()
    for path in inputs["reward_model"].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="its tokenizer is not the policy's"):
        run_in(tmp_path / "run", settings_for(prompts), {"policy": inputs["policy"], "reward_model": other})
    unplaced = runtime_in(tmp_path / "before a place is asked for", "ppo", num_workers=1)
    with pytest.raises(ModelError, match="its tokenizer is not the policy's"):
        run_recipe(settings_for(prompts), {**inputs, "reward_model": other}, tmp_path / "out", unplaced)
