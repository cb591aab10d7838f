"""Packing: one row holds many sequences, and none of them notices."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stages.data.packing import PackedRow, best_fit, pack, packed_row, plan_packs, split, utilisation

SEQUENCES = [
    [5, 6, 7, 8, 9, 10, 11],
    [12],
    [13, 14],
    [2, 2, 2, 30, 31],
    [40, 41, 42],
]  # 2 is EOS, 0 is the pad id


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def logprobs(model: LlamaForCausalLM, row: PackedRow) -> list[Tensor]:
    """Log-prob of each next token of each sequence."""
    logits_NV = model(**row.model_inputs()).logits[0]
    return [
        logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None])[:, 0]
        for logits_TV, ids_T in zip(row.split(logits_NV), row.split(row.input_ids_1N[0]), strict=True)
    ]


def alone(model: LlamaForCausalLM, sequence: list[int]) -> Tensor:
    """The same by a plain forward on one unpacked sequence."""
    logits_TV = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
    return torch.stack([logits_TV[t].log_softmax(-1)[token] for t, token in enumerate(sequence[1:])])


MODES = ["train", "eval", "no_grad"]


def in_mode(model: LlamaForCausalLM, mode: str):
    model.train(mode == "train")
    return torch.set_grad_enabled(mode != "no_grad")


@pytest.mark.parametrize("mode", MODES)
def test_pin_6_packed_log_probs_equal_those_of_each_sequence_alone(model, mode):
    with in_mode(model, mode):
        for packed, sequence in zip(logprobs(model, pack(SEQUENCES)), SEQUENCES, strict=True):
            if len(sequence) > 1:
                torch.testing.assert_close(packed, alone(model, sequence), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_pin_7_a_tokens_log_prob_does_not_change_with_its_neighbours_in_the_pack(model, mode):
    with in_mode(model, mode):
        before = logprobs(model, pack(SEQUENCES))[3]
        others = [
            [99] * len(sequence) if index != 3 else sequence for index, sequence in enumerate(SEQUENCES)
        ]
        torch.testing.assert_close(logprobs(model, pack(others))[3], before, atol=1e-6, rtol=0)
        moved = logprobs(model, pack([SEQUENCES[3], SEQUENCES[0], [7]]))[0]
        torch.testing.assert_close(moved, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_pin_6_left_padded_right_padded_and_packed_log_probs_agree(model, mode):
    """Masks by length, with EOS (id 2) inside a sequence and anything at all in the padding."""
    sequence, width = SEQUENCES[3], 9
    filler = [2, 77, 2, 78]
    assert len(filler) + len(sequence) == width
    with in_mode(model, mode):
        packed = logprobs(model, pack(SEQUENCES))[3]
        for left in (True, False):
            ids = filler + sequence if left else sequence + filler
            attended = [0] * 4 + [1] * 5 if left else [1] * 5 + [0] * 4
            positions = torch.tensor([attended]).cumsum(-1).sub(1).clamp(min=0)
            logits_TV = model(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.tensor([attended]),
                position_ids=positions,
                use_cache=False,
            ).logits[0]
            first = 4 if left else 0
            found = torch.stack(
                [logits_TV[first + t].log_softmax(-1)[token] for t, token in enumerate(sequence[1:])]
            )
            torch.testing.assert_close(found, packed, atol=1e-6, rtol=0)


def test_pin_7_a_forward_with_a_cache_would_leak_so_every_forward_passes_use_cache_false(model):
    """The reason for `model_inputs`. If the first half fails, transformers was mended."""
    row = pack(SEQUENCES)
    assert row.model_inputs()["use_cache"] is False and row.model_inputs()["attention_mask"] is None
    with torch.no_grad():
        cached = model(**{**row.model_inputs(), "use_cache": True}).logits
        assert (cached - model(**row.model_inputs()).logits).abs().max() > 1e-2


def test_a_pack_is_ids_end_to_end_with_positions_that_restart():
    row = pack([[7, 8, 9], [5, 6]])
    assert row.input_ids_1N.tolist() == [[7, 8, 9, 5, 6]] and row.position_ids_1N.tolist() == [
        [0, 1, 2, 0, 1]
    ]
    assert (row.starts, row.lengths, row.num_tokens) == ((0, 3), (3, 2), 5)
    assert row.last_tokens().tolist() == [2, 4]
    assert [part.tolist() for part in row.split(torch.arange(5))] == [[0, 1, 2], [3, 4]]
    assert [part.shape for part in split(torch.zeros(5, 2), row.lengths)] == [(3, 2), (2, 2)]


def test_a_row_that_lies_end_to_end_already_is_that_pack():
    made = packed_row(torch.tensor([7, 8, 9, 5, 6]), [3, 2])
    expected = pack([[7, 8, 9], [5, 6]])
    assert torch.equal(made.input_ids_1N, expected.input_ids_1N)
    assert torch.equal(made.position_ids_1N, expected.position_ids_1N)
    assert (made.starts, made.lengths) == (expected.starts, expected.lengths)


@pytest.mark.parametrize(
    ("lengths", "micro_batch_size"), [([3, 1, 4, 1, 5, 9, 2, 6], 3), ([1], 4), ([2] * 9, 2), ([], 3)]
)
def test_a_pack_plan_holds_every_sequence_once_and_no_pack_is_too_large(lengths, micro_batch_size):
    plan = plan_packs(lengths, micro_batch_size)
    assert sorted(index for members in plan.packs for index in members) == list(range(len(lengths)))
    assert all(0 < len(members) <= micro_batch_size for members in plan.packs)
    assert len(plan.packs) == -(-len(lengths) // micro_batch_size)
    assert plan == plan_packs(list(lengths), micro_batch_size)


def test_a_pack_plan_balances_token_counts():
    lengths = [100, 1, 99, 2, 98, 3, 97, 4]
    totals = [sum(lengths[index] for index in members) for members in plan_packs(lengths, 4).packs]
    assert max(totals) - min(totals) <= 4


@pytest.mark.parametrize(
    ("lengths", "capacity", "packs"),
    [
        ([3, 5, 2, 4], 7, [(1, 2), (0, 3)]),
        ([4, 4, 4], 4, [(0,), (1,), (2,)]),
        ([6, 5, 3, 2], 10, [(0, 2), (1, 3)]),  # 3 goes to the 6: it leaves 1, the 5 would leave 2
        ([1] * 5, 3, [(0, 1, 2), (3, 4)]),
        ([], 8, []),
    ],
)
def test_best_fit_by_hand(lengths, capacity, packs):
    assert list(best_fit(lengths, capacity).packs) == packs


@st.composite
def lengths_and_capacity(draw, max_size: int) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 300))
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=max_size)), capacity


@given(lengths_and_capacity(max_size=120))
def test_best_fit_holds_every_sequence_once_and_no_two_of_its_packs_could_be_one(given_lengths):
    """The latter bounds the packs: all but one are more than half full, counted in pairs."""
    lengths, capacity = given_lengths
    plan = best_fit(lengths, capacity)
    assert sorted(index for members in plan.packs for index in members) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in members) for members in plan.packs]
    assert max(totals) <= capacity
    assert all(a + b > capacity for a, b in combinations(totals, 2))
    assert len(totals) <= 2 * sum(lengths) / capacity + 1
    assert utilisation(plan, lengths, capacity) == pytest.approx(sum(lengths) / (len(totals) * capacity))
    assert plan == best_fit(tuple(lengths), capacity), "a function of its arguments"


def fewest_packs(lengths: list[int], capacity: int) -> int:
    """By trying everything."""

    def place(rest: list[int], free: list[int], best: int) -> int:
        if len(free) >= best:
            return best
        if not rest:
            return len(free)
        for pack_index, room in enumerate(free):
            if room >= rest[0]:
                changed = [*free[:pack_index], room - rest[0], *free[pack_index + 1 :]]
                best = place(rest[1:], changed, best)
        return place(rest[1:], [*free, capacity - rest[0]], best)

    return place(sorted(lengths, reverse=True), [], len(lengths) + 1)


@given(lengths_and_capacity(max_size=7))
def test_best_fit_decreasing_needs_eleven_ninths_of_the_fewest_packs_at_most(given_lengths):
    """Johnson 1973; the constant by Dosa 2007."""
    lengths, capacity = given_lengths
    assert len(best_fit(lengths, capacity).packs) <= 11 / 9 * fewest_packs(lengths, capacity) + 6 / 9


def test_best_fit_fills_rows_where_one_after_the_other_would_not():
    lengths = [1 + 37 * index % 100 for index in range(1000)]
    in_order = [0]
    for length in lengths:
        if in_order[-1] + length > 128:
            in_order.append(0)
        in_order[-1] += length
    plan = best_fit(lengths, 128)
    assert utilisation(plan, lengths, 128) > 0.99 > 0.8 > sum(lengths) / (len(in_order) * 128)
