"""Models without their placing: a forward with its gradient, and steps of modules that read no packs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.training.forwards import ResponsePack
from stages.training.fsdp import outputs_of
from stages.training.models import CausalLM, TokenScorer
from stages.training.optimize import Optimizer, Tally
from stages.training.trainable import Accepts, Reads, StepResult, TermLoss


def response_logprobs(model: CausalLM, packed: ResponsePack, *, temperature: float = 1.0) -> Tensor:
    """Log-probs [B, T] of the response tokens."""
    return packed.padded(outputs_of(model, packed, Reads(logprobs=True, temperature=temperature)).logprobs_N)


def response_values(model: TokenScorer, packed: ResponsePack) -> Tensor:
    """Values [B, T] where the response tokens are predicted."""
    return packed.padded(outputs_of(model, packed, Reads(values=True)).values_N)


def losses_of(model: CausalLM, packs: Sequence[Any], loss_of: Callable[..., TermLoss]) -> Tensor:
    """The sum of a recipe's loss over packs whose targets are scored; a scalar with its gradient."""
    reads = Reads(logprobs=True, router_loss=True, temperature=1.0)
    terms = [loss_of(pack, outputs_of(model, pack, reads), router_coef=0.0) for pack in packs]
    return torch.stack([term.loss for term in terms]).sum()


def take_step(
    optimizer: Optimizer,
    step: int,
    batches: Sequence[Any],
    loss_of: Callable[[Any], Tensor | TermLoss],
    accepts: Accepts = lambda *_: True,
) -> StepResult:
    """What `Trained.take_step` does, with batches of any kind and losses that make their own forward."""
    optimizer.zero_grad()
    tally = Tally()
    for batch in batches:
        loss = loss_of(batch)
        term = loss if isinstance(loss, TermLoss) else TermLoss(loss=loss)
        term.loss.backward()
        tally.add(term)
    return optimizer.step(step, tally, accepts)
