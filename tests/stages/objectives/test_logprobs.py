import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.objectives.logprobs import (
    MAX_LOG_RATIO,
    bounded_exp,
    next_tokens,
    packed_response_positions,
    padded_response_positions,
    token_entropies,
    token_logprobs,
)
from stages.objectives.masked import length_mask, pad_ragged

VOCABULARY = 11


def brute_force(logits_SV, ids_S, prompt_length, response_length, temperature):
    """One token at a time, in Python floats."""
    logprobs = []
    for t in range(response_length):
        row = [x / temperature for x in logits_SV[prompt_length - 1 + t].double().tolist()]
        top = max(row)
        log_z = top + math.log(sum(math.exp(x - top) for x in row))
        logprobs.append(row[ids_S[prompt_length + t]] - log_z)
    return logprobs


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    seed=st.integers(0, 1000),
)
def test_pin_1_brute_force_vectorised_packed_and_padded_agree(lengths, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = [p for p, _ in lengths], [r for _, r in lengths]
    totals = [p + r for p, r in lengths]
    logits = [torch.randn(n, VOCABULARY, generator=generator) / 2 for n in totals]
    ids = [torch.randint(VOCABULARY, (n,), generator=generator) for n in totals]
    sequences = zip(logits, ids, prompts, responses, strict=True)
    expected = torch.tensor([x for sequence in sequences for x in brute_force(*sequence, temperature)])

    packed = packed_response_positions(prompt_lengths=prompts, response_lengths=responses, device="cpu")
    logits_SV, ids_S = torch.cat(logits), torch.cat(ids)
    from_pack = token_logprobs(
        logits=logits_SV[packed.predicting_N], targets=ids_S[packed.token_N], temperature=temperature
    )
    assert torch.allclose(from_pack, expected, atol=1e-6, rtol=0)

    # The shifted form over the whole row, cross-boundary predictions included, read at the same places.
    if len(ids_S) > 1:
        shifted = token_logprobs(
            logits=logits_SV, targets=next_tokens(ids_S[None])[0], temperature=temperature
        )
        assert torch.allclose(shifted[packed.predicting_N], expected, atol=1e-6, rtol=0)

    row_length = max(totals) + 2
    for side in ("left", "right"):
        padded_logits = torch.full((len(ids), row_length, VOCABULARY), torch.nan)
        padded_ids = torch.full((len(ids), row_length), 7)
        for row, n in enumerate(totals):
            columns = slice(row_length - n, None) if side == "left" else slice(0, n)
            padded_logits[row, columns], padded_ids[row, columns] = logits[row], ids[row]
        positions = padded_response_positions(
            prompt_lengths=prompts,
            response_lengths=responses,
            row_length=row_length,
            padding_side=side,
            device="cpu",
        )
        from_padded = token_logprobs(
            logits=padded_logits.flatten(0, 1)[positions.predicting_N],
            targets=padded_ids.flatten()[positions.token_N],
            temperature=temperature,
        )
        assert torch.allclose(from_padded, expected, atol=1e-6, rtol=0)


def test_pin_20_values_are_read_where_the_token_is_predicted():
    positions = packed_response_positions(prompt_lengths=[2, 1], response_lengths=[2, 1], device="cpu")
    assert positions.predicting_N.tolist() == [1, 2, 4]  # prompt_len - 1 + t, after each sequence's start
    assert positions.token_N.tolist() == [2, 3, 5]
    values_S = torch.arange(6.0)
    mask_BT = length_mask(lengths=[2, 1], max_length=2, device="cpu")
    assert pad_ragged(values_N=values_S[positions.predicting_N], mask_BT=mask_BT).tolist() == [[1, 2], [4, 0]]


def test_positions_in_padded_rows_by_hand():
    def positions(side):
        return padded_response_positions(
            prompt_lengths=[2, 1], response_lengths=[1, 1], row_length=4, padding_side=side, device="cpu"
        )

    assert positions("right").predicting_N.tolist() == [1, 4]
    assert positions("left").predicting_N.tolist() == [2, 6]


def test_positions_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        packed_response_positions(prompt_lengths=[0], response_lengths=[2], device="cpu")
    with pytest.raises(ValueError, match="negative"):
        packed_response_positions(prompt_lengths=[1], response_lengths=[-1], device="cpu")
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        packed_response_positions(prompt_lengths=[1, 1], response_lengths=[1], device="cpu")
    with pytest.raises(ValueError, match="does not fit"):
        padded_response_positions(
            prompt_lengths=[3], response_lengths=[2], row_length=4, padding_side="left", device="cpu"
        )


def test_uniform_logits_score_minus_ln_vocabulary_at_any_temperature():
    logits, targets = torch.full((2, 3, 8), 5.0), torch.zeros(2, 3, dtype=torch.int64)
    for temperature in (0.5, 1.0, 3.0):
        logprobs = token_logprobs(logits=logits, targets=targets, temperature=temperature)
        assert torch.allclose(logprobs, torch.full((2, 3), -math.log(8)))


def test_temperature_divides_the_logits_by_hand():
    logits = torch.tensor([[math.log(4.0), 0.0]])
    logprobs = token_logprobs(logits=logits, targets=torch.tensor([0]), temperature=2.0)
    assert logprobs.item() == pytest.approx(math.log(2 / 3), abs=1e-6)  # sqrt(4) : 1


def test_pin_3_bf16_logits_are_scored_in_float32():
    torch.manual_seed(0)
    logits = (torch.randn(64, 5000) * 4).bfloat16()
    targets = torch.randint(5000, (64,))
    logprobs = token_logprobs(logits=logits, targets=targets, temperature=0.9)
    exact = torch.log_softmax(logits.double() / 0.9, -1).gather(-1, targets[:, None]).squeeze(-1)
    assert logprobs.dtype == torch.float32
    assert (logprobs - exact).abs().max() < 1e-5
    assert (torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1) - exact).abs().max() > 1e-2


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
def test_pin_3_chunked_over_tokens_equals_the_whole_in_value_and_gradient(chunk_tokens):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, VOCABULARY, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(VOCABULARY, (2, 5)), torch.randn(2, 5, dtype=torch.float64)
    whole = torch.log_softmax(logits / 1.3, -1).gather(-1, targets[..., None]).squeeze(-1)
    (expected,) = torch.autograd.grad((whole * weights).sum(), logits)
    chunked = token_logprobs(logits=logits, targets=targets, temperature=1.3, chunk_tokens=chunk_tokens)
    (gradient,) = torch.autograd.grad((chunked * weights).sum(), logits)
    assert torch.allclose(chunked, whole, atol=1e-12) and torch.allclose(gradient, expected, atol=1e-12)
    with torch.no_grad():
        again = token_logprobs(logits=logits, targets=targets, temperature=1.3, chunk_tokens=chunk_tokens)
    assert torch.equal(again, chunked)


def test_entropy_by_hand_and_with_excluded_tokens():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [math.log(3.0), 0.0, -torch.inf]], requires_grad=True)
    entropies = token_entropies(logits=logits, temperature=1.0)
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropies.tolist() == pytest.approx([math.log(2), quarter], abs=1e-6)
    entropies.sum().backward()
    assert logits.grad.isfinite().all()


def test_bad_inputs_of_log_probs_are_refused():
    logits, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(logits=logits, targets=targets, temperature=0.0)
    with pytest.raises(ValueError, match="do not pair"):
        token_logprobs(logits=logits, targets=targets[:1], temperature=1.0)
    with pytest.raises(ValueError, match="chunk_tokens"):
        token_logprobs(logits=logits, targets=targets, temperature=1.0, chunk_tokens=0)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        token_logprobs(logits=logits, targets=targets - 100, temperature=1.0)


def test_no_tokens_give_no_log_probs():
    logits = torch.zeros(0, 3, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    assert token_logprobs(logits=logits, targets=targets, temperature=1.0).shape == (0,)


def test_bounded_exp_is_exp_then_its_tangent():
    x = torch.tensor([0.0, -3.0, 5.0, MAX_LOG_RATIO, 25.0, 500.0], dtype=torch.float64, requires_grad=True)
    y = bounded_exp(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    top = math.exp(MAX_LOG_RATIO)
    assert y[0] == 1.0
    assert torch.allclose(y[:4], x[:4].exp()) and torch.allclose(slope[:4], x[:4].exp())
    assert y[4:].tolist() == pytest.approx([6 * top, 481 * top]) and slope[4:].tolist() == [top, top]
    assert bounded_exp(torch.tensor([1e6])).isfinite().all()
