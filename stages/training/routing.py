"""The balance loss of a model with routed experts, and how balanced it is.

    micro-batch --forward with router logits--> its loss + coef * share * balance loss --> backward
                        `--> balance loss, chosen experts --> sums of the taken steps (Observed)

Owns: which models have routers, what their routers chose, the weight of a micro-batch's balance loss. Does
not own: the loss (objectives.balance), the routing itself (transformers), the window of the metrics
(observed).

The balance loss is not a sum over tokens. It is computed for each micro-batch alone and weighed by the
micro-batch's share of the step's tokens over all ranks: coef * sum_m (n_m / n) * L_m. So it depends on how a
step is split into micro-batches, and nothing else of the gradient does: each micro-batch is to be balanced by
itself. Which rank has a micro-batch, sharding and recomputation do not change it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder

from stages.errors import ModelError
from stages.objectives.balance import dead_experts, expert_counts, largest, load_balancing_loss, max_load
from stages.training.observed import Observed

if TYPE_CHECKING:
    from stages.training.models import CausalLM

Forward = Callable[[Mapping[str, Any], Tensor], Tensor]
"""A `CausalLM`, or what is called like one: (inputs of a row, positions_K) -> logits."""


class RouterBalance(Observed):
    """The routers of one model, through the steps of a stage. Without routers it adds and measures nothing.

    Example: balance.added_to(lambda forward: _loss(forward, rows), share=rows.share_of_tokens)
    """

    def __init__(self, model: "CausalLM", *, coef: float, setting: str) -> None:
        """`coef` is the value of `setting`. ModelError when it is above 0 and there is nothing to balance."""
        super().__init__()
        self._model = model
        self._coef = coef
        self._routers = routers(model.inner)
        if coef > 0:
            check_balanced(model.inner, setting)

    def added_to(self, loss_of: Callable[[Forward], Tensor], *, share: float) -> Tensor:
        """`loss_of(model)`, which is one forward of a micro-batch, and the micro-batch's share of the step's
        balance loss; `share` is its part of the step's tokens, 0 to 1.
        """
        if not self._routers:
            return loss_of(self._model)
        router_logits: list[Tensor] = []
        chosen: list[Tensor] = []
        inner: Any = self._model.inner
        num_chosen: int = inner.num_experts_per_tok

        def forward(inputs: Mapping[str, Any], positions_K: Tensor) -> Tensor:
            assert not router_logits, "one forward per micro-batch"
            with _choices(self._routers, num_chosen) as seen:
                logits, routed = self._model(inputs, positions_K, with_router_logits=True)
            router_logits.extend(routed)
            chosen.extend(seen or largest(router_logits=routed, num_chosen=num_chosen))
            return logits

        loss = loss_of(forward)
        assert len(chosen) == len(router_logits) > 0, "each router of each layer was seen once"
        balance = load_balancing_loss(router_logits=router_logits, num_chosen=num_chosen)
        num_tokens, num_experts = router_logits[0].shape
        counts_LE = expert_counts(chosen=chosen, num_experts=num_experts)
        self.add(torch.cat([balance.detach().double()[None] * num_tokens, counts_LE.flatten()]))
        return loss + self._coef * share * balance if self._coef else loss

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Of the balance loss times tokens, and the counts [L, E]."""
        inner: Any = self._model.inner
        loss_sum, *counts = sums
        counts_LE = torch.tensor(counts, dtype=torch.float64).reshape(-1, inner.num_experts)
        num_tokens = float(counts_LE[0].sum()) / inner.num_experts_per_tok
        return {
            "train/router_aux_loss": loss_sum / num_tokens,
            "train/router_max_load": max_load(counts_LE),
            "train/router_dead_experts": float(dead_experts(counts_LE)),
        }


def routers(model: Any) -> list[nn.Module]:
    """The modules of `model`, a PreTrainedModel, that route tokens and that transformers balances: none where
    its class gives no router logits, does not say how many experts there are, or every layer is dense.
    """
    gives_logits = "output_router_logits" in inspect.signature(model.forward).parameters
    if not (gives_logits and hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")):
        return []
    recorders = _router_recorders(model.base_model)
    return [
        module
        for name, module in model.base_model.named_modules()
        if model.num_experts > 1 and any(_records(recorder, name, module) for recorder in recorders)
    ]


def check_balanced(model: Any, setting: str) -> None:
    """Raise ModelError when `setting` asks to balance `model`, a PreTrainedModel, and there is nothing to."""
    if not routers(model):
        raise ModelError(
            f"{setting}: transformers has no balance loss for this {type(model).__name__}: no routed "
            "experts, or none that it balances; set 0"
        )


def _router_recorders(body: Any) -> list[OutputRecorder]:
    """Where transformers takes router logits from; a model of several kinds of routers has several."""
    if "router_logits" not in body.can_record_outputs:
        return []
    recorders = body.can_record_outputs["router_logits"]
    listed = recorders if isinstance(recorders, list) else [recorders]
    return [one if isinstance(one, OutputRecorder) else OutputRecorder(one, index=1) for one in listed]


def _records(recorder: OutputRecorder, name: str, module: nn.Module) -> bool:
    is_within = recorder.layer_name is None or f".{recorder.layer_name}." in f".{name}."
    return is_within and isinstance(module, recorder.target_class)


@contextmanager
def _choices(modules: Sequence[nn.Module], num_chosen: int) -> Iterator[list[Tensor]]:
    """Inside, what it yields gathers the chosen experts [N, K] of each router that returns them, in order.

    A router may choose otherwise than by its logits: ernie4_5_moe and minimax_m2 add a bias first.
    """
    seen: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        for part in output if isinstance(output, tuple) else ():
            if isinstance(part, Tensor) and not part.is_floating_point() and part.shape[1:] == (num_chosen,):
                seen.append(part.detach())

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
