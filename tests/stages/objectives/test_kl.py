import math

import pytest
import torch

from stages.objectives.kl import AdaptiveKl, FixedKl, estimate_kl, k1, k2, k3, sequence_log_ratio
from stages.objectives.logprobs import MAX_LOG_RATIO

LOG_RATIOS = [-30.0, -5.0, -1.0, -1e-3, 0.0, 1e-3, 0.3, 4.0, 90.0]


def exact(estimator, x):
    """Value and slope in x = log(policy / reference), in Python floats."""
    if estimator == "k1":
        return x, 1.0
    if estimator == "k2":
        return x * x / 2, x
    if x < -MAX_LOG_RATIO:  # the tangent
        top = math.exp(MAX_LOG_RATIO)
        return top * (1 - x - MAX_LOG_RATIO) - 1 + x, 1 - top
    small = x * x / 2 - x**3 / 6 + x**4 / 24
    return (small if abs(x) < 0.01 else math.expm1(-x) + x), -math.expm1(-x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_pin_28_estimators_against_a_float64_reference_value_and_gradient(estimator, dtype):
    reference = torch.zeros(len(LOG_RATIOS), dtype=dtype)
    policy = torch.tensor(LOG_RATIOS, dtype=dtype, requires_grad=True)
    values = estimate_kl(estimator=estimator, policy_logprobs=policy, reference_logprobs=reference)
    (slopes,) = torch.autograd.grad(values.sum(), policy)
    expected_values, expected_slopes = zip(*(exact(estimator, x) for x in policy.tolist()), strict=True)
    assert values.dtype == dtype
    assert values.tolist() == pytest.approx(expected_values, rel=1e-6, abs=1e-15)
    assert slopes.tolist() == pytest.approx(expected_slopes, rel=1e-6, abs=1e-12)


def test_pin_28_nothing_overflows_in_float32():
    for estimator in ("k1", "k2", "k3"):
        policy = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
        values = estimate_kl(
            estimator=estimator, policy_logprobs=policy, reference_logprobs=torch.zeros_like(policy)
        )
        (slopes,) = torch.autograd.grad(values.sum(), policy)
        assert values.isfinite().all() and slopes.isfinite().all()
    assert slopes[0] < -1e8, "k3 must still pull a policy back that has run away"


def test_pin_28_k1_and_k3_are_unbiased_and_k2_is_not():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    true_kl = (policy.exp() * (policy - reference)).sum()

    def expectation(estimator):
        return (policy.exp() * estimator(policy_logprobs=policy, reference_logprobs=reference)).sum()

    assert torch.allclose(expectation(k1), true_kl) and torch.allclose(expectation(k3), true_kl)
    assert (expectation(k2) - true_kl).abs() > 0.01


def test_unknown_estimators_and_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="k4"):
        estimate_kl(estimator="k4", policy_logprobs=torch.zeros(1), reference_logprobs=torch.zeros(1))
    with pytest.raises(ValueError, match="shapes"):
        k1(policy_logprobs=torch.zeros(2, 3), reference_logprobs=torch.zeros(3))


def test_the_log_ratio_of_a_sequence_sums_its_real_tokens():
    ratio_B = sequence_log_ratio(
        policy_logprobs_BT=torch.tensor([[-1.0, -2.0, torch.nan], [-5.0, -5.0, -5.0]]),
        reference_logprobs_BT=torch.tensor([[-1.5, -3.0, 0.0], [0.0, 0.0, 0.0]]),
        mask_BT=torch.tensor([[True, True, False], [False, False, False]]),
    )
    assert ratio_B.tolist() == [1.5, 0.0]


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.005), (60.0, 1.01), (5.4, 0.995), (0.0, 0.99), (-3.0, 0.99)]
)
def test_pin_29_adaptive_kl_by_hand(kl, factor):
    controller = AdaptiveKl(coef=0.1, target=6.0, horizon=10_000)
    assert controller.updated(kl=kl, num_sequences=500).coef == pytest.approx(0.1 * factor, rel=1e-12)
    assert controller.coef == 0.1


def test_pin_29_the_state_of_a_controller_survives_a_checkpoint():
    fresh = AdaptiveKl(coef=0.1, target=6.0, horizon=1000)
    moved = fresh.updated(kl=9.0, num_sequences=64).updated(kl=1.0, num_sequences=32)
    resumed = fresh.restored(moved.state_dict())
    assert resumed == moved and resumed != fresh
    assert resumed.updated(kl=7.0, num_sequences=8) == moved.updated(kl=7.0, num_sequences=8)
    fixed = FixedKl(coef=0.05)
    assert fixed.updated(kl=1e3, num_sequences=10) == fixed == fixed.restored(fixed.state_dict())


def test_controllers_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="coefficient"):
        FixedKl(coef=-0.1)
    with pytest.raises(ValueError, match="target"):
        AdaptiveKl(coef=0.1, target=0.0, horizon=10)
