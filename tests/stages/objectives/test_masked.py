import pytest
import torch

from stages.objectives.masked import (
    check_mask,
    length_mask,
    masked_stats,
    masked_sum,
    masked_whiten,
    pad_ragged,
    zero_masked,
)


def test_a_sum_reads_only_true_positions():
    values = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.inf, torch.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_sum(values=values, mask=mask) == 7.0


def test_no_gradient_and_no_nan_passes_a_masked_position():
    values = torch.tensor([2.0, torch.nan], requires_grad=True)
    masked_sum(values=values.square(), mask=torch.tensor([True, False])).backward()
    assert values.grad is not None and values.grad[0] == 4.0
    logs = torch.tensor([2.0, -1.0], requires_grad=True)
    zero_masked(values=logs, mask=torch.tensor([True, False])).sum().backward()
    assert torch.equal(logs.grad, torch.tensor([1.0, 0.0]))


def test_a_mask_that_is_not_boolean_or_would_broadcast_is_refused():
    values_BT = torch.ones(2, 2)
    with pytest.raises(TypeError, match=r"torch\.bool"):
        check_mask(mask=torch.ones(2, 2, dtype=torch.int64), values_BT=values_BT)
    with pytest.raises(ValueError, match="values_BT"):
        check_mask(mask=torch.ones(2, dtype=torch.bool), values_BT=values_BT)


def test_stats_are_those_of_the_kept_values():
    values = torch.tensor([1.0, 3.0, 100.0, 8.0])
    stats = masked_stats(values=values, mask=torch.tensor([True, True, False, True]))
    assert stats.count == 3 and stats.mean == 4.0
    assert stats.std.item() == pytest.approx((26 / 3) ** 0.5)


def test_stats_do_not_cancel_far_from_zero():
    values = 1e6 + torch.tensor([0.0, 1.0, 2.0, 3.0])
    stats = masked_stats(values=values, mask=torch.ones(4, dtype=torch.bool))
    assert stats.std.item() == pytest.approx(1.25**0.5, rel=1e-6)


def test_stats_of_nothing_are_zero():
    stats = masked_stats(values=torch.ones(3), mask=torch.zeros(3, dtype=torch.bool))
    assert (stats.count, stats.mean, stats.std) == (0, 0, 0)


def test_whitening_by_hand():
    values = torch.tensor([[1.0, 5.0, 99.0]])
    mask = torch.tensor([[True, True, False]])
    whitened = masked_whiten(values=values, mask=mask, shift_mean=True)
    assert torch.allclose(whitened, torch.tensor([[-1.0, 1.0, 0.0]]))
    kept = masked_whiten(values=values, mask=mask, shift_mean=False)
    assert torch.allclose(kept, torch.tensor([[2.0, 4.0, 0.0]]))


def test_pin_22_one_token_does_not_give_nan():
    values, mask = torch.tensor([7.0, 3.0]), torch.tensor([True, False])
    assert torch.equal(masked_whiten(values=values, mask=mask, shift_mean=True), torch.zeros(2))
    assert torch.equal(masked_whiten(values=values, mask=mask, shift_mean=False), torch.tensor([7.0, 0.0]))
    nothing = masked_whiten(values=values, mask=torch.zeros(2, dtype=torch.bool), shift_mean=True)
    assert torch.equal(nothing, torch.zeros(2))


def test_pin_22_whitening_over_response_tokens_only_so_padding_is_irrelevant():
    torch.manual_seed(0)
    values = torch.randn(3, 4)
    mask = length_mask(lengths=[4, 1, 3], max_length=4, device="cpu")
    wide = torch.cat([values, torch.full((3, 5), torch.nan)], dim=1)
    wide_mask = length_mask(lengths=[4, 1, 3], max_length=9, device="cpu")
    whitened = masked_whiten(values=values, mask=mask, shift_mean=True)
    assert torch.allclose(masked_whiten(values=wide, mask=wide_mask, shift_mean=True)[:, :4], whitened)
    assert whitened[mask].mean().abs() < 1e-6
    assert whitened[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_pin_22_whitening_over_all_ranks_equals_whitening_in_one_process(run_on_ranks):
    torch.manual_seed(0)
    values = torch.randn(6, 4)
    mask = length_mask(lengths=[4, 2, 1, 0, 0, 0], max_length=4, device="cpu")  # the last rank has no token

    def body(rank, sum_over_ranks):
        rows = slice(2 * rank, 2 * rank + 2)
        return masked_whiten(
            values=values[rows], mask=mask[rows], shift_mean=True, sum_over_ranks=sum_over_ranks
        )

    whole = masked_whiten(values=values, mask=mask, shift_mean=True)
    assert torch.allclose(torch.cat(run_on_ranks(3, body)), whole, atol=1e-7)


def test_ragged_values_go_to_padded_rows_and_back():
    mask_BT = length_mask(lengths=[2, 0, 3], max_length=3, device="cpu")
    values_N = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    values_BT = pad_ragged(values_N=values_N, mask_BT=mask_BT)
    assert values_BT.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert torch.equal(values_BT[mask_BT], values_N)
    (values_BT * torch.tensor([[1.0, 10.0, 100.0]])).sum().backward()
    assert values_N.grad.tolist() == [1, 10, 1, 10, 100]


def test_ragged_values_that_do_not_fit_their_mask_are_refused():
    mask_BT = length_mask(lengths=[2, 1], max_length=2, device="cpu")
    with pytest.raises(ValueError, match="3 True positions"):
        pad_ragged(values_N=torch.ones(4), mask_BT=mask_BT)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        length_mask(lengths=[3], max_length=2, device="cpu")
