import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.objectives.logprobs import next_tokens, token_entropies, token_logprobs
from stages.objectives.losses import (
    aggregate,
    aggregation_denominator,
    causal_lm_loss_sum,
    entropy_bonus,
    kl_surrogate_loss,
    pair_loss_sum,
    policy_loss,
    sequence_importance_weights,
    sequence_kl_loss,
    target_mask,
    token_importance_weights,
    value_loss,
)
from stages.objectives.masked import length_mask

F64 = torch.float64
AGGREGATIONS = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"]
ONE = torch.tensor(1.0)


def constant_length_of(aggregation):
    return 7.0 if aggregation == "constant" else None


def denominator_of(masks, aggregation, **hook):
    length = constant_length_of(aggregation)
    return aggregation_denominator(masks=masks, aggregation=aggregation, constant_length=length, **hook)


def policy_loss_of(log_ratios, advantages, *, weights=None, dual_clip=None):
    """One row of tokens, clipped at 0.8 and 1.3, summed."""
    log_ratio_BT = torch.tensor([log_ratios], dtype=F64, requires_grad=True)
    mask_BT = torch.ones(log_ratio_BT.shape, dtype=torch.bool)
    result = policy_loss(
        policy_logprobs_BT=log_ratio_BT - 2.0,
        anchor_logprobs_BT=torch.full_like(log_ratio_BT, -2.0),
        advantages_BT=torch.tensor([advantages], dtype=F64),
        importance_weights_BT=weights,
        mask_BT=mask_BT,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=dual_clip,
        aggregation="token_mean",
        denominator=ONE,
    )
    (gradient_BT,) = torch.autograd.grad(result.loss, log_ratio_BT)
    return result, gradient_BT[0].tolist()


def test_pin_14_identical_scores_lose_ln_2():
    scores_P = torch.tensor([3.0, -1.0, 40.0])
    loss = pair_loss_sum(chosen_scores_P=scores_P, rejected_scores_P=scores_P, margins_P=torch.zeros(3))
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-6)


def test_pin_14_swapping_chosen_and_rejected_mirrors_the_loss():
    torch.manual_seed(0)
    a_P, b_P = torch.randn(2, 9, dtype=F64)
    zeros_P = torch.zeros(9, dtype=F64)
    forward = pair_loss_sum(chosen_scores_P=a_P, rejected_scores_P=b_P, margins_P=zeros_P)
    swapped = pair_loss_sum(chosen_scores_P=b_P, rejected_scores_P=a_P, margins_P=zeros_P)
    assert torch.allclose(swapped - forward, (a_P - b_P).sum())  # -log s(-d) + log s(d) = d
    assert forward != swapped


def test_a_margin_shifts_the_difference_and_extremes_stay_finite():
    scores = torch.tensor([2.0]), torch.tensor([1.0])
    by_margin = pair_loss_sum(
        chosen_scores_P=scores[0], rejected_scores_P=scores[1], margins_P=torch.tensor([1.0])
    )
    assert by_margin.item() == pytest.approx(math.log(2), rel=1e-6)
    far = pair_loss_sum(
        chosen_scores_P=torch.tensor([-1e4]),
        rejected_scores_P=torch.tensor([1e4]),
        margins_P=torch.zeros(1),
    )
    assert far.item() == pytest.approx(2e4)
    with pytest.raises(ValueError, match="shapes"):
        pair_loss_sum(
            chosen_scores_P=torch.zeros(2), rejected_scores_P=torch.zeros(1), margins_P=torch.zeros(2)
        )


def test_pin_12_labels_are_shifted_once_and_no_pack_boundary_is_crossed():
    torch.manual_seed(0)
    logits_BSV, ids_BS = torch.randn(1, 6, 5, dtype=F64), torch.randint(5, (1, 6))
    loss_mask_BS = torch.tensor([[True, False, True, True, True, False]])
    position_ids_BS = torch.tensor([[0, 1, 2, 0, 1, 2]])  # a pack of two sequences of three
    targets_BS = target_mask(loss_mask_BS=loss_mask_BS, position_ids_BS=position_ids_BS)
    assert targets_BS.tolist() == [[False, False, True, False, True, False]]
    logprobs_BS = token_logprobs(logits=logits_BSV, targets=next_tokens(ids_BS), temperature=1.0)
    loss = causal_lm_loss_sum(logprobs_BS=logprobs_BS, target_mask_BS=targets_BS)
    log_softmax_SV = logits_BSV[0].log_softmax(-1)
    expected = -(log_softmax_SV[1, ids_BS[0, 2]] + log_softmax_SV[3, ids_BS[0, 4]])
    assert torch.allclose(loss, expected)


def test_the_first_column_is_never_a_target():
    ones_BS = torch.ones(1, 3, dtype=torch.int64)
    assert target_mask(loss_mask_BS=ones_BS > 0, position_ids_BS=ones_BS).tolist() == [[False, True, True]]


def test_pin_25_policy_clip_by_hand():
    """Six ratios around the asymmetric range, for both signs of the advantage."""
    ratios = [0.5, 0.9, 1.0, 1.2, 1.25, 2.0]
    up, up_gradient = policy_loss_of([math.log(r) for r in ratios], [2.0] * 6)
    assert up.loss.item() == pytest.approx(-2 * (0.5 + 0.9 + 1.0 + 1.2 + 1.25 + 1.3))
    assert up_gradient == pytest.approx([-1.0, -1.8, -2.0, -2.4, -2.5, 0.0])
    down, down_gradient = policy_loss_of([math.log(r) for r in ratios], [-2.0] * 6)
    assert down.loss.item() == pytest.approx(2 * (0.8 + 0.9 + 1.0 + 1.2 + 1.25 + 2.0))
    assert down_gradient == pytest.approx([0.0, 1.8, 2.0, 2.4, 2.5, 4.0])


def test_pin_25_clip_fraction_counts_as_defined():
    """Out of range on the harmless side does not count; neither does a zero advantage."""
    log_ratios = [math.log(r) for r in (0.5, 0.5, 2.0, 2.0, 1.0, 0.5, 2.0)]
    result, gradient = policy_loss_of(log_ratios, [1.0, -1.0, 1.0, -1.0, 1.0, 0.0, 0.0])
    sums = {name: value.item() for name, value in result.token_sums.items()}
    assert (sums["clip_frac_low"], sums["clip_frac_high"], sums["clip_frac"]) == (1, 1, 2)
    assert sums["dual_clip_frac"] == 0
    assert [g == 0 for g in gradient] == [False, True, True, False, False, True, True]
    assert (result.ratio_min.item(), result.ratio_max.item()) == pytest.approx((0.5, 2.0))
    assert sums["ratio"] == pytest.approx(8.5)


def test_pin_25_dual_clip_bounds_only_negative_advantages():
    log_ratios = [math.log(5.0), math.log(5.0), math.log(2.0)]
    result, gradient = policy_loss_of(log_ratios, [-1.0, 1.0, -1.0], dual_clip=3.0)
    assert result.loss.item() == pytest.approx(3.0 - 1.3 + 2.0)
    assert gradient == pytest.approx([0.0, 0.0, 2.0])
    assert result.token_sums["dual_clip_frac"] == 1
    unbounded, _ = policy_loss_of(log_ratios, [-1.0, 1.0, -1.0])
    assert unbounded.loss.item() == pytest.approx(5.0 - 1.3 + 2.0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-3, 3), st.sampled_from([-2.0, -0.5, 0.5, 2.0]), st.sampled_from([None, 1.4, 3.0]))
def test_pin_25_policy_loss_equals_the_papers_formula(log_ratio, advantage, dual_clip):
    result, _ = policy_loss_of([log_ratio], [advantage], dual_clip=dual_clip)
    r = math.exp(log_ratio)
    expected = max(-advantage * r, -advantage * min(max(r, 0.8), 1.3))
    if dual_clip is not None and advantage < 0:
        expected = min(expected, -advantage * dual_clip)
    assert result.loss.item() == pytest.approx(expected, rel=1e-9)


def test_a_ratio_that_has_run_away_gives_finite_loss_and_gradient():
    for advantage in (1.0, -1.0):
        for dual_clip in (None, 3.0):
            result, gradient = policy_loss_of([500.0, -500.0], [advantage] * 2, dual_clip=dual_clip)
            assert result.loss.isfinite() and all(map(math.isfinite, gradient))


def test_on_the_anchor_the_ratio_is_exactly_one_and_the_gradient_is_minus_the_advantage():
    result, gradient = policy_loss_of([0.0, 0.0], [3.0, -4.0])
    assert gradient == [-3.0, 4.0]
    assert (result.ratio_min, result.ratio_max, result.token_sums["clip_frac"]) == (1, 1, 0)


def test_bad_clip_ranges_are_refused():
    rest = {
        "policy_logprobs_BT": torch.zeros(1, 1),
        "anchor_logprobs_BT": torch.zeros(1, 1),
        "advantages_BT": torch.zeros(1, 1),
        "importance_weights_BT": None,
        "mask_BT": torch.ones(1, 1, dtype=torch.bool),
        "aggregation": "token_mean",
        "denominator": ONE,
    }
    with pytest.raises(ValueError, match="clip_low"):
        policy_loss(clip_low=1.0, clip_high=0.2, dual_clip=None, **rest)
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(clip_low=0.2, clip_high=0.5, dual_clip=1.5, **rest)
    with pytest.raises(ValueError, match="no aggregation"):
        policy_loss(clip_low=0.2, clip_high=0.2, dual_clip=None, **{**rest, "aggregation": "mean"})


def test_pin_26_value_clip_by_hand():
    """Around the value before the update, 1.0, clipped at +-0.5: half of the larger square."""
    values_BT = torch.tensor([[1.2, 3.0, 3.0, -1.0]], dtype=F64, requires_grad=True)
    returns_BT = torch.tensor([[2.0, 0.0, 2.5, -1.0]], dtype=F64)
    rest = {
        "values_BT": values_BT,
        "anchor_values_BT": torch.ones(1, 4, dtype=F64),
        "returns_BT": returns_BT,
        "mask_BT": torch.ones(1, 4, dtype=torch.bool),
        "aggregation": "token_mean",
        "denominator": ONE,
    }
    result = value_loss(clip=0.5, **rest)
    # inside the range: 0.8^2; unclipped is larger: 3^2; clipped is larger: (1.5 - 2.5)^2 and (0.5 + 1)^2
    assert result.loss.item() == pytest.approx((0.64 + 9.0 + 1.0 + 2.25) / 2)
    (gradient_BT,) = torch.autograd.grad(result.loss, values_BT)
    assert gradient_BT[0].tolist() == pytest.approx([-0.8, 3.0, 0.0, 0.0])
    assert result.token_sums["value_clip_frac"] == 2
    assert result.token_sums["value_squared_error"].item() == pytest.approx(0.64 + 9.0 + 0.25)
    assert value_loss(clip=None, **rest).loss.item() == pytest.approx((0.64 + 9.0 + 0.25) / 2)
    with pytest.raises(ValueError, match="clip"):
        value_loss(clip=0.0, **rest)


def test_pin_27_aggregations_by_hand():
    values_BT = torch.tensor([[1.0, 2.0, 3.0], [10.0, torch.nan, 99.0], [torch.nan, 99.0, 99.0]])
    mask_BT = length_mask(lengths=[3, 1, 0], max_length=3, device="cpu")
    expected = {
        "token_mean": (1 + 2 + 3 + 10) / 4,
        "sequence_mean_token_mean": (2 + 10) / 2,  # the empty sequence is not counted
        "sequence_mean_token_sum": (6 + 10) / 2,
        "constant": (6 + 10) / (2 * 7),
    }
    for aggregation, mean in expected.items():
        denominator = denominator_of([mask_BT], aggregation)
        got = aggregate(
            values_BT=values_BT, mask_BT=mask_BT, aggregation=aggregation, denominator=denominator
        )
        assert got.item() == pytest.approx(mean), aggregation


def test_pin_27_a_step_without_a_token_has_loss_zero():
    for aggregation in AGGREGATIONS:
        mask_BT = torch.zeros(2, 3, dtype=torch.bool)
        denominator = denominator_of([mask_BT], aggregation)
        values_BT = torch.full((2, 3), torch.nan)
        loss = aggregate(
            values_BT=values_BT, mask_BT=mask_BT, aggregation=aggregation, denominator=denominator
        )
        assert loss == 0, aggregation


def test_pin_27_denominators_that_make_no_sense_are_refused():
    masks = [torch.ones(1, 1, dtype=torch.bool)]
    with pytest.raises(ValueError, match="constant_length"):
        aggregation_denominator(masks=masks, aggregation="constant", constant_length=None)
    with pytest.raises(ValueError, match="constant_length"):
        aggregation_denominator(masks=masks, aggregation="token_mean", constant_length=5.0)
    with pytest.raises(ValueError, match="constant_length"):
        aggregation_denominator(masks=masks, aggregation="constant", constant_length=0.0)
    with pytest.raises(ValueError, match="no aggregation"):
        aggregation_denominator(masks=masks, aggregation="mean", constant_length=None)


LENGTHS = [5, 1, 0, 3, 2, 4, 0, 1]
NUM_CONTEXTS, VOCABULARY = 6, 5


class ToyBatch:
    """A rollout batch of ragged sequences for a policy and a value model that are one table each."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        rows, width = len(LENGTHS), max(LENGTHS)
        self.contexts_BT = torch.randint(NUM_CONTEXTS, (rows, width), generator=generator)
        self.tokens_BT = torch.randint(VOCABULARY, (rows, width), generator=generator)
        self.anchor_BT = -2 * torch.rand(rows, width, generator=generator)
        self.rollout_BT = self.anchor_BT + 0.3 * torch.randn(rows, width, generator=generator)
        self.reference_BT = -2 * torch.rand(rows, width, generator=generator)
        self.advantages_BT = torch.randn(rows, width, generator=generator)
        self.returns_BT = torch.randn(rows, width, generator=generator)
        self.table = torch.randn(NUM_CONTEXTS, VOCABULARY + 1, generator=generator)  # last column: values

    def gradient(self, rows, aggregation, denominator, padding=0):
        """Of all terms of the PPO loss, over `rows` padded `padding` beyond their longest response."""
        table = self.table.clone().requires_grad_()
        lengths = [LENGTHS[row] for row in rows]
        width = max(lengths)
        mask_BT = length_mask(lengths=lengths, max_length=width + padding, device="cpu")

        def cut(tensor_BT, fill):
            return torch.nn.functional.pad(tensor_BT[rows][:, :width], (0, padding), value=fill)

        out_BTV = table[cut(self.contexts_BT, 0)]
        logits_BTV, values_BT = out_BTV[..., :-1], out_BTV[..., -1]
        policy_BT = token_logprobs(logits=logits_BTV, targets=cut(self.tokens_BT, 0), temperature=1.0)
        rollout_BT, reference_BT = cut(self.rollout_BT, torch.nan), cut(self.reference_BT, torch.nan)
        shared = {"mask_BT": mask_BT, "aggregation": aggregation, "denominator": denominator}
        capped = {"rollout_logprobs_BT": rollout_BT, "mask_BT": mask_BT, "max_weight": 1.2}
        anchor_BT = cut(self.anchor_BT, torch.nan)
        policy = policy_loss(
            policy_logprobs_BT=policy_BT,
            anchor_logprobs_BT=anchor_BT,
            advantages_BT=cut(self.advantages_BT, torch.nan),
            importance_weights_BT=token_importance_weights(logprobs_BT=anchor_BT, beyond="mask", **capped),
            clip_low=0.2,
            clip_high=0.3,
            dual_clip=3.0,
            **shared,
        )
        value = value_loss(
            values_BT=values_BT,
            anchor_values_BT=cut(self.returns_BT, torch.nan) + 0.1,
            returns_BT=cut(self.returns_BT, torch.nan),
            clip=0.2,
            **shared,
        )
        surrogate = kl_surrogate_loss(
            policy_logprobs_BT=policy_BT,
            reference_logprobs_BT=reference_BT,
            importance_weights_BT=None,
            estimator="k3",
            **shared,
        )
        sequence_kl = sequence_kl_loss(
            policy_logprobs_BT=policy_BT,
            reference_logprobs_BT=reference_BT,
            importance_weights_B=sequence_importance_weights(
                logprobs_BT=policy_BT, beyond="truncate", **capped
            ),
            mask_BT=mask_BT,
            denominator=denominator,
        )
        bonus = entropy_bonus(entropies_BT=token_entropies(logits=logits_BTV, temperature=1.0), **shared)
        loss = policy.loss + 0.5 * value.loss + 0.1 * surrogate + 0.1 * sequence_kl - 0.01 * bonus
        (gradient,) = torch.autograd.grad(loss, table)
        return gradient, policy.token_sums | value.token_sums

    def masks(self, splits):
        return [
            length_mask(
                lengths=[LENGTHS[row] for row in rows],
                max_length=max(LENGTHS[row] for row in rows),
                device="cpu",
            )
            for rows in splits
        ]


SPLITS = {
    "two halves": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "one by one": [[row] for row in range(8)],
    "uneven and out of order": [[7, 2], [5], [0, 6, 3, 1, 4]],
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("padding", [0, 3])
def test_pin_33_splitting_the_batch_any_way_gives_the_same_gradient(aggregation, splits, padding):
    batch = ToyBatch()
    whole_masks = batch.masks([range(8)])
    denominator = denominator_of(whole_masks, aggregation)
    whole, whole_sums = batch.gradient(list(range(8)), aggregation, denominator)
    assert whole.isfinite().all() and whole.norm() > 0.01

    assert torch.equal(denominator_of(batch.masks(splits), aggregation), denominator)
    parts = [batch.gradient(rows, aggregation, denominator, padding) for rows in splits]
    assert (sum(gradient for gradient, _ in parts) - whole).norm() <= 1e-6 * whole.norm()
    for name, total in whole_sums.items():
        assert sum(sums[name] for _, sums in parts).item() == pytest.approx(total.item(), abs=1e-4), name


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_pin_27_gradients_summed_over_ranks_equal_those_of_one_process(aggregation, run_on_ranks):
    batch, splits = ToyBatch(), SPLITS["uneven and out of order"]
    masks = batch.masks([range(8)])
    whole, _ = batch.gradient(list(range(8)), aggregation, denominator_of(masks, aggregation))

    def body(rank, sum_over_ranks):
        masks = batch.masks([splits[rank]])
        denominator = denominator_of(masks, aggregation, sum_over_ranks=sum_over_ranks)
        return batch.gradient(splits[rank], aggregation, denominator)[0]

    assert (sum(run_on_ranks(3, body)) - whole).norm() <= 1e-6 * whole.norm()


def test_pin_32_entropy_kl_and_clip_fraction_are_masked_and_packed_equals_padded():
    torch.manual_seed(0)
    lengths = [3, 1]
    mask_BT = length_mask(lengths=lengths, max_length=3, device="cpu")
    policy_BT, anchor_BT = torch.randn(2, 2, 3)
    advantages_BT, entropies_BT = torch.randn(2, 2, 3)
    rest = {
        "importance_weights_BT": None,
        "clip_low": 0.1,
        "clip_high": 0.1,
        "dual_clip": 2.0,
        "aggregation": "token_mean",
        "denominator": denominator_of([mask_BT], "token_mean"),
    }

    def sums(select, mask):
        result = policy_loss(
            policy_logprobs_BT=select(policy_BT),
            anchor_logprobs_BT=select(anchor_BT),
            advantages_BT=select(advantages_BT),
            mask_BT=mask,
            **rest,
        )
        bonus = entropy_bonus(
            entropies_BT=select(entropies_BT),
            mask_BT=mask,
            aggregation="token_mean",
            denominator=rest["denominator"],
        )
        return {"bonus": bonus, "min": result.ratio_min, "max": result.ratio_max, **result.token_sums}

    padded = sums(lambda x_BT: x_BT.masked_fill(~mask_BT, 1e9), mask_BT)
    packed = sums(lambda x_BT: x_BT[mask_BT][None], torch.ones(1, 4, dtype=torch.bool))
    assert {k: v.item() for k, v in padded.items()} == pytest.approx(
        {k: v.item() for k, v in packed.items()}, rel=1e-6
    )
    assert padded["bonus"].item() == pytest.approx(entropies_BT[mask_BT].mean().item(), rel=1e-6)


def test_pin_30_approx_kl_is_between_anchor_and_policy_and_knows_no_reference():
    """k1 = -log r and k3 = r - 1 - log r with r = policy / anchor, on the anchor's samples."""
    result, _ = policy_loss_of([math.log(2.0), math.log(0.5)], [1.0, 1.0])
    assert result.token_sums["approx_kl_anchor_k1"].item() == pytest.approx(0.0, abs=1e-6)
    assert result.token_sums["approx_kl_anchor_k3"].item() == pytest.approx(1.0 - 0.5, rel=1e-6)
    one_way, _ = policy_loss_of([math.log(2.0)], [1.0])
    assert one_way.token_sums["approx_kl_anchor_k1"].item() == pytest.approx(-math.log(2))
    assert not any("reference" in name for name in one_way.token_sums)


def test_pin_31_importance_weights_cap_from_above_only_by_hand():
    logprobs_BT = torch.tensor([[math.log(0.01), math.log(1.5), math.log(9.0), torch.nan]])
    rest = {
        "rollout_logprobs_BT": torch.zeros(1, 4),
        "mask_BT": torch.tensor([[True, True, True, False]]),
    }

    def weights(**cap):
        return token_importance_weights(logprobs_BT=logprobs_BT, **cap, **rest)[0].tolist()

    assert weights(max_weight=2.0, beyond="truncate") == pytest.approx([0.01, 1.5, 2.0, 0.0])
    assert weights(max_weight=2.0, beyond="mask") == pytest.approx([0.01, 1.5, 0.0, 0.0])
    assert weights(max_weight=math.inf, beyond="mask") == pytest.approx([0.01, 1.5, 9.0, 0.0])
    whole_B = sequence_importance_weights(
        logprobs_BT=logprobs_BT, max_weight=math.inf, beyond="truncate", **rest
    )
    assert whole_B.tolist() == pytest.approx([0.01 * 1.5 * 9.0])
    with pytest.raises(ValueError, match="max_weight"):
        weights(max_weight=0.5, beyond="mask")
    with pytest.raises(ValueError, match="truncate"):
        weights(max_weight=2.0, beyond="clip")


def test_pin_31_importance_weights_are_detached_and_only_scale_the_loss():
    weights_BT = torch.tensor([[2.0, 0.0]], dtype=F64, requires_grad=True)
    result, gradient = policy_loss_of([0.0, 0.0], [3.0, -4.0], weights=weights_BT)
    assert gradient == [-6.0, 0.0]
    assert result.loss.item() == -6.0  # over the denominator of both tokens: a weight of 0 is still counted
    logprobs_BT = torch.zeros(1, 2, requires_grad=True)
    computed_BT = token_importance_weights(
        logprobs_BT=logprobs_BT,
        rollout_logprobs_BT=torch.zeros(1, 2),
        mask_BT=torch.ones(1, 2, dtype=torch.bool),
        max_weight=2.0,
        beyond="mask",
    )
    assert not computed_BT.requires_grad


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_pin_31_data_masks_leave_the_count_and_importance_masks_do_not(aggregation):
    mask_BT = torch.ones(2, 2, dtype=torch.bool)
    dropped_BT = torch.tensor([[True, True], [False, False]])
    zero_weights_BT = dropped_BT.double()

    def loss(mask_BT, weights_BT):
        return policy_loss(
            policy_logprobs_BT=torch.zeros(2, 2, dtype=F64),
            anchor_logprobs_BT=torch.zeros(2, 2, dtype=F64),
            advantages_BT=torch.full((2, 2), -1.0, dtype=F64),
            importance_weights_BT=weights_BT,
            mask_BT=mask_BT,
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=None,
            aggregation=aggregation,
            denominator=denominator_of([mask_BT], aggregation),
        ).loss.item()

    full = loss(mask_BT, None)
    assert loss(dropped_BT, None) == pytest.approx(full)
    assert loss(mask_BT, zero_weights_BT) == pytest.approx(full / 2)


def test_pin_31_only_policy_and_values_get_a_gradient_and_importance_weights_do_not():
    one_BT = {"requires_grad": True}
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    policy, anchor, advantages = (torch.full((1, 1), 0.1, **one_BT) for _ in range(3))
    values, anchor_values, returns, reference = (
        torch.full((1, 1), x, **one_BT) for x in (1.0, 0.7, 2.0, 0.3)
    )
    weights, weights_B = torch.full((1, 1), 0.5, **one_BT), torch.full((1,), 0.5, **one_BT)
    shared = {"mask_BT": mask_BT, "aggregation": "token_mean", "denominator": ONE}
    loss = (
        policy_loss(
            policy_logprobs_BT=policy,
            anchor_logprobs_BT=anchor,
            advantages_BT=advantages,
            importance_weights_BT=weights,
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=None,
            **shared,
        ).loss
        + value_loss(
            values_BT=values, anchor_values_BT=anchor_values, returns_BT=returns, clip=0.5, **shared
        ).loss
        + kl_surrogate_loss(
            policy_logprobs_BT=policy,
            reference_logprobs_BT=reference,
            importance_weights_BT=weights,
            estimator="k2",
            **shared,
        )
        + sequence_kl_loss(
            policy_logprobs_BT=policy,
            reference_logprobs_BT=reference,
            importance_weights_B=weights_B,
            mask_BT=mask_BT,
            denominator=ONE,
        )
    )
    loss.backward()
    assert policy.grad is not None and values.grad is not None
    fixed = (anchor, advantages, anchor_values, returns, reference, weights, weights_B)
    assert all(tensor.grad is None for tensor in fixed)


@pytest.mark.parametrize("lengths", [[40, 40], [40, 8]], ids=["equal", "unequal"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_sum", "constant"])
def test_pin_28_how_a_kl_loss_weighs_against_the_policy_loss_does_not_depend_on_the_aggregation(
    aggregation, lengths
):
    """On every token the policy loss pulls with -A, the KL with the log-ratio of its whole response, 0.05 per
    token: 2 nats at 40 tokens.
    """
    mask_BT = length_mask(lengths=lengths, max_length=40, device="cpu")
    denominator = denominator_of([mask_BT], aggregation)
    policy_BT = torch.full((2, 40), -1.0, requires_grad=True)
    advantage = 0.5
    policy = policy_loss(
        policy_logprobs_BT=policy_BT,
        anchor_logprobs_BT=policy_BT.detach(),
        advantages_BT=torch.full((2, 40), advantage),
        importance_weights_BT=None,
        mask_BT=mask_BT,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        aggregation=aggregation,
        denominator=denominator,
    ).loss
    kl = sequence_kl_loss(
        policy_logprobs_BT=policy_BT,
        reference_logprobs_BT=torch.full((2, 40), -1.05),
        importance_weights_B=None,
        mask_BT=mask_BT,
        denominator=denominator,
    )
    (of_policy_BT,) = torch.autograd.grad(policy, policy_BT)
    (of_kl_BT,) = torch.autograd.grad(kl, policy_BT)
    for row, length in enumerate(lengths):
        ratio_T = of_kl_BT[row, :length] / of_policy_BT[row, :length]
        torch.testing.assert_close(
            ratio_T, torch.full((length,), -0.05 * length / advantage), rtol=1e-4, atol=0
        )
    count = {"token_mean": sum(lengths), "sequence_mean_token_sum": 2, "constant": 2 * 7}[aggregation]
    assert of_policy_BT[0, 0].item() == pytest.approx(-advantage / count)


def test_pin_28_kl_losses_by_hand():
    policy_BT = torch.tensor([[0.0, 0.0], [1.0, 99.0]])
    reference_BT = torch.tensor([[-1.0, 3.0], [0.0, torch.nan]])
    mask_BT = length_mask(lengths=[2, 1], max_length=2, device="cpu")
    logprobs = {"policy_logprobs_BT": policy_BT, "reference_logprobs_BT": reference_BT, "mask_BT": mask_BT}

    def sequence(weights_B):
        return sequence_kl_loss(
            importance_weights_B=weights_B, denominator=torch.tensor(2.0), **logprobs
        ).item()

    assert sequence(None) == pytest.approx((2**2 / 2 + 1 / 2) / 2)  # the log-ratio is summed, then squared
    assert sequence(torch.tensor([0.5, 3.0])) == pytest.approx((1.0 + 1.5) / 2)

    def surrogate(estimator, weights_BT):
        return kl_surrogate_loss(
            importance_weights_BT=weights_BT,
            estimator=estimator,
            aggregation="token_mean",
            denominator=torch.tensor(3.0),
            **logprobs,
        ).item()

    assert surrogate("k2", None) == pytest.approx((0.5 + 4.5 + 0.5) / 3)
    assert surrogate("k2", torch.tensor([[2.0, 1.0], [0.0, 5.0]])) == pytest.approx((1.0 + 4.5) / 3)
    assert surrogate("k3", None) == pytest.approx((2 / math.e + math.e**3 - 4) / 3, rel=1e-6)
    with pytest.raises(ValueError, match="k1"):
        surrogate("k1", None)
