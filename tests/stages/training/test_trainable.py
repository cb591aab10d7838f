"""The records that losses and models exchange: several terms share one forward and add up."""

import pytest
import torch

from stages.training.trainable import Reads, TermLoss


def test_the_union_of_two_reads_asks_for_what_either_asks() -> None:
    policy = Reads(logprobs=True, temperature=0.7)
    assert policy | Reads(entropies=True, temperature=0.7) == Reads(
        logprobs=True, entropies=True, temperature=0.7
    )
    assert Reads(values=True) | policy == Reads(values=True, logprobs=True, temperature=0.7)
    assert Reads(scores=True) | Reads(final_values=True, router_loss=True) == Reads(
        scores=True, final_values=True, router_loss=True
    )


def test_one_forward_has_one_temperature() -> None:
    with pytest.raises(AssertionError, match="one temperature"):
        Reads(logprobs=True, temperature=1.0) | Reads(logprobs=True, temperature=0.5)
    with pytest.raises(AssertionError, match="have a temperature"):
        Reads(logprobs=True)
    with pytest.raises(AssertionError, match="have a temperature"):
        Reads(values=True, temperature=1.0)


def test_terms_of_one_model_add_up_and_keep_the_larger_extreme() -> None:
    def scalar(value: float) -> torch.Tensor:
        return torch.tensor(value)

    policy = TermLoss(
        loss=scalar(2.0), sums={"clip": scalar(1.0), "both": scalar(0.5)}, extremes={"ratio": scalar(3.0)}
    )
    kl = TermLoss(loss=scalar(0.25), sums={"both": scalar(0.25)}, extremes={"ratio": scalar(1.0)})
    total = policy + kl
    assert float(total.loss) == 2.25
    assert {name: float(value) for name, value in total.sums.items()} == {"clip": 1.0, "both": 0.75}
    assert {name: float(value) for name, value in total.extremes.items()} == {"ratio": 3.0}
