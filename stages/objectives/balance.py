"""How evenly routers spread tokens over experts, and the loss that makes them.

    router logits of each layer --> chosen experts, probabilities --> load_balancing_loss
    chosen experts of each layer --expert_counts--> max_load, dead_experts

Owns: the balance loss of Switch Transformers and counting. Does not own: getting router logits out of a
model, weighing micro-batches (training.routing).

Legend: L layers with experts, N tokens, E experts, K of them chosen for each token (`num_chosen`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.objectives.masked import widened


def load_balancing_loss(*, router_logits: Sequence[Tensor], num_chosen: int) -> Tensor:
    """E * sum over experts of (times chosen, per token) * (mean probability); a scalar, in float32 or more.

    `router_logits`: [N, E] of each of L layers, before the softmax; every token counts, a packed row has no
    padding. It equals `num_chosen` when tokens are spread evenly, and is at most E. Gradients flow through
    the probabilities only. The loss of a batch is not the sum of its parts' losses.
    Source: Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961), eq. 4-6 without alpha. As in
    transformers, all choices of a token count, and both factors are means over tokens *and layers*, where
    Switch takes each layer by itself: two layers that each use another half of the experts count as even.
    `max_load` and `dead_experts` look at each layer. As in transformers too, the largest logits count as
    chosen, also where a router adds a bias of its own before it chooses.
    """
    logits_LNE = torch.stack([widened(logits_NE) for logits_NE in router_logits])
    num_layers, num_tokens, num_experts = logits_LNE.shape
    chosen = largest(router_logits=list(logits_LNE), num_chosen=num_chosen)
    times_E = expert_counts(chosen=chosen, num_experts=num_experts).sum(0)
    chosen_E = times_E.to(logits_LNE.dtype) / (num_layers * num_tokens)
    probability_E = logits_LNE.softmax(-1).mean((0, 1))
    return num_experts * (chosen_E * probability_E).sum()


@torch.no_grad()
def largest(*, router_logits: Sequence[Tensor], num_chosen: int) -> list[Tensor]:
    """The experts with the largest logits, [N, K] of each layer."""
    return [logits_NE.topk(num_chosen, dim=-1).indices for logits_NE in router_logits]


@torch.no_grad()
def expert_counts(*, chosen: Sequence[Tensor], num_experts: int) -> Tensor:
    """How many tokens each expert of each layer works for, of the chosen experts [N, K]; float64 [L, E]."""
    counts = []
    for experts_NK in chosen:
        works_NE = experts_NK.new_zeros((len(experts_NK), num_experts)).scatter_(-1, experts_NK, 1)
        counts.append(works_NE.sum(0))
    return torch.stack(counts).double()


def max_load(counts_LE: Tensor) -> float:
    """Load of the busiest expert over that of an evenly loaded one, mean over layers: 1 is even, E /
    `num_chosen` the worst.
    """
    return float((counts_LE.max(-1).values / counts_LE.mean(-1)).mean())


def dead_experts(counts_LE: Tensor) -> int:
    """Experts of all layers that worked for no token."""
    return int((counts_LE == 0).sum())
