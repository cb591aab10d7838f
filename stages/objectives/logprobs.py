"""Log-probabilities of tokens, and where in a batch they are to be read.

    lengths --response_positions--> predicting_N --hidden[predicting_N]--> head --> logits_NV --> logprobs_N

One rule holds everywhere: `logits[t]` scores token t+1. So the token at response index t of a sequence that
starts at `start` is scored at `start + prompt_length - 1 + t`, and a value is read at that same position.

Owns: the float32 log-softmax, its chunking, entropies, the positions, ratios of probabilities. Does not own:
the forward pass, nor whether the temperature applies (the caller knows whether the engine's log-probs are
processed).

Legend: B sequences, S tokens of a padded row (prompt, response, padding), N response tokens (concatenated),
D hidden size, V vocabulary. Log-probs are in nats.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.objectives.masked import widened

CHUNK_TOKENS = 1024  # tokens whose float32 logits exist at once; a matter of memory, never of the result
MAX_LOG_RATIO = 20.0  # nats; e^20 = 4.9e8 and its square still fit float32, so a gradient norm stays finite


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsePositions:
    """Where the responses of B sequences are in one flat row; N = sum of the response lengths.

    Example: prompts of 2 and 1, responses of 2 and 1, packed `p p r r | p r`:
             predicting_N = (1, 2, 4), token_N = (2, 3, 5)
    """

    predicting_N: Tensor  # int64, positions whose logits score, and whose values precede, each response token
    token_N: Tensor  # int64, positions of the response tokens themselves


def packed_response_positions(
    *, prompt_lengths: Sequence[int], response_lengths: Sequence[int], device: torch.device | str
) -> ResponsePositions:
    """Positions in a row of S tokens that holds the B sequences one after the other (padding last).

    ValueError for lengths that do not pair up, a prompt without a token (nothing would score the first
    response token) or a negative length.
    """
    lengths = [p + r for p, r in zip(prompt_lengths, response_lengths, strict=True)]
    starts = list(accumulate(lengths, initial=0))[:-1]
    return _response_positions(starts, prompt_lengths, response_lengths, device)


def padded_response_positions(
    *,
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    row_length: int,
    padding_side: Literal["left", "right"],
    device: torch.device | str,
) -> ResponsePositions:
    """Positions in `x_BS.flatten(0, 1)`, each row one prompt and response, padded on one side to S.

    `row_length` is S. ValueError as in `packed_response_positions`, and for a sequence longer than S.
    """
    lengths = [p + r for p, r in zip(prompt_lengths, response_lengths, strict=True)]
    if max(lengths, default=0) > row_length:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a row of {row_length}")
    pads = [row_length - length if padding_side == "left" else 0 for length in lengths]
    starts = [row * row_length + pad for row, pad in enumerate(pads)]
    return _response_positions(starts, prompt_lengths, response_lengths, device)


def token_logprobs(
    *, logits: Tensor, targets: Tensor, temperature: float, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """log softmax(logits / temperature)[targets], row for row: the caller has aligned them.

    logits [..., V] of any float dtype, targets [...] int64; returns [...] in float32 (float64 stays). Chunks
    are recomputed in the backward pass, so only one chunk of float32 logits exists at a time; value and
    gradient are those of the whole. ValueError for mismatched shapes, a temperature <= 0 or a chunk < 1; a
    target outside 0..V-1 (an ignore index, say) is an error of torch.
    """
    _check_alignment(logits, targets, temperature)

    def score(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, ...]:
        return (_pick(_log_softmax(logits_NV, temperature), targets_N),)

    (logprobs_N,) = _in_chunks(score, logits.flatten(0, -2), targets.flatten(), chunk_tokens)
    return logprobs_N.view(targets.shape)


def token_entropies(*, logits: Tensor, temperature: float, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats: logits [..., V] -> [...] in float32 (float64 stays).

    Logits of -inf (excluded tokens) add nothing, in value and gradient. ValueError as in `token_logprobs`.
    """
    _check_alignment(logits, logits[..., 0], temperature)

    def score(logits_NV: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return (_entropies(_log_softmax(logits_NV, temperature)),)

    flat = logits.flatten(0, -2)
    (entropies_N,) = _in_chunks(score, flat, flat.new_zeros(flat.shape[0]), chunk_tokens)
    return entropies_N.view(logits.shape[:-1])


def next_tokens(input_ids_BS: Tensor) -> Tensor:
    """What each position of a padded or packed batch predicts, [B, S]: column t is the token at t + 1.

    The shift happens here and nowhere else. The last column predicts nothing and repeats the first token; in
    a packed row the column before a sequence's first token is a prediction across the boundary. Both are to
    be masked (`losses.target_mask`).
    """
    return input_ids_BS.roll(-1, dims=-1)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio) up to MAX_LOG_RATIO, its tangent beyond: no overflow, convex, gradient never lost.

    A plain clamp would zero the gradient exactly where a policy has run away. Exactly 1 at 0. Any shape.
    """
    core = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    tangent = math.exp(MAX_LOG_RATIO) * (1 + log_ratio - MAX_LOG_RATIO)
    return torch.where(log_ratio <= MAX_LOG_RATIO, core, tangent)


def _response_positions(
    starts: Sequence[int],
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    device: torch.device | str,
) -> ResponsePositions:
    if min(prompt_lengths, default=1) < 1 or min(response_lengths, default=0) < 0:
        raise ValueError("every prompt needs at least one token and no response a negative number of them")
    tokens = [
        start + prompt + t
        for start, prompt, response in zip(starts, prompt_lengths, response_lengths, strict=True)
        for t in range(response)
    ]
    token_N = torch.tensor(tokens, dtype=torch.int64, device=device)
    return ResponsePositions(predicting_N=token_N - 1, token_N=token_N)


def _check_alignment(inputs: Tensor, targets: Tensor, temperature: float) -> None:
    if inputs.shape[:-1] != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)} do not pair with the rows of {tuple(inputs.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; greedy log-probs are those at 1")


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(widened(logits_NV) / temperature, dim=-1)


def _pick(log_softmax_NV: Tensor, targets_N: Tensor) -> Tensor:
    return log_softmax_NV.gather(-1, targets_N[:, None]).squeeze(-1)


def _entropies(log_softmax_NV: Tensor) -> Tensor:
    finite = log_softmax_NV.masked_fill(log_softmax_NV == -torch.inf, 0)  # p log p -> 0 as p -> 0
    return -(log_softmax_NV.exp() * finite).sum(-1)


def _in_chunks(
    score: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    inputs_N: Tensor,
    targets_N: Tensor,
    chunk_tokens: int,
) -> tuple[Tensor, ...]:
    """`score` over chunks of rows, each recomputed in the backward pass; outputs concatenated.

    `split`, not slices: its backward concatenates once, where each slice's would allocate the whole gradient.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
    chunks = zip(inputs_N.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
    if torch.is_grad_enabled():
        outputs = [
            checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
        ]
    else:
        outputs = [score(*chunk) for chunk in chunks]
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))
