"""The probe of a loaded model: do sequences in one row see each other, or anything but what they should?

    3 sequences of 8 tokens: one packed row, as the stages run it --compare--> each alone, eager attention

What a family's layers do with a packed row is theirs to say: a layer may mix tokens without attention, keep a
state, or draw at random. So it is tried, on the model itself, before it is sharded. Cost: a forward of 24
tokens and three of 8 (SmolLM2-135M: 0.8 s of one core). Owns: that comparison. Does not own: what shows in
longer sequences only (model_rules).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.errors import ModelError
from stages.training.model_rules import raise_unless_of_the_model
from stages.training.packed_attention import register_packed_attention

NUM_SEQUENCES, SEQUENCE_TOKENS = 3, 8
LIMIT = 1e-3
"""Largest difference of a log-prob (in nats) or a score: in fp32 rounding stays far below."""
HIDDEN_LIMIT = 1e-3
"""The same of hidden states, as a share of the largest: they tell also where weights are small and log-probs
flat. Measured: 5e-7 for SmolLM2-135M, and 4e-6 at most for small LLaMAs in which one channel of the residual
stream is up to 1e6 times as large as the others (massive activations).
"""

Forward = Callable[[list[list[int]]], Tensor]
"""Sequences, packed in one row, to an output per token (N, ...)."""


@torch.no_grad()
def check_packed(inner: PreTrainedModel, head: nn.Module, forward: Forward, directory: Path) -> None:
    """Raise ModelError when `forward`, a packed forward of `inner` with its `head`, gives other outputs than
    for each sequence alone.
    """
    if convolutions := [name for name, module in inner.named_modules() if isinstance(module, nn.Conv1d)]:
        raise ModelError(
            f"{_named(inner, directory)} cannot be trained here: {convolutions[0]} mixes the tokens of a row "
            "without attention, so packed sequences would see each other"
        )
    sequences = _sequences(inner)
    try:
        outputs_N, hidden_ND = _observed(head, forward, sequences)
        with _eager(inner):
            alone = [_observed(head, forward, [one]) for one in sequences]
    except ModelError as error:
        raise ModelError(f"{_named(inner, directory)} cannot be trained here: {error}") from error
    except Exception as error:  # a family's forward may refuse a packed row with any error
        raise_unless_of_the_model(error)
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{_named(inner, directory)} cannot be trained here: it does not compute a packed row "
            f"({type(error).__name__}: {reason})"[:400]
        ) from error
    difference = (outputs_N - torch.cat([outputs for outputs, _ in alone])).abs().max()
    expected_ND = torch.cat([hidden for _, hidden in alone])
    deviation = (hidden_ND - expected_ND).abs().max() / expected_ND.abs().max()
    if not (difference <= LIMIT and deviation <= HIDDEN_LIMIT):
        raise ModelError(
            f"{_named(inner, directory)} cannot be trained here: packed sequences differ from each alone "
            f"by {float(difference):.2g} (limit {LIMIT:g}; hidden states by {float(deviation):.2g} of the "
            f"largest, limit {HIDDEN_LIMIT:g}): its layers mix tokens outside of attention, or are random"
        )


def _sequences(inner: PreTrainedModel) -> list[list[int]]:
    """Ids from all over the vocabulary, the same for every model of its size."""
    embeddings = inner.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding), "the loader has looked (model_rules.check_ends)"
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_SEQUENCES, SEQUENCE_TOKENS)
    ids: list[list[int]] = torch.randint(embeddings.num_embeddings, shape, generator=generator).tolist()
    return ids


def _observed(head: nn.Module, forward: Forward, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """What `forward` returns, and the hidden states (N, D) that `head` was given meanwhile."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, -2)))
    try:
        output_N = forward(sequences)
    finally:
        hook.remove()
    (hidden_ND,) = seen
    return output_N, hidden_ND


@contextmanager
def _eager(inner: PreTrainedModel) -> Iterator[None]:
    """Inside, transformers' own attention, written out: what every other one is checked against."""
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation(register_packed_attention())


def _named(inner: PreTrainedModel, directory: Path) -> str:
    return f"{directory}: {inner.config.model_type}"
