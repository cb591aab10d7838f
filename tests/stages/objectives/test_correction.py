"""Rollout correction by hand: each type's weights, what they do to loss and gradient, and what they leave."""

import math

import pytest
import torch

from stages.config.correction import CORRECTIONS
from stages.objectives.correction import correction_weights
from stages.objectives.losses import aggregation_denominator, policy_loss

F64 = torch.float64
# Trainer over engine, per token: two responses of four and two tokens.
RATIOS = [[0.25, 0.6, 2.5, 6.0], [1.1, 0.9, math.nan, math.nan]]
MASK_BT = torch.tensor([[True] * 4, [True, True, False, False]])
PRODUCT, MEAN = 0.25 * 0.6 * 2.5 * 6.0, math.sqrt(1.1 * 0.9)
GEOMETRIC = PRODUCT**0.25
WEIGHTS = {  # with the default limits
    "off": [[1, 1, 1, 1], [1, 1, 0, 0]],
    "token_truncate": [[0.25, 0.6, 2, 2], [1.1, 0.9, 0, 0]],
    "token_mask": [[0, 0.6, 2.5, 0], [1.1, 0.9, 0, 0]],
    "sequence_truncate": [[2] * 4, [0.99, 0.99, 0, 0]],
    "sequence_mask": [[PRODUCT] * 4, [0.99, 0.99, 0, 0]],
    "geometric_mask": [[0] * 4, [MEAN, MEAN, 0, 0]],
}


def weights_of(kind, ratios=RATIOS, mask_BT=MASK_BT, **limits):
    correction = CORRECTIONS[kind]
    rollout_BT = torch.full(mask_BT.shape, -3.0, dtype=F64)
    return correction_weights(
        anchor_logprobs_BT=torch.tensor(ratios, dtype=F64).log() + rollout_BT,
        rollout_logprobs_BT=rollout_BT,
        mask_BT=mask_BT,
        kind=kind,
        min_weight=limits.get("min_weight", correction.min_weight),
        max_weight=limits.get("max_weight", correction.max_weight),
    )


def loss_of(kind, *, rows=slice(None), denominator=None):
    """The policy loss of the rows with advantages 2 and -1, and its gradient by the policy's log-probs. The
    policy has moved from the anchor by ln 1.1: within the clip.
    """
    found, mask_BT = weights_of(kind), MASK_BT[rows]
    policy_BT = torch.full(mask_BT.shape, math.log(1.1), dtype=F64, requires_grad=True)
    advantages_BT = torch.tensor([[2.0] * 4, [-1.0] * 4], dtype=F64)[rows]
    if denominator is None:
        denominator = aggregation_denominator(masks=[MASK_BT], aggregation="token_mean", constant_length=None)
    loss = policy_loss(
        policy_logprobs_BT=policy_BT,
        anchor_logprobs_BT=torch.zeros_like(policy_BT),
        advantages_BT=advantages_BT,
        importance_weights_BT=found.weights_BT[rows],
        mask_BT=mask_BT,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        aggregation="token_mean",
        denominator=denominator,
    ).loss
    (gradient_BT,) = torch.autograd.grad(loss, policy_BT)
    return loss.item(), gradient_BT


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_weights_of_each_type_by_hand(kind):
    found = weights_of(kind)
    expected_BT = torch.tensor(WEIGHTS[kind], dtype=F64)
    torch.testing.assert_close(found.weights_BT, expected_BT, rtol=1e-9, atol=1e-12)
    limited = {
        "off": [],
        "token_truncate": [2, 3],
        "token_mask": [0, 3],
        "sequence_truncate": [0, 1, 2, 3],
        "sequence_mask": [],
        "geometric_mask": [0, 1, 2, 3],
    }[kind]
    assert found.limited_BT.nonzero().tolist() == [[0, token] for token in limited]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_ratios_are_those_before_the_limits_of_what_the_type_compares(kind):
    tokens = [[0.25, 0.6, 2.5, 6.0], [1.1, 0.9, 0, 0]]
    expected = {
        "sequence": [[PRODUCT] * 4, [0.99, 0.99, 0, 0]],
        "geometric": [[GEOMETRIC] * 4, [MEAN, MEAN, 0, 0]],
    }.get(kind.partition("_")[0], tokens)
    torch.testing.assert_close(weights_of(kind).ratios_BT, torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_pin_31_weights_multiply_loss_and_gradient_and_leave_the_count(kind):
    """Over the six tokens of both responses, whatever is masked: -1.1 A w / 6 each, value and gradient."""
    loss, gradient_BT = loss_of(kind)
    advantages_BT = torch.tensor([[2.0] * 4, [-1.0] * 4], dtype=F64)
    expected_BT = -1.1 * advantages_BT * torch.tensor(WEIGHTS[kind], dtype=F64) / 6
    torch.testing.assert_close(gradient_BT, expected_BT, rtol=1e-9, atol=1e-12)
    assert loss == pytest.approx(float(expected_BT.sum()), rel=1e-9)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_pin_33_splitting_the_batch_changes_neither_loss_nor_gradient(kind):
    whole, gradient_BT = loss_of(kind)
    six = torch.tensor(6.0)
    parts = [loss_of(kind, rows=slice(row, row + 1), denominator=six) for row in range(2)]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient_BT, rtol=1e-12, atol=0)


def test_pin_31_weights_carry_no_gradient_and_truncation_caps_from_above_only():
    anchor_BT = torch.zeros(1, 2, requires_grad=True)
    found = correction_weights(
        anchor_logprobs_BT=anchor_BT,
        rollout_logprobs_BT=torch.tensor([[20.0, -20.0]]),
        mask_BT=torch.ones(1, 2, dtype=torch.bool),
        kind="token_truncate",
        min_weight=0.0,
        max_weight=2.0,
    )
    assert not found.weights_BT.requires_grad
    assert found.weights_BT[0].tolist() == pytest.approx([math.exp(-20), 2.0])
    with pytest.raises(ValueError, match="truncation caps from above only"):
        weights_of("token_truncate", min_weight=0.5)


def test_the_limits_of_a_mask_are_within_it():
    """At the limits themselves a token keeps its weight: exp(0) is 1 exactly."""
    ones_BT = torch.ones(1, 2, dtype=torch.bool)
    for limits in ({"max_weight": 1.0}, {"min_weight": 1.0}):
        found = weights_of("token_mask", [[1.0, 1.0]], ones_BT, **limits)
        assert found.weights_BT.tolist() == [[1.0, 1.0]] and not found.limited_BT.any()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_where_engine_and_trainer_agree_every_weight_is_exactly_one(kind):
    ones_BT = torch.ones(1, 3, dtype=torch.bool)
    found = weights_of(kind, [[1.0] * 3], ones_BT)
    assert found.weights_BT.tolist() == [[1.0] * 3] and not found.limited_BT.any()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_that_is_not_a_number_is_not_hidden_unless_nothing_reads_it(kind):
    found = weights_of(kind, [[1.0, math.nan]], torch.ones(1, 2, dtype=torch.bool))
    assert found.weights_BT.isfinite().all() == (kind == "off")


def test_a_response_without_a_token_has_weights_of_zero():
    for kind in WEIGHTS:
        found = weights_of(kind, [[2.0, 2.0]], torch.zeros(1, 2, dtype=torch.bool))
        assert found.weights_BT.tolist() == [[0.0, 0.0]] and not found.limited_BT.any()
