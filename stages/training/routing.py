"""The balance loss of a model with routed experts, and how balanced it is.

    packed row --forward with router logits--> logits, Routed: balance loss, experts' counts
    term of a pack --with_balance--> loss + coef * share * balance loss; sums --router_metrics--> metrics

Owns: which models have routers, what their routers chose, the weight of a micro-batch's balance loss. Does
not own: the loss (objectives.balance), the routing itself (transformers), the window of the metrics (loop).

The balance loss is not a sum over tokens. It is computed for each micro-batch alone and weighed by the
micro-batch's share of the step's tokens over all ranks: coef * sum_m (n_m / n) * L_m. So it depends on how a
step is split into micro-batches, because each is balanced by itself. Nothing else of the gradient does. Which
rank has a micro-batch, sharding and recomputation do not change it.

Legend: N tokens of a row, K of its positions, L layers with experts, E experts.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder

from stages.errors import ModelError
from stages.objectives.balance import dead_experts, expert_counts, largest, load_balancing_loss, max_load
from stages.training.trainable import Outputs, TermLoss

if TYPE_CHECKING:
    from stages.training.models import CausalLM

BALANCE_SUM, TOKENS_SUM, COUNTS_SUM = "router/balance", "router/tokens", "router/counts"
"""Sums of a step: the balance loss times tokens, tokens, and how many of them each expert worked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """What the routers of a model did in one forward."""

    balance_loss: Tensor  # scalar, differentiable, without a coefficient
    expert_counts_LE: Tensor  # float64, tokens that each expert of each layer worked for


def routed_forward(
    model: "CausalLM", inputs: Mapping[str, Any], positions_K: Tensor
) -> tuple[Tensor, Routed]:
    """Logits [1, K, V] of a packed row, and its routing, of a model that has `routers`."""
    inner: Any = model.inner
    num_chosen: int = inner.num_experts_per_tok
    with _choices(model.routers, num_chosen) as seen:
        logits, router_logits = model(inputs, positions_K, with_router_logits=True)
    chosen = seen or largest(router_logits=router_logits, num_chosen=num_chosen)
    assert len(chosen) == len(router_logits) > 0, "each router of each layer was seen once"
    return logits, Routed(
        balance_loss=load_balancing_loss(router_logits=router_logits, num_chosen=num_chosen),
        expert_counts_LE=expert_counts(chosen=chosen, num_experts=router_logits[0].shape[1]),
    )


def with_balance(term: TermLoss, now: Outputs, *, coef: float, num_tokens: int, share: float) -> TermLoss:
    """`term`, with the pack's share of the step's balance loss and what is watched of the routers; as it is
    for a model without routers. `num_tokens` of the pack are the part `share` of the step's, 0 to 1.
    """
    if now.router_loss is None or now.expert_counts_LE is None:
        return term
    watched = TermLoss(
        loss=coef * share * now.router_loss if coef else torch.zeros_like(term.loss),
        sums={
            BALANCE_SUM: now.router_loss.detach().double() * num_tokens,
            TOKENS_SUM: torch.tensor(float(num_tokens)),
            COUNTS_SUM: now.expert_counts_LE,
        },
    )
    return term + watched


def router_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Of the sums of some steps, as `with_balance` gives them."""
    return {
        "train/router_aux_loss": float(sums[BALANCE_SUM]) / float(sums[TOKENS_SUM]),
        "train/router_max_load": max_load(sums[COUNTS_SUM]),
        "train/router_dead_experts": float(dead_experts(sums[COUNTS_SUM])),
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
