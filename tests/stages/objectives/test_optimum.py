"""What each placement of the KL optimises: exact expected gradients of a policy small enough to enumerate.

A two-token response over three tokens: nine sequences, a row of logits for the first token, one for the
second after each first one. Expectations are sums over all nine, written as a batch sampled uniformly with
the importance weight of the policy, so what is differentiated are the losses a recipe calls.
"""

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.objectives.advantages import gae, token_rewards
from stages.objectives.losses import (
    aggregation_denominator,
    kl_surrogate_loss,
    policy_loss,
    sequence_importance_weights,
    sequence_kl_loss,
)

BETA, V = 0.5, 3
F64 = torch.float64
SEQUENCES_BT = torch.tensor(list(itertools.product(range(V), repeat=2)))
NUM_SEQUENCES = len(SEQUENCES_BT)
MASK_BT = torch.ones(NUM_SEQUENCES, 2, dtype=torch.bool)
UNIFORM_BT = torch.full((NUM_SEQUENCES, 2), -math.log(V), dtype=F64)  # log-probs of what "sampled" the batch
DENOMINATOR = aggregation_denominator(
    masks=[MASK_BT], aggregation="sequence_mean_token_sum", constant_length=None
)
SHARED: dict[str, Any] = {
    "mask_BT": MASK_BT,
    "aggregation": "sequence_mean_token_sum",
    "denominator": DENOMINATOR,
}


def logprobs_of(logits: Tensor) -> Tensor:
    """logits [1 + V, V] (first token; second token after each first one) -> logprobs_BT of all sequences."""
    log_softmax = logits.log_softmax(-1)
    first_B, second_B = SEQUENCES_BT.unbind(-1)
    return torch.stack([log_softmax[0, first_B], log_softmax[1 + first_B, second_B]], dim=-1)


@functools.cache
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Reference log-probs, scores, and the logits of pi* proportional to pi_ref exp(score / beta)."""
    generator = torch.Generator().manual_seed(0)
    reference_BT = logprobs_of(torch.randn(1 + V, V, generator=generator, dtype=F64))
    scores_B = torch.randn(NUM_SEQUENCES, generator=generator, dtype=F64)
    joint = (reference_BT.sum(-1) + scores_B / BETA).softmax(0).view(V, V)
    return reference_BT, scores_B, torch.cat([joint.sum(1)[None].log(), joint.log()])


def weights_of(policy_BT: Tensor) -> Tensor:
    return sequence_importance_weights(
        logprobs_BT=policy_BT,
        rollout_logprobs_BT=UNIFORM_BT,
        mask_BT=MASK_BT,
        max_weight=math.inf,
        beyond="truncate",
    )


def policy_term(policy_BT: Tensor, reference_BT: Tensor, scores_B: Tensor, beta_in_reward: float) -> Tensor:
    rewards_BT = token_rewards(
        scores_B=scores_B,
        anchor_logprobs_BT=policy_BT,
        reference_logprobs_BT=reference_BT,
        mask_BT=MASK_BT,
        kl_coef=beta_in_reward,
    )
    result = gae(
        rewards_BT=rewards_BT,
        values_BT=torch.zeros_like(rewards_BT),
        mask_BT=MASK_BT,
        final_values_B=torch.zeros_like(scores_B),
        gamma=1.0,
        lam=1.0,
    )
    return policy_loss(
        policy_logprobs_BT=policy_BT,
        anchor_logprobs_BT=policy_BT.detach(),
        advantages_BT=result.advantages_BT,
        importance_weights_BT=weights_of(policy_BT)[:, None].expand_as(policy_BT),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        **SHARED,
    ).loss


def kl_term(placement: str, policy_BT: Tensor, reference_BT: Tensor) -> Tensor:
    weights_B = weights_of(policy_BT)
    if placement == "sequence k2 loss":
        return sequence_kl_loss(
            policy_logprobs_BT=policy_BT,
            reference_logprobs_BT=reference_BT,
            importance_weights_B=weights_B,
            mask_BT=MASK_BT,
            denominator=DENOMINATOR,
        )
    return kl_surrogate_loss(
        policy_logprobs_BT=policy_BT,
        reference_logprobs_BT=reference_BT,
        importance_weights_BT=weights_B[:, None].expand_as(policy_BT),
        estimator="k2" if placement == "surrogate k2" else "k3",
        **SHARED,
    )


def gradient(placement: str, logits: Tensor) -> Tensor:
    """Of the expected loss under that placement of the KL, at `logits`."""
    reference_BT, scores_B, _ = problem()
    logits = logits.clone().requires_grad_()
    policy_BT = logprobs_of(logits)
    if placement == "k1 reward":
        loss = policy_term(policy_BT, reference_BT, scores_B, BETA)
    else:
        loss = policy_term(policy_BT, reference_BT, scores_B, 0.0)
        loss = loss + BETA * kl_term(placement, policy_BT, reference_BT)
    (result,) = torch.autograd.grad(loss, logits)
    return result


def exact_gradient(logits: Tensor) -> Tensor:
    """Of -(E[score] - beta KL(policy || reference)), by differentiating the sum over all sequences."""
    reference_BT, scores_B, _ = problem()
    logits = logits.clone().requires_grad_()
    log_policy_B = logprobs_of(logits).sum(-1)
    objective = (log_policy_B.exp() * (scores_B - BETA * (log_policy_B - reference_BT.sum(-1)))).sum()
    (result,) = torch.autograd.grad(-objective, logits)
    return result


def total_variation(logits: Tensor) -> float:
    policy_B, optimum_B = (logprobs_of(x).sum(-1).exp() for x in (logits, problem()[2]))
    return (policy_B - optimum_B).abs().sum().item() / 2


def fixed_point(placement: str) -> Tensor:
    logits = torch.zeros(1 + V, V, dtype=F64)
    for _ in range(250):
        logits = logits - 2.0 * gradient(placement, logits)
    return logits


@pytest.mark.parametrize("placement", ["k1 reward", "sequence k2 loss"])
def test_pin_28_k1_in_the_reward_and_sequence_k2_as_a_loss_have_the_exact_gradient(placement):
    """Everywhere the gradient of the KL-regularised objective; hence zero at pi*."""
    torch.manual_seed(1)
    for _ in range(3):
        logits = torch.randn(1 + V, V, dtype=F64)
        expected = exact_gradient(logits)
        assert expected.norm() > 0.05
        assert torch.allclose(gradient(placement, logits), expected, atol=1e-7)
    optimum = problem()[2]
    assert gradient(placement, optimum).norm() < 1e-7


@pytest.mark.parametrize("placement", ["surrogate k2", "surrogate k3"])
def test_pin_28_per_token_k2_or_k3_as_a_loss_has_another_optimum(placement):
    optimum = problem()[2]
    assert gradient(placement, optimum).norm() > 1e-2
    logits = fixed_point(placement)
    assert gradient(placement, logits).norm() < 1e-3
    assert total_variation(logits) > 0.02


RAGGED = torch.tensor([0, *range(V, NUM_SEQUENCES)])
"""Of SEQUENCES_BT: a response whose first token is 0 ends there, so that there are 7 of 1 or 2 tokens."""
RAGGED_MASK_BT = torch.tensor([[True, row >= V] for row in RAGGED.tolist()])
RAGGED_SAMPLED_BT = torch.tensor([[-math.log(len(RAGGED)), 0.0]] * len(RAGGED), dtype=F64)


def ragged_joint(policy_BT: Tensor) -> Tensor:
    return (policy_BT * RAGGED_MASK_BT).sum(-1)


def ragged_denominator(aggregation: str) -> Tensor:
    return aggregation_denominator(
        masks=[RAGGED_MASK_BT],
        aggregation=aggregation,
        constant_length=40.0 if aggregation == "constant" else None,
    )


def ragged_gradient(aggregation: str, logits: Tensor) -> Tensor:
    """Of policy loss + beta * sequence KL loss, both over the denominator of `aggregation`."""
    reference_BT, scores_B = problem()[0][RAGGED], problem()[1][RAGGED]
    denominator = ragged_denominator(aggregation)
    logits = logits.clone().requires_grad_()
    policy_BT = logprobs_of(logits)[RAGGED]
    weights_B = sequence_importance_weights(
        logprobs_BT=policy_BT,
        rollout_logprobs_BT=RAGGED_SAMPLED_BT,
        mask_BT=RAGGED_MASK_BT,
        max_weight=math.inf,
        beyond="truncate",
    )
    policy = policy_loss(
        policy_logprobs_BT=policy_BT,
        anchor_logprobs_BT=policy_BT.detach(),
        advantages_BT=scores_B[:, None].expand_as(policy_BT),
        importance_weights_BT=weights_B[:, None].expand_as(policy_BT),
        mask_BT=RAGGED_MASK_BT,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        aggregation=aggregation,
        denominator=denominator,
    ).loss
    kl = sequence_kl_loss(
        policy_logprobs_BT=policy_BT,
        reference_logprobs_BT=reference_BT,
        importance_weights_B=weights_B,
        mask_BT=RAGGED_MASK_BT,
        denominator=denominator,
    )
    (result,) = torch.autograd.grad(policy + BETA * kl, logits)
    return result


def ragged_exact_gradient(logits: Tensor) -> Tensor:
    reference_B, scores_B = ragged_joint(problem()[0][RAGGED]), problem()[1][RAGGED]
    logits = logits.clone().requires_grad_()
    log_policy_B = ragged_joint(logprobs_of(logits)[RAGGED])
    objective = (log_policy_B.exp() * (scores_B - BETA * (log_policy_B - reference_B))).sum()
    (result,) = torch.autograd.grad(-objective, logits)
    return result


def ragged_optimum() -> Tensor:
    """Logits of pi* over the seven responses."""
    joint = (ragged_joint(problem()[0][RAGGED]) + problem()[1][RAGGED] / BETA).softmax(0)
    seconds = joint[1:].view(V - 1, V)
    first = torch.cat([joint[:1], seconds.sum(1)])
    return torch.cat([first[None], torch.ones(1, V, dtype=F64), seconds]).log()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_sum", "constant"])
def test_pin_28_at_unequal_lengths_the_sequence_kl_loss_beside_the_policy_loss_keeps_pi_star(aggregation):
    """One factor for both: the batch of responses over what the losses are divided by."""
    factor = len(RAGGED) / ragged_denominator(aggregation)
    torch.manual_seed(2)
    for _ in range(3):
        logits = torch.randn(1 + V, V, dtype=F64)
        expected = factor * ragged_exact_gradient(logits)
        torch.testing.assert_close(
            ragged_gradient(aggregation, logits) / factor, expected / factor, atol=1e-6, rtol=0
        )
    assert (ragged_gradient(aggregation, ragged_optimum()) / factor).norm() < 1e-6


def test_a_policy_loss_that_divides_by_each_length_has_no_common_factor_with_the_kl_of_whole_responses():
    """Why the config refuses it: what it stops at is not pi*."""
    optimum = ragged_optimum()
    assert ragged_exact_gradient(optimum).norm() < 1e-12
    assert ragged_gradient("sequence_mean_token_mean", optimum).norm() > 1e-2


def test_pin_28_descending_with_k1_in_the_reward_arrives_at_pi_star():
    assert total_variation(fixed_point("k1 reward")) < 5e-3


def test_pin_28_k1_as_a_loss_has_no_gradient_at_all():
    """Why the surrogate refuses it: E[grad log policy] = 0."""
    logits = problem()[2].clone().requires_grad_()
    policy_BT = logprobs_of(logits)
    loss = (weights_of(policy_BT) * (policy_BT - problem()[0]).sum(-1)).sum() / NUM_SEQUENCES
    (result,) = torch.autograd.grad(loss, logits)
    assert result.norm() < 1e-12
