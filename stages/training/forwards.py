"""Forwards over packs: what every recipe asks of a model, for sequences of a prompt and a response.

    sequences --pack--> one row --CausalLM | TokenScorer--> log-probs, values [B, T] | scores [B]

Owns: going from ragged responses to one packed row and back to padded [B, T]. The model, the mask and the
losses are elsewhere. Legend: B sequences, T response tokens (padded), N response tokens (concatenated).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rollout.api import LogprobsOf
from stages.data.packing import PackedRow, pack, plan_packs, split
from stages.objectives.logprobs import (
    ResponsePositions,
    packed_response_positions,
    token_entropies,
    token_logprobs,
)
from stages.objectives.masked import length_mask, pad_ragged
from stages.training import ranks

TokenIds = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsePack:
    """B prompts with their responses in one packed row: built once, used by every forward on them."""

    row: PackedRow
    positions: ResponsePositions
    targets_N: Tensor  # int64, the response tokens
    mask_BT: Tensor  # bool, True on response tokens


def pack_responses(
    prompts: Sequence[TokenIds], responses: Sequence[TokenIds], *, max_length: int, device: torch.device
) -> ResponsePack:
    """One row of `prompts[b] + responses[b]`; `max_length` is T, the width of what is padded."""
    row = pack([[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]).to(device)
    lengths = [len(response) for response in responses]
    positions = packed_response_positions(
        prompt_lengths=[len(prompt) for prompt in prompts], response_lengths=lengths, device=device
    )
    return ResponsePack(
        row=row,
        positions=positions,
        targets_N=row.input_ids_1N[0, positions.token_N],
        mask_BT=length_mask(lengths=lengths, max_length=max_length, device=device),
    )


def response_logprobs(model: nn.Module, packed: ResponsePack, *, temperature: float) -> Tensor:
    """Log-probs [B, T] of the response tokens, float32, 0 in the padding."""
    logits_NV = model(packed.row.model_inputs(), packed.positions.predicting_N)[0]
    logprobs_N = token_logprobs(logits=logits_NV, targets=packed.targets_N, temperature=temperature)
    return pad_ragged(values_N=logprobs_N, mask_BT=packed.mask_BT)


def response_logprobs_and_entropies(
    model: nn.Module, packed: ResponsePack, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """`response_logprobs`, and the entropies [B, T] of the distributions the tokens were drawn from, in
    nats.
    """
    logits_NV = model(packed.row.model_inputs(), packed.positions.predicting_N)[0]
    logprobs_N = token_logprobs(logits=logits_NV, targets=packed.targets_N, temperature=temperature)
    entropies_N = token_entropies(logits=logits_NV, temperature=temperature)
    return (
        pad_ragged(values_N=logprobs_N, mask_BT=packed.mask_BT),
        pad_ragged(values_N=entropies_N, mask_BT=packed.mask_BT),
    )


def response_values(model: nn.Module, packed: ResponsePack) -> Tensor:
    """Values [B, T], each read where its token is predicted (prompt_length - 1 + t); 0 in the padding."""
    values_N = model(packed.row.model_inputs(), packed.positions.predicting_N)
    return pad_ragged(values_N=values_N, mask_BT=packed.mask_BT)


def final_values(model: nn.Module, packed: ResponsePack) -> Tensor:
    """Values [B] of the state after each last token: what truncated responses bootstrap from."""
    return model(packed.row.model_inputs(), packed.positions.final_B)


def with_end(response: TokenIds, end_of_turn_id: int, stop_token_ids: Collection[int]) -> tuple[int, ...]:
    """A response as a reward model reads it: ended by the one end-of-turn token it was trained with, also
    where the response was cut off or ended with another stop token.
    """
    ids = tuple(response)
    return (*(ids[:-1] if ids[-1] in stop_token_ids else ids), end_of_turn_id)


def sequence_scores(model: nn.Module, sequences: Sequence[TokenIds], *, device: torch.device) -> Tensor:
    """Raw reward-model scores [B], each read at its sequence's last token."""
    row = pack(sequences).to(device)
    return model(row.model_inputs(), row.last_tokens())


@torch.no_grad()
def scores_in_packs(
    model: nn.Module, sequences: Sequence[TokenIds], *, micro_batch_size: int, device: torch.device
) -> Tensor:
    """`sequence_scores` of any number of sequences, `micro_batch_size` to a row, in their order; on the CPU.

    The ranks share the rows out between them; each gets all scores.
    """
    scores_B = torch.zeros(len(sequences))
    plan = plan_packs([len(sequence) for sequence in sequences], micro_batch_size)
    for members, is_mine in ranks.shared_out(plan.packs):
        scores = sequence_scores(model, [sequences[index] for index in members], device=device)
        if is_mine:
            scores_B[torch.tensor(members)] = scores.cpu()
    return ranks.sum_over_ranks(scores_B)


@torch.no_grad()
def logprobs_in_packs(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    *,
    temperature: float,
    micro_batch_size: int,
    device: torch.device,
) -> list[Tensor]:
    """Log-probs of each response's tokens, ragged, in the order of `responses`; on the CPU.

    The ranks share the rows out between them; each gets all log-probs.
    """
    all_N = torch.zeros(sum(len(response) for response in responses))
    result = split(all_N, [len(response) for response in responses])
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    for members, is_mine in ranks.shared_out(plan_packs(lengths, micro_batch_size).packs):
        chosen = [responses[index] for index in members]
        packed = pack_responses(
            [prompts[index] for index in members],
            chosen,
            max_length=max(len(response) for response in chosen),
            device=device,
        )
        logprobs_BT = response_logprobs(model, packed, temperature=temperature).cpu()
        if is_mine:
            for index, logprobs_T in zip(members, logprobs_BT, strict=True):
                result[index].copy_(logprobs_T[: len(result[index])])
    return split(ranks.sum_over_ranks(all_N), [len(response) for response in responses])


def logprobs_by(model: nn.Module, *, micro_batch_size: int, device: torch.device) -> LogprobsOf:
    """`logprobs_in_packs` of one model, as a parity gate asks for it."""

    def logprobs_of(
        prompts: Sequence[tuple[int, ...]], responses: Sequence[tuple[int, ...]], temperature: float
    ) -> list[list[float]]:
        scored = logprobs_in_packs(
            model,
            prompts,
            responses,
            temperature=temperature,
            micro_batch_size=micro_batch_size,
            device=device,
        )
        return [logprobs_T.tolist() for logprobs_T in scored]

    return logprobs_of
