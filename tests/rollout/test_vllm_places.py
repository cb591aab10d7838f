"""Tensors of a checkpoint are found in a live model by the model's own loading, whatever it makes of them."""

from collections.abc import Iterable

import pytest
import torch
from rigs import SAME
from torch import nn
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.models.utils import AutoWeightsLoader

from rollout.vllm_places import diagnosis, takes_head


def half_loader(param: nn.Parameter, loaded_weight: torch.Tensor, is_lower: bool) -> None:
    """As vLLM's layers load a part of what they join."""
    param.data.narrow(0, 4 * is_lower, 4).copy_(loaded_weight)


class Model(nn.Module):
    """Joins two tensors in one, transposes one, negates one, has never heard of another, and counts in a
    buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joined = nn.Linear(3, 8, bias=False)
        self.transposed = nn.Linear(5, 3, bias=False)
        self.negative = nn.LayerNorm(4)
        self.register_buffer("count", torch.zeros(2))
        self.requires_grad_(False)
        self.joined.weight.weight_loader = half_loader
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.seen = []
        for name, tensor in weights:
            self.seen.append(name)
            match name:
                case "upper" | "lower":
                    part = self.joined.weight
                    part.weight_loader(part, tensor, name == "lower")
                case "transposed":
                    AutoWeightsLoader(self).load_weights([("transposed.weight", tensor.t())])
                case "negative":
                    AutoWeightsLoader(self).load_weights([("negative.weight", -tensor)])
                case "ignored":
                    pass
                case _:
                    AutoWeightsLoader(self).load_weights([(name, tensor)])


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def checkpoint(model) -> dict[str, torch.Tensor]:
    """What the model holds."""
    return {
        "upper": model.joined.weight[:4].clone(),
        "lower": model.joined.weight[4:].clone(),
        "transposed": model.transposed.weight.t().contiguous(),
        "negative.bias": model.negative.bias.clone(),
        "count": model.count.clone(),
    }


def test_joined_and_transposed_tensors_and_buffers_are_found(model, checkpoint):
    assert diagnosis(model, checkpoint) == SAME


@pytest.mark.parametrize("name", ["upper", "lower", "transposed", "negative.bias", "count"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_element_that_differs_names_its_tensor_and_no_other(model, checkpoint, name, place):
    checkpoint[name].view(-1)[place] += 1e-6
    found = diagnosis(model, checkpoint)
    assert (found.differing, found.not_compared) == ((name,), ())


def test_not_a_number_in_the_live_model_differs(model, checkpoint):
    model.joined.weight[5, 1] = torch.nan
    assert diagnosis(model, checkpoint).differing == ("lower",)


def test_what_the_model_changes_or_leaves_out_is_told_and_not_passed_over(model, checkpoint):
    found = diagnosis(model, checkpoint | {"negative": -model.negative.weight, "ignored": torch.zeros(3)})
    assert found.differing == ()
    assert [line.partition(" ")[0] for line in found.not_compared] == ["negative", "ignored"]


def test_nothing_of_the_live_model_changes_even_when_it_refuses_a_name(model, checkpoint):
    held = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = diagnosis(model, checkpoint | {"count": torch.ones(2), "stranger": torch.ones(2)})
    assert found.shows_nothing and "named 'stranger'" in found.not_compared[0]
    assert model.seen[-1] == "stranger", "it was asked"
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == held
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    assert diagnosis(model, checkpoint) == SAME


@pytest.mark.parametrize("name", ["stranger", "ignored", "transposed"])
def test_a_head_that_the_model_does_not_know_ignores_or_puts_elsewhere_is_not_sent_to_it(model, name):
    assert not takes_head(model, name, (5, 3))
