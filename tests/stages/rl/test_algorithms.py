"""The parts of an algorithm together: which models are loaded, what one forward serves, what packs change."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from inline import worker_in
from ppo_inputs import Parts, joined, ppo_inputs, some_trajectories

from stages.config.data import DataSource
from stages.config.ppo import TRAINED_ROLES, PPOConfig, Role
from stages.rl.experience import Credited, batch_metrics, experiences_of
from stages.rl.roles import Judges, load_models, scores_to_commit
from stages.rl.trajectories import Batch
from stages.rl.update import Learner
from stages.training.fsdp import outputs_of

CONFIG = PPOConfig(
    data=[DataSource(path="unused")],
    max_steps=2,
    num_prompts=8,
    batch_size=4,
    micro_batch_size=2,
    max_response_tokens=6,
    num_epochs=2,
    warmup_frac=0.0,
)


@pytest.fixture(scope="module")
def inputs(tied_model_dir, tmp_path_factory):
    return ppo_inputs(tied_model_dir, tmp_path_factory.mktemp("reward"))


def test_credit_does_not_depend_on_how_the_batch_is_packed(inputs, tmp_path):
    parts = Parts(CONFIG, inputs, worker_in(tmp_path, "ppo"))
    found = []
    for size in (1, 3, 8):
        batch = parts.judged(size=size)
        credited = parts.algorithm.credit(batch, kl_coef=0.05)
        ids = [trajectory.id for trajectory in batch.trajectories]
        order = torch.tensor(sorted(range(8), key=lambda row, ids=ids: int(ids[row])))
        found.append((credited.advantages_BT[order], credited.returns_BT[order], credited.mask_BT[order]))
    for advantages_BT, returns_BT, mask_BT in found[1:]:
        torch.testing.assert_close(advantages_BT, found[0][0], atol=1e-4, rtol=0)
        torch.testing.assert_close(returns_BT, found[0][1], atol=1e-5, rtol=0)
        assert torch.equal(mask_BT, found[0][2])


def test_all_terms_of_a_model_share_one_forward_of_each_pack(inputs, tmp_path, monkeypatch):
    """Policy, KL and entropy: 4 packs in each of 2 epochs, and as many of the value model."""
    terms = {"kl_placement": "loss", "kl_estimator": "k2", "entropy_coef": 0.01}
    parts = Parts(CONFIG.model_copy(update=terms), inputs, worker_in(tmp_path, "ppo"))
    assert [term.trains for term in parts.algorithm.terms] == ["value", "policy", "policy", "policy"]
    experiences = parts.experiences(parts.judged())
    forwards = []

    def counting(model, pack, reads):
        forwards.append(model)
        return outputs_of(model, pack, reads)

    monkeypatch.setattr("stages.training.fsdp.outputs_of", counting)
    parts.learner.update(0, experiences)
    policy, value = parts.models.policy.model, parts.models.value.model
    assert forwards[:4] == [value, value, policy, policy], "of the first minibatch, the value model first"
    assert forwards.count(policy) == forwards.count(value) == 8


def test_without_its_role_no_value_model_is_loaded_asked_or_trained(inputs, tmp_path):
    """As an algorithm without a critic would have it."""
    worker = worker_in(tmp_path, "ppo")
    parts = Parts(CONFIG, inputs, worker)
    algorithm = replace(
        parts.algorithm,
        roles=tuple(role for role in parts.algorithm.roles if role != "value"),
        terms=tuple(term for term in parts.algorithm.terms if term.trains == "policy"),
    )
    models = load_models(
        algorithm, CONFIG, worker, policy_dir=inputs["policy"], reward_dir=inputs["reward_model"]
    )
    assert models.value is None and list(models.trained) == ["policy"]
    judges = Judges(
        models=models,
        config=CONFIG,
        value_reads=parts.judges.value_reads,
        end_of_turn_id=parts.judges.end_of_turn_id,
        stop_token_ids=parts.judges.stop_token_ids,
        device=worker.device,
    )
    batch = judges.judge_packs(parts.judged().packs)
    assert batch.values_BT is None and batch.final_values_B is None
    advantages_BT = torch.where(batch.layout_BT, batch.scores_B[:, None], 0.0)
    credited = Credited(mask_BT=batch.layout_BT, advantages_BT=advantages_BT, returns_BT=advantages_BT)
    seen = batch_metrics(batch, credited, kl_coef=0.05, correction=algorithm.correction)
    assert "ppo/explained_variance" not in seen and "rollout/kl" in seen
    health = parts.learner.health
    learner = Learner(models.trained, algorithm.terms, CONFIG, seed=0, health=health)
    metrics = learner.update(0, experiences_of(batch, credited, kl_coef=0.05, keeps_anchor=True))
    assert learner.has_moved and "ppo/policy_loss" in metrics and "ppo/value_loss" not in metrics


def test_without_its_role_no_reward_model_is_loaded_and_scores_of_other_sources_count(inputs, tmp_path):
    """As with rewards of the source alone: two sources, whose scores of a response are added up."""
    worker = worker_in(tmp_path, "ppo")
    parts = Parts(CONFIG, inputs, worker)
    algorithm = replace(
        parts.algorithm,
        roles=("policy", "reference"),
        terms=tuple(term for term in parts.algorithm.terms if term.trains == "policy"),
    )
    models = load_models(algorithm, CONFIG, worker, policy_dir=inputs["policy"], reward_dir=None)
    assert models.reward_model is models.normaliser is models.value is None
    scored = [
        replace(one, scores={"rule": 0.25 * index, "format": 1.0})
        for index, one in enumerate(some_trajectories())
    ]
    batch = replace(parts.judges, models=models).judge(scored)
    assert batch.scores_B.tolist() == [1.0 + 0.25 * int(one.id) for one in batch.trajectories]
    commits = scores_to_commit(batch, Batch(position=0, trajectories=tuple(scored), is_replayed=False))
    assert commits == {"rule": [0.25 * index for index in range(8)], "format": [1.0] * 8}


def test_a_judged_trajectory_carries_the_reward_models_score_unless_the_journal_gave_it_one(inputs, tmp_path):
    parts = Parts(CONFIG, inputs, worker_in(tmp_path, "ppo"))
    drawn = some_trajectories()
    batch = parts.judges.judge(drawn)
    assert [[*one.scores] for one in batch.trajectories] == [["reward_model"]] * 8
    assert [one.scores["reward_model"] for one in batch.trajectories] == batch.scores_B.tolist()
    committed = [replace(one, scores={"reward_model": float(one.id)}) for one in drawn]
    replayed = parts.judges.judge(committed)
    assert replayed.scores_B.tolist() == [float(one.id) for one in replayed.trajectories]
    assert torch.equal(replayed.values_BT, batch.values_BT)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_the_models_that_are_loaded_are_the_roles_of_the_config(inputs, tmp_path, kl_coef):
    """The memory plan counts these roles too."""
    config = CONFIG.model_copy(update={"kl_coef": kl_coef})
    parts = Parts(config, inputs, worker_in(tmp_path, "ppo"))
    loaded = {role for role in get_args(Role) if getattr(parts.models, role) is not None}
    assert loaded == {*config.roles} == {*parts.algorithm.roles}
    assert {*parts.models.trained} == {*TRAINED_ROLES} == {term.trains for term in parts.algorithm.terms}
    assert ("reference" in config.roles) == (kl_coef > 0)


def test_an_experience_tells_what_is_learned_from_apart_from_what_is_laid_out(inputs, tmp_path):
    parts = Parts(CONFIG.model_copy(update={"truncation": "mask"}), inputs, worker_in(tmp_path, "ppo"))
    experiences = parts.experiences(parts.judged())
    laid_out = torch.cat([item.packed.mask_BT for item in experiences])
    learned_from = joined(experiences, "mask_BT")
    assert laid_out.any(-1).sum() == 8 and learned_from.any(-1).sum() == 5
    assert not (learned_from & ~laid_out).any()
