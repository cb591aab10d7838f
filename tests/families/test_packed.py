"""Each family packed, against each sequence alone in plain transformers: right, or refused when loaded.

Plain is `AutoModelForCausalLM.from_pretrained` in eval mode with eager attention. Ours is what the stages
use: its loader, and its forward over a packed row.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families.figures import record, why_refused
from families.table import FAMILIES
from tiny_tokenizer import PAD
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.data.packing import PackedRow, pack
from stages.errors import ModelError
from stages.training.forwards import sequence_scores
from stages.training.fsdp import Placed
from stages.training.model_rules import check_length, check_model
from stages.training.models import (
    CausalLM,
    check_context,
    full_state,
    load_causal_lm,
    reward_from_causal_lm,
    save_model,
)
from stages.training.randomness import recompute_activations

LENGTHS = (40, 7, 1, 12, 19)
"""The first is longer than every window, chunk and short rotary range of the table."""
OFTEN = {
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"),
    *("olmo2", "phi3", "opt", "gpt2", "cohere", "mixtral"),
}
"""What `make test` measures; `make test-all` measures all."""
NAMES = [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in FAMILIES]
GRADIENT_LIMIT = 1e-5  # of the gradient's norm


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 260, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_family_is_each_sequence_alone_or_refused(
    name: str, family_dir: Callable[[str], Path], sequences: list[list[int]]
) -> None:
    """Log-probs, their gradient, and the same with gradient checkpointing."""
    directory = family_dir(name)
    try:
        model = load_causal_lm(directory)
        check_context(model, max(LENGTHS))
    except ModelError as error:
        record(name, "packed", why_refused(directory, error, context_length=max(LENGTHS)))
        return
    check_model(directory, named=name, context_length=max(LENGTHS), scores=False)
    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    expected = torch.cat([plain_logprobs(plain, ids) for ids in sequences])
    expected_gradient = gradient(plain, expected)

    row = pack(sequences)
    found = packed_logprobs(model, row)
    record(name, "packed", largest_difference(found, expected))
    check_gradient(gradient(model.inner, found), expected_gradient)
    recompute_activations(model.inner)
    found = packed_logprobs(model, row)
    assert largest_difference(found, expected) <= 1e-4
    check_gradient(gradient(model.inner, found), expected_gradient)


@pytest.mark.parametrize("name", NAMES)
def test_packed_scores_of_a_reward_model_are_those_of_transformers_or_it_is_refused(
    name: str, family_dir: Callable[[str], Path], sequences: list[list[int]], tmp_path: Path
) -> None:
    directory = family_dir(name)
    torch.manual_seed(0)
    try:
        model = reward_from_causal_lm(directory, pad_token_id=PAD)
        check_length(model.inner.config, max(LENGTHS), named=name)
    except ModelError as error:
        record(name, "reward", why_refused(directory, error, context_length=max(LENGTHS), scores=True))
        return
    check_model(directory, named=name, context_length=max(LENGTHS), scores=True)
    save_model(model, tmp_path, full_state(model))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        alone = torch.cat([plain(torch.tensor([ids])).logits[:, 0] for ids in sequences])
        padded = plain(**padded_right(sequences)).logits[:, 0]
        found = sequence_scores(Placed(model), sequences, device=torch.device("cpu"))
    assert alone.std() > 0.1, "scores differ from sequence to sequence"
    record(name, "reward", max(largest_difference(found, alone), largest_difference(found, padded)))


def packed_logprobs(model: CausalLM, row: PackedRow) -> Tensor:
    """[N, V], as the stages run it."""
    return model(row.model_inputs(), torch.arange(row.num_tokens))[0].log_softmax(-1)


def plain_logprobs(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """[T, V] of one sequence."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def padded_right(sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    rows = [torch.tensor(ids) for ids in sequences]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def gradient(model: nn.Module, logprobs_NV: Tensor) -> Tensor:
    """Of the mean log-prob of some tokens, in all parameters; clears it."""
    generator = torch.Generator().manual_seed(4)
    targets_N1 = torch.randint(5, 260, (len(logprobs_NV), 1), generator=generator)
    logprobs_NV.gather(-1, targets_N1).mean().backward()
    flat = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]
    )
    model.zero_grad()
    return flat


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max())


def check_gradient(found: Tensor, expected: Tensor) -> None:
    distance = float((found - expected).norm() / expected.norm())
    assert distance <= GRADIENT_LIMIT, f"the gradient is off by {distance:.1g} of its norm"
