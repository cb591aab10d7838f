"""Rollout correction in PPO's update: hand-computed losses, and which terms it leaves alone."""

from dataclasses import replace

import pytest
import torch
from inline import worker_in
from ppo_inputs import Parts, joined, ppo_inputs, with_turn

from stages.config.correction import CORRECTIONS, RolloutCorrectionConfig
from stages.config.data import DataSource
from stages.config.ppo import PPOConfig
from stages.training.fsdp import Trained

CONFIG = PPOConfig(
    data=[DataSource(path="unused")],
    max_steps=3,
    num_prompts=8,
    batch_size=8,
    micro_batch_size=8,
    max_response_tokens=6,
    num_epochs=1,
    warmup_frac=0.0,
)


@pytest.fixture(scope="module")
def inputs(tied_model_dir, tmp_path_factory):
    return ppo_inputs(tied_model_dir, tmp_path_factory.mktemp("reward"))


def batch_of(parts):
    """Eight trajectories, in their order, whose engine is off by so much noise per token that the correction
    limits some of them and not all; as judged, and ready for an update.
    """
    nats = 0.02 if parts.config.rollout_correction.type == "geometric_mask" else 0.5
    batch = parts.judged()
    generator = torch.Generator().manual_seed(1)
    noise = {str(index): nats * torch.randn(6, generator=generator) for index in range(8)}
    sampled = []
    for one, logprobs_T in zip(batch.trajectories, batch.anchor_logprobs_BT, strict=True):
        off_T = logprobs_T + noise[one.id]
        sampled.append(with_turn(one, logprobs=tuple(off_T[: len(one.turn.response_ids)].tolist())))
    batch = parts.judged(sorted(sampled, key=lambda one: int(one.id)))
    return batch, parts.experiences(batch, kl_coef=parts.config.kl_coef)


def loss_and_gradient(inputs, tmp_path, monkeypatch, config, change=lambda item: item):
    """The policy's, of the one step of a batch; and the batch with its experiences."""
    parts = Parts(config, inputs, worker_in(tmp_path, "ppo"))
    batch, experiences = batch_of(parts)
    take_step, found = Trained.take_step, {}

    def keeping(self, step, packs, reads, loss_of, accepts):
        result = take_step(self, step, packs, reads, loss_of, lambda *_: False)
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        found[self] = result.loss, torch.cat(gradients)
        return replace(result, taken=True)

    with monkeypatch.context() as patch:
        patch.setattr(Trained, "take_step", keeping)
        parts.learner.update(0, [change(item) for item in experiences])
    return (*found[parts.models.policy], batch, experiences)


def with_type(kind, **changes):
    return CONFIG.model_copy(update={"rollout_correction": RolloutCorrectionConfig(type=kind), **changes})


def weight_by_hand(kind, log_ratios):
    """The weight of each token of one response."""
    low, high = CORRECTIONS[kind].min_weight, CORRECTIONS[kind].max_weight
    if kind.startswith("sequence"):
        log_ratios = log_ratios.sum().expand(len(log_ratios))
    if kind.startswith("geometric"):
        log_ratios = log_ratios.mean().expand(len(log_ratios))
    ratios = log_ratios.exp()
    if kind == "off":
        return torch.ones(len(ratios))
    if kind.endswith("truncate"):
        return ratios.clamp(max=high)
    return torch.where((ratios >= low) & (ratios <= high), ratios, 0.0)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_with_one_update_the_policy_loss_is_the_mean_of_minus_weight_times_advantage(
    inputs, tmp_path, monkeypatch, kind
):
    """The ratio policy / anchor is 1: the anchor is that of the forward, and the experience has none."""
    loss, _, batch, experiences = loss_and_gradient(inputs, tmp_path, monkeypatch, with_type(kind))
    assert all(item.anchor_logprobs_BT is None for item in experiences)
    terms = [
        -weight_by_hand(kind, (anchor_T - rollout_T)[mask_T]) * advantages_T[mask_T]
        for anchor_T, rollout_T, advantages_T, mask_T in zip(
            batch.anchor_logprobs_BT,
            batch.rollout_logprobs_BT,
            joined(experiences, "advantages_BT"),
            joined(experiences, "mask_BT"),
            strict=True,
        )
    ]
    assert loss == pytest.approx(float(torch.cat(terms).mean()), abs=1e-5)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_pin_33_the_corrected_gradient_is_the_same_however_the_batch_is_split(
    inputs, tmp_path, monkeypatch, kind
):
    whole, gradient, *_ = loss_and_gradient(inputs, tmp_path, monkeypatch, with_type(kind))
    assert gradient.norm() > 0
    for size in (1, 4):
        split = with_type(kind, micro_batch_size=size)
        loss, parts, *_ = loss_and_gradient(inputs, tmp_path, monkeypatch, split)
        assert loss == pytest.approx(whole, abs=1e-6)
        assert (parts - gradient).norm() <= 2e-6 * gradient.norm()


def test_over_several_updates_weights_are_of_the_anchor_and_not_of_the_moving_policy(
    inputs, tmp_path, monkeypatch
):
    """The same loss and gradient as with one update, for the first of two steps."""
    one, gradient, *_ = loss_and_gradient(inputs, tmp_path, monkeypatch, with_type("token_truncate"))
    several = with_type("token_truncate", num_epochs=2)
    monkeypatch.setattr("stages.rl.update.minibatches", lambda packs, **_: [list(packs)])
    loss, again, *_ = loss_and_gradient(inputs, tmp_path, monkeypatch, several)
    assert loss == pytest.approx(one, abs=1e-6)
    torch.testing.assert_close(again, gradient, rtol=1e-5, atol=1e-7)
    moved, *_ = loss_and_gradient(
        inputs,
        tmp_path,
        monkeypatch,
        several,
        change=lambda item: replace(item, anchor_logprobs_BT=item.anchor_logprobs_BT + 0.1),
    )
    assert moved != pytest.approx(one, abs=1e-3)


@pytest.mark.parametrize("placement", [("loss", "k2"), ("kl_surrogate", "k3")])
def test_the_kl_term_and_the_entropy_are_not_weighed(inputs, tmp_path, monkeypatch, placement):
    kl_placement, kl_estimator = placement
    changes = {
        "kl_placement": kl_placement,
        "kl_estimator": kl_estimator,
        "kl_coef": 0.5,
        "entropy_coef": 0.1,
    }

    def silent(item):
        moved = item.reference_logprobs_BT - 0.3
        zeros = torch.zeros_like(item.advantages_BT)
        return replace(item, advantages_BT=zeros, reference_logprobs_BT=moved)

    found = [
        loss_and_gradient(inputs, tmp_path, monkeypatch, with_type(kind, **changes), change=silent)
        for kind in ("off", "sequence_mask")
    ]
    assert found[0][1].norm() > 0
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_auto_is_token_truncate_at_2_in_bf16_or_with_stale_rollouts_and_off_in_synchronous_fp32():
    bf16 = CONFIG.model_copy(update={"precision": "bf16"})
    assert str(bf16.correction(max_staleness=0)) == "token_truncate, max 2"
    assert str(CONFIG.correction(max_staleness=1)) == "token_truncate, max 2"
    assert str(CONFIG.correction(max_staleness=0)) == "off"
    assert str(with_type("token_mask").correction(max_staleness=0)) == "token_mask, min 0.5, max 5"
    assert str(with_type("geometric_mask").correction(max_staleness=0)) == (
        "geometric_mask, min 0.99, max 1.01"
    )
    given = RolloutCorrectionConfig(type="sequence_mask", max=3)
    assert str(given.in_force(default="off")) == "sequence_mask, min 0.5, max 3"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "token_truncate", "min": 0.5}, "from above only; remove min, or use type token_mask"),
        ({"type": "sequence_truncate", "min": 0.5}, "remove min, or use type sequence_mask"),
        ({"max": 3}, "type auto takes no max and no min; remove them, or set type to one of token_truncate"),
        ({"type": "off", "min": 0.5}, "type off takes no max and no min"),
        ({"type": "token_mask", "min": 1, "max": 1}, "min 1 is not below max 1"),
        ({"type": "token_truncate", "max": 0.5}, "greater than or equal to 1"),
        ({"type": "token_mask", "min": 1.5}, "less than or equal to 1"),
    ],
)  # fmt: skip
def test_pin_31_the_config_refuses_limits_that_a_type_does_not_have(settings, said):
    with pytest.raises(ValueError, match=said):
        RolloutCorrectionConfig(**settings)
