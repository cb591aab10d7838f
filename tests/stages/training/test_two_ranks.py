"""Counts, whitening and gradients over two real ranks: what one rank computes, to rounding."""

import pytest
import torch
from inline import worker_in
from ppo_inputs import ppo_inputs
from two_ranks import AGGREGATIONS, measure, measure_on_two

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def found(tied_model_dir, tmp_path_factory):
    """The same measurements on one rank and on two."""
    inputs = ppo_inputs(tied_model_dir, tmp_path_factory.mktemp("reward"))
    one = measure(worker_in(tmp_path_factory.mktemp("one"), "ppo"), inputs)
    two = measure_on_two(tmp_path_factory.mktemp("two"), inputs)
    assert one.keys() == two.keys()
    return one, two


def test_pin_22_advantages_are_whitened_over_the_batch_of_all_ranks(found):
    one, two = found
    for name in ("advantages", "returns", "score"):
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("model", ["policy", "value"])
def test_pin_27_gradients_of_ranks_are_summed_over_counts_of_the_whole_step(found, aggregation, model):
    """FSDP2 averages by default: half of this gradient. Three packs: one rank has an empty one."""
    one, two = (side[f"{aggregation}/{model}"] for side in found)
    assert one.norm() > 0
    assert (two - one).norm() <= 1e-6 * one.norm(), (two - one).norm() / one.norm()
    losses = [float(side[f"{aggregation}/{model} loss"]) for side in found]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5, rel=1e-5)
