import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.objectives.advantages import (
    end_responses,
    gae,
    last_token_mask,
    process_scores,
    token_rewards,
)
from stages.objectives.masked import length_mask, masked_whiten

F64 = torch.float64


def quadratic_gae(rewards, values, final_value, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, one explicit sum per token: no recursion."""
    n = len(rewards)
    following = [*values[1:], final_value]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    seed=st.integers(0, 1000),
)
def test_pin_21_gae_equals_quadratic_reference_on_the_compressed_sequence(rows, gamma, lam, seed):
    """Any mask: padding at the end, and spans of tool output inside."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.tensor(rows)
    rewards_BT, values_BT = torch.randn(2, *mask_BT.shape, generator=generator, dtype=F64)
    final_values_B = torch.randn(len(rows), generator=generator, dtype=F64)
    result = gae(
        rewards_BT=rewards_BT.masked_fill(~mask_BT, torch.nan),
        values_BT=values_BT.masked_fill(~mask_BT, torch.nan),
        mask_BT=mask_BT,
        final_values_B=final_values_B,
        gamma=gamma,
        lam=lam,
    )
    for row, mask_T in enumerate(mask_BT):
        rewards, values = rewards_BT[row, mask_T].tolist(), values_BT[row, mask_T].tolist()
        expected = quadratic_gae(rewards, values, final_values_B[row].item(), gamma, lam)
        assert result.advantages_BT[row, mask_T].tolist() == pytest.approx(expected, abs=1e-12)
        returns = [a + v for a, v in zip(expected, values, strict=True)]
        assert result.returns_BT[row, mask_T].tolist() == pytest.approx(returns, abs=1e-12)
    assert (result.advantages_BT[~mask_BT] == 0).all() and (result.returns_BT[~mask_BT] == 0).all()


def test_pin_21_gae_by_hand():
    result = gae(
        rewards_BT=torch.tensor([[1.0, 2.0]]),
        values_BT=torch.tensor([[0.5, 1.0]]),
        mask_BT=torch.ones(1, 2, dtype=torch.bool),
        final_values_B=torch.tensor([4.0]),
        gamma=0.5,
        lam=0.5,
    )
    # delta_1 = 2 + 0.5 * 4 - 1 = 3; delta_0 = 1 + 0.5 * 1 - 0.5 = 1; A_0 = 1 + 0.25 * 3
    assert result.advantages_BT.tolist() == [[1.75, 3.0]]
    assert result.returns_BT.tolist() == [[2.25, 4.0]]


def test_pin_21_gamma_and_lambda_one_give_return_minus_value():
    torch.manual_seed(0)
    rewards_BT, values_BT = torch.randn(2, 3, 5, dtype=F64)
    mask_BT = length_mask(lengths=[5, 2, 0], max_length=5, device="cpu")
    result = gae(
        rewards_BT=rewards_BT,
        values_BT=values_BT,
        mask_BT=mask_BT,
        final_values_B=torch.zeros(3, dtype=F64),
        gamma=1.0,
        lam=1.0,
    )
    to_go_BT = (rewards_BT * mask_BT).flip(-1).cumsum(-1).flip(-1)
    assert torch.allclose(result.advantages_BT, (to_go_BT - values_BT) * mask_BT)


def test_pin_21_a_masked_extra_step_is_inert():
    torch.manual_seed(0)
    rewards_BT, values_BT = torch.randn(2, 2, 4)
    mask_BT = length_mask(lengths=[4, 3], max_length=4, device="cpu")
    rest = {"final_values_B": torch.tensor([0.0, 2.0]), "gamma": 0.9, "lam": 0.8}
    narrow = gae(rewards_BT=rewards_BT, values_BT=values_BT, mask_BT=mask_BT, **rest)
    wide = gae(
        rewards_BT=torch.cat([rewards_BT, torch.full((2, 1), 1e6)], 1),
        values_BT=torch.cat([values_BT, torch.full((2, 1), -1e6)], 1),
        mask_BT=torch.cat([mask_BT, torch.zeros(2, 1, dtype=torch.bool)], 1),
        **rest,
    )
    assert torch.equal(wide.advantages_BT[:, :4], narrow.advantages_BT)
    assert torch.equal(wide.returns_BT[:, :4], narrow.returns_BT)


def test_pin_22_returns_use_advantages_before_whitening():
    torch.manual_seed(0)
    rewards_BT, values_BT = torch.randn(2, 2, 3) * 5
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    result = gae(
        rewards_BT=rewards_BT,
        values_BT=values_BT,
        mask_BT=mask_BT,
        final_values_B=torch.zeros(2),
        gamma=1.0,
        lam=1.0,
    )
    to_go_BT = rewards_BT.flip(-1).cumsum(-1).flip(-1)
    assert torch.allclose(result.returns_BT, to_go_BT, atol=1e-5)  # of the rewards, not of unit variance
    whitened_BT = masked_whiten(values=result.advantages_BT, mask=mask_BT, shift_mean=True)
    assert not torch.allclose(result.returns_BT, whitened_BT + values_BT, atol=0.1)


def test_16_bit_values_are_accumulated_in_32():
    result = gae(
        rewards_BT=torch.full((1, 600), 1 / 256),
        values_BT=torch.zeros(1, 600, dtype=torch.bfloat16),
        mask_BT=torch.ones(1, 600, dtype=torch.bool),
        final_values_B=torch.zeros(1, dtype=torch.bfloat16),
        gamma=1.0,
        lam=1.0,
    )
    assert result.advantages_BT[0, 0].item() == 600 / 256


def test_nothing_here_carries_a_gradient():
    values_BT = torch.zeros(1, 2, requires_grad=True)
    logprobs_BT = torch.zeros(1, 2, requires_grad=True)
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    rewards_BT = token_rewards(
        scores_B=torch.ones(1, requires_grad=True),
        anchor_logprobs_BT=logprobs_BT,
        reference_logprobs_BT=logprobs_BT,
        mask_BT=mask_BT,
        kl_coef=0.1,
    )
    result = gae(
        rewards_BT=rewards_BT,
        values_BT=values_BT,
        mask_BT=mask_BT,
        final_values_B=torch.zeros(1),
        gamma=1.0,
        lam=1.0,
    )
    tensors = (rewards_BT, result.advantages_BT, result.returns_BT)
    assert not any(tensor.requires_grad for tensor in tensors)


def test_pin_19_score_on_the_last_token_only_and_kl_on_every_token_by_hand():
    rewards_BT = token_rewards(
        scores_B=torch.tensor([2.0, -1.0, 9.0]),
        anchor_logprobs_BT=torch.tensor([[-1.0, -2.0, -3.0], [-1.0, torch.nan, torch.nan], [0.0, 0.0, 0.0]]),
        reference_logprobs_BT=torch.tensor([[-2.0, -2.0, -1.0], [-1.5, 5.0, 5.0], [-1.0, -1.0, -1.0]]),
        mask_BT=length_mask(lengths=[3, 1, 0], max_length=3, device="cpu"),
        kl_coef=0.1,
    )
    expected = torch.tensor([[-0.1, 0.0, 2.2], [-1.05, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(rewards_BT, expected, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4),
    kl_coef=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 1000),
)
def test_pin_19_rewards_of_a_response_sum_to_score_minus_beta_kl(rows, kl_coef, seed):
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.tensor(rows)
    anchor_BT, reference_BT = torch.randn(2, *mask_BT.shape, generator=generator, dtype=F64)
    scores_B = torch.randn(len(rows), generator=generator, dtype=F64)
    rewards_BT = token_rewards(
        scores_B=scores_B,
        anchor_logprobs_BT=anchor_BT,
        reference_logprobs_BT=reference_BT,
        mask_BT=mask_BT,
        kl_coef=kl_coef,
    )
    kl_B = ((anchor_BT - reference_BT) * mask_BT).sum(-1)
    expected_B = torch.where(mask_BT.any(-1), scores_B, 0.0) - kl_coef * kl_B
    assert torch.allclose(rewards_BT.sum(-1), expected_B, atol=1e-12)
    assert (rewards_BT[~mask_BT] == 0).all()


def test_the_reference_is_needed_iff_beta_is_not_zero():
    rest = {
        "scores_B": torch.ones(1),
        "anchor_logprobs_BT": torch.zeros(1, 2),
        "reference_logprobs_BT": None,
        "mask_BT": torch.ones(1, 2, dtype=torch.bool),
    }
    assert token_rewards(kl_coef=0.0, **rest).tolist() == [[0.0, 1.0]]
    with pytest.raises(ValueError, match="reference"):
        token_rewards(kl_coef=0.1, **rest)


def test_the_last_token_of_a_row_with_holes():
    mask_BT = torch.tensor([[True, False, True, False], [False] * 4, [True, True, True, True]])
    last_BT = last_token_mask(mask_BT=mask_BT)
    assert last_BT.nonzero().tolist() == [[0, 2], [2, 3]]


def test_pin_24_scores_are_normalised_then_clipped_then_penalised_and_kl_is_never_clipped():
    scores_B = process_scores(raw_scores_B=torch.tensor([11.0, 30.0]), mean=10.0, std=2.0, clip=3.0)
    assert scores_B.tolist() == [0.5, 3.0]  # clipping first would give [-3.5, -3.5]
    mask_BT = torch.ones(2, 1, dtype=torch.bool)
    ends = end_responses(
        scores_B=scores_B,
        mask_BT=mask_BT,
        truncated_B=torch.tensor([False, True]),
        missing_eos="penalty",
        penalty=5.0,
        last_values_B=None,
    )
    assert ends.scores_B.tolist() == [0.5, -2.0]  # clipping last would hide part of the penalty
    rewards_BT = token_rewards(
        scores_B=ends.scores_B,
        anchor_logprobs_BT=torch.zeros(2, 1),
        reference_logprobs_BT=torch.full((2, 1), -100.0),
        mask_BT=ends.mask_BT,
        kl_coef=1.0,
    )
    assert rewards_BT.tolist() == [[-99.5], [-102.0]]


def test_scores_without_a_clip_or_in_16_bits():
    assert process_scores(raw_scores_B=torch.tensor([50.0]), mean=0.0, std=1.0, clip=None).tolist() == [50.0]
    raw = torch.tensor([1.0], dtype=torch.bfloat16)
    assert process_scores(raw_scores_B=raw, mean=0.0, std=3.0, clip=None).dtype == torch.float32
    with pytest.raises(ValueError, match="std"):
        process_scores(raw_scores_B=raw, mean=0.0, std=0.0, clip=None)
    with pytest.raises(ValueError, match="clip"):
        process_scores(raw_scores_B=raw, mean=0.0, std=1.0, clip=0.0)


def ends_of(rule, **arguments):
    return end_responses(
        scores_B=torch.tensor([1.0, 2.0]),
        mask_BT=length_mask(lengths=[1, 2], max_length=2, device="cpu"),
        truncated_B=torch.tensor([False, True]),
        missing_eos=rule,
        **{"penalty": None, "last_values_B": None, **arguments},
    )


def test_pin_20_a_truncated_response_is_penalised_masked_or_bootstrapped():
    penalty = ends_of("penalty", penalty=3.0)
    assert penalty.scores_B.tolist() == [1.0, -1.0]
    assert penalty.mask_BT.tolist() == [[True, False], [True, True]]
    assert penalty.final_values_B.tolist() == [0.0, 0.0]

    mask = ends_of("mask")
    assert mask.scores_B[0] == 1.0
    assert mask.mask_BT.tolist() == [[True, False], [False, False]]
    assert mask.final_values_B.tolist() == [0.0, 0.0]

    bootstrap = ends_of("bootstrap", last_values_B=torch.tensor([7.0, 8.0]))
    assert bootstrap.scores_B.tolist() == [1.0, 0.0]
    assert bootstrap.mask_BT.tolist() == [[True, False], [True, True]]
    assert bootstrap.final_values_B.tolist() == [0.0, 8.0], "V after EOS is 0, whatever the value model says"


def test_pin_20_a_bootstrapped_return_ends_in_the_value_and_a_finished_one_in_its_score():
    ends = ends_of("bootstrap", last_values_B=torch.tensor([7.0, 8.0]))
    rewards_BT = token_rewards(
        scores_B=ends.scores_B,
        anchor_logprobs_BT=torch.zeros(2, 2),
        reference_logprobs_BT=None,
        mask_BT=ends.mask_BT,
        kl_coef=0.0,
    )
    result = gae(
        rewards_BT=rewards_BT,
        values_BT=torch.tensor([[0.5, 99.0], [0.25, 0.5]]),
        mask_BT=ends.mask_BT,
        final_values_B=ends.final_values_B,
        gamma=0.5,
        lam=1.0,
    )
    assert result.returns_BT.tolist() == [[1.0, 0.0], [2.0, 4.0]]


def test_a_rule_without_its_argument_or_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match="penalty"):
        ends_of("penalty")
    with pytest.raises(ValueError, match="last_values_B"):
        ends_of("bootstrap")
    with pytest.raises(ValueError, match="drop"):
        ends_of("drop")
