"""The balance loss of Switch Transformers, by hand; and what it is not: a sum over tokens."""

import math

import pytest
import torch

from stages.objectives.balance import dead_experts, expert_counts, largest, load_balancing_loss, max_load


def logits(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_one_layer_by_hand():
    """Three tokens, two experts: chosen 2/3 and 1/3 of the time, with mean probabilities 0.6 and 0.4."""
    routed = logits([0.9, 0.1], [0.7, 0.3], [0.2, 0.8])
    loss = load_balancing_loss(router_logits=[routed], num_chosen=1)
    assert loss.item() == pytest.approx(2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))


def test_all_choices_of_a_token_count():
    """Three experts, two chosen: the first always, the others once each."""
    routed = logits([0.5, 0.3, 0.2], [0.5, 0.1, 0.4])
    loss = load_balancing_loss(router_logits=[routed], num_chosen=2)
    assert loss.item() == pytest.approx(3 * (1 * 0.5 + 0.5 * 0.2 + 0.5 * 0.3))


def test_layers_are_averaged_before_the_product_as_in_transformers():
    """Each layer sends all to one expert, the two layers to different ones: the means look even."""
    one, other = logits([0.8, 0.2]), logits([0.2, 0.8])
    assert load_balancing_loss(router_logits=[one, other], num_chosen=1).item() == pytest.approx(1.0)
    assert load_balancing_loss(router_logits=[one, one], num_chosen=1).item() == pytest.approx(1.6)


@pytest.mark.parametrize("num_chosen", [1, 2, 4])
def test_an_even_load_costs_the_number_of_chosen_experts_and_a_collapsed_one_the_number_of_experts(
    num_chosen,
):
    even = torch.eye(4).roll(1, 0) * 1e-3 + torch.eye(4) * 2e-3 + torch.eye(4).roll(2, 0) * 5e-4
    assert load_balancing_loss(router_logits=[even], num_chosen=num_chosen).item() == pytest.approx(
        num_chosen
    )
    collapsed = torch.tensor([[0.0, -90.0, -91.0, -92.0]]).expand(5, 4)
    assert load_balancing_loss(router_logits=[collapsed], num_chosen=num_chosen).item() == pytest.approx(4)


def test_the_gradient_takes_probability_from_the_busy_expert():
    routed = logits([0.9, 0.1], [0.7, 0.3], [0.2, 0.8]).requires_grad_()
    load_balancing_loss(router_logits=[routed], num_chosen=1).backward()
    assert (routed.grad[:, 0] > 0).all() and (routed.grad[:, 1] < 0).all()


def test_the_loss_of_a_batch_is_not_the_mean_of_its_halves():
    """Each half sends all to one expert of its own: uneven by itself, even together."""
    first, second = logits([0.9, 0.1], [0.9, 0.1]), logits([0.1, 0.9], [0.1, 0.9])
    halves = [load_balancing_loss(router_logits=[half], num_chosen=1).item() for half in (first, second)]
    whole = load_balancing_loss(router_logits=[torch.cat([first, second])], num_chosen=1).item()
    assert halves == pytest.approx([1.8, 1.8]) and whole == pytest.approx(1.0)


def test_bf16_logits_are_weighed_in_float32():
    routed = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = load_balancing_loss(router_logits=[routed], num_chosen=2)
    assert loss.dtype == torch.float32
    assert loss.item() == load_balancing_loss(router_logits=[routed.float()], num_chosen=2).item()


def test_loads_and_dead_experts_are_counted_by_layer():
    first = logits([0.5, 0.3, 0.1, 0.1], [0.4, 0.5, 0.06, 0.04])
    second = logits([0.5, 0.1, 0.3, 0.1], [0.1, 0.5, 0.1, 0.3])
    chosen = largest(router_logits=[first, second], num_chosen=2)
    counts_LE = expert_counts(chosen=chosen, num_experts=4)
    assert counts_LE.tolist() == [[2, 2, 0, 0], [1, 1, 1, 1]]
    assert dead_experts(counts_LE) == 2
    assert max_load(counts_LE) == pytest.approx((2.0 + 1.0) / 2)
    assert math.isclose(max_load(counts_LE * 7), 1.5), "a matter of shares"
