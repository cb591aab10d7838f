"""How evenly routers spread tokens over experts, and the loss that makes them.

    router logits of each layer --> chosen experts, probabilities --> load_balancing_loss, expert_counts

Owns: the balance loss of Switch Transformers and counting. Does not own: getting router logits out of a
model, weighing micro-batches (training.routing).

Legend: L layers with experts, N tokens, E experts; `num_chosen` of them work for each token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.objectives.masked import widened


def load_balancing_loss(*, router_logits: Sequence[Tensor], num_chosen: int) -> Tensor:
    """E * sum over experts of (times chosen, per token) * (mean probability); a scalar, in float32 or more.

    `router_logits`: [N, E] of each of L layers, before the softmax; every token counts, a packed row has no
    padding. `num_chosen` when tokens are spread evenly, at most E; its gradient passes the probabilities
    alone. It is no sum over tokens: that of a batch is not made of those of its parts.
    Source: Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961), eq. 4-6 without alpha. As in
    transformers, all choices of a token count, and both factors are means over tokens *and layers*, where
    Switch takes each layer by itself: two layers that each use another half of the experts count as even.
    `max_load` and `dead_experts` look at each layer.
    """
    logits_LNE = torch.stack([widened(logits_NE) for logits_NE in router_logits])
    num_layers, num_tokens, num_experts = logits_LNE.shape
    chosen_E = _expert_counts(logits_LNE, num_chosen).sum(0) / (num_layers * num_tokens)
    probability_E = logits_LNE.softmax(-1).mean((0, 1))
    return num_experts * (chosen_E * probability_E).sum()


def expert_counts(*, router_logits: Sequence[Tensor], num_chosen: int) -> Tensor:
    """How many tokens each expert of each layer works for; float64 [L, E]."""
    return _expert_counts(torch.stack(list(router_logits)).float(), num_chosen).double()


@torch.no_grad()
def _expert_counts(logits_LNE: Tensor, num_chosen: int) -> Tensor:
    """The experts of a token are those with the largest logits."""
    experts_LNK = logits_LNE.topk(num_chosen, dim=-1).indices
    return torch.zeros_like(logits_LNE).scatter_(-1, experts_LNK, 1.0).sum(1)


def max_load(counts_LE: Tensor) -> float:
    """Load of the busiest expert over that of an evenly loaded one, mean over layers: 1 is even, E /
    `num_chosen` the worst.
    """
    return float((counts_LE.max(-1).values / counts_LE.mean(-1)).mean())


def dead_experts(counts_LE: Tensor) -> int:
    """Experts of all layers that worked for no token."""
    return int((counts_LE == 0).sum())
