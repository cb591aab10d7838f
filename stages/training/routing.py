"""The balance loss of a model with routed experts, and how balanced it is.

    micro-batch --forward with router logits--> its loss + coef * share * balance loss --> backward
                                                    `--> counts, since the last line of metrics --> take

Owns: which models have routers, the weight of a micro-batch's balance loss, the window of the metrics. Does
not own: the loss (objectives.balance), the routing itself (transformers).

The balance loss is not a sum over tokens. It is computed for each micro-batch alone and weighed by the
micro-batch's share of the step's tokens over all ranks: coef * sum_m (n_m / n) * L_m. So it depends on how a
step is split into micro-batches, and nothing else of the gradient does: each micro-batch is to be balanced by
itself. Which rank has a micro-batch, sharding and recomputation do not change it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from stages.errors import ModelError
from stages.objectives.balance import dead_experts, expert_counts, load_balancing_loss, max_load
from stages.training import ranks
from stages.training.models import CausalLM

Forward = Callable[[Mapping[str, Any], Tensor], Tensor]
"""A `CausalLM`, or what is called like one: (inputs of a row, positions_K) -> logits."""


class RouterBalance:
    """The routers of one model, through the steps of a stage. Without routers it adds and measures nothing.

    Example: balance.added_to(lambda forward: _loss(forward, rows), share=rows.share_of_tokens)
    """

    def __init__(self, model: CausalLM, *, coef: float, setting: str) -> None:
        """`coef` is the value of `setting`. ModelError when it is above 0 and there is nothing to balance."""
        self._model = model
        self._coef = coef
        self._has_routers = has_routers(model.inner)
        self._setting = setting
        if not self._has_routers:
            self._check_nothing_is_asked()
        self._begin_window()

    def _check_nothing_is_asked(self) -> None:
        if self._coef > 0:
            raise ModelError(
                f"{self._setting}: transformers has no balance loss for this "
                f"{type(self._model.inner).__name__}: no routed experts, or none that it balances; set 0"
            )

    def _begin_window(self) -> None:
        self._loss_sum: float | Tensor = 0.0  # of each micro-batch, times its tokens' choices of experts
        self._counts_LE: Tensor | None = None

    def added_to(self, loss_of: Callable[[Forward], Tensor], *, share: float) -> Tensor:
        """`loss_of(model)`, which is one forward of a micro-batch, and the micro-batch's share of the step's
        balance loss; `share` is its part of the step's tokens, 0 to 1.
        """
        if not self._has_routers:
            return loss_of(self._model)
        router_logits: list[Tensor] = []

        def forward(inputs: Mapping[str, Any], positions_K: Tensor) -> Tensor:
            assert not router_logits, "one forward per micro-batch"
            logits, routed = self._model(inputs, positions_K, with_router_logits=True)
            router_logits.extend(routed)
            return logits

        loss = loss_of(forward)
        if not router_logits:  # the config names experts, and every layer as dense
            self._check_nothing_is_asked()
            return loss
        inner: Any = self._model.inner
        num_chosen: int = inner.num_experts_per_tok
        balance = load_balancing_loss(router_logits=router_logits, num_chosen=num_chosen)
        self._add(balance.detach(), expert_counts(router_logits=router_logits, num_chosen=num_chosen))
        return loss + self._coef * share * balance if self._coef else loss

    def _add(self, balance: Tensor, counts_LE: Tensor) -> None:
        self._loss_sum = self._loss_sum + balance.double() * counts_LE[0].sum()
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE

    def take(self) -> dict[str, float]:
        """Metrics of all ranks since the last call; {} without routers. Every rank, together."""
        if self._counts_LE is None:
            return {}
        counts_LE = ranks.sum_over_ranks(self._counts_LE)
        (loss_sum,) = ranks.sums(float(self._loss_sum))
        self._begin_window()
        return {
            "train/router_aux_loss": loss_sum / float(counts_LE[0].sum()),
            "train/router_max_load": max_load(counts_LE),
            "train/router_dead_experts": float(dead_experts(counts_LE)),
        }


def has_routers(model: Any) -> bool:
    """Whether transformers gives a balance loss for `model`, a PreTrainedModel: its class does, and its
    config has experts.
    """
    gives_logits = "output_router_logits" in inspect.signature(model.forward).parameters
    return gives_logits and model.num_experts > 1
