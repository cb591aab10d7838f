"""Packs, and what is asked of a judge over many of them: log-probs of responses, scores of sequences.

    sequences --pack--> WholeSequences | ResponsePack --Judge--> log-probs, values [N] --pad--> [B, T]

Owns: going from ragged responses to one packed row and back to padded [B, T], and sharing rows out between
the ranks. The model, the mask and the losses are elsewhere. Legend: B sequences, T response tokens (padded),
N response tokens (concatenated).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.api import LogprobsOf
from stages.data.packing import PackedRow, pack, plan_packs, split
from stages.objectives.logprobs import ResponsePositions, packed_response_positions
from stages.objectives.masked import length_mask, pad_ragged
from stages.training import ranks
from stages.training.trainable import Judge, Reads

TokenIds = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeSequences:
    """B sequences in one packed row, of which only the ends are asked: scores."""

    row: PackedRow

    @property
    def predicting_N(self) -> Tensor:
        """Empty: no position is scored."""
        return self.row.input_ids_1N[0, :0]

    @property
    def targets_N(self) -> Tensor:
        """Empty: no token is scored."""
        return self.row.input_ids_1N[0, :0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsePack:
    """B prompts with their responses in one packed row: built once, used by every forward on them."""

    row: PackedRow
    positions: ResponsePositions
    targets_N: Tensor  # int64, the response tokens
    mask_BT: Tensor  # bool, True on response tokens

    @property
    def predicting_N(self) -> Tensor:
        """int64: prompt_length - 1 + t of each sequence, where its response token t is predicted."""
        return self.positions.predicting_N

    def padded(self, values_N: Tensor | None) -> Tensor:
        """What was read at the predicting positions as [B, T], 0 in the padding; differentiable."""
        assert values_N is not None, "it was not read"
        return pad_ragged(values_N=values_N, mask_BT=self.mask_BT)


def pack_responses(
    prompts: Sequence[TokenIds], responses: Sequence[TokenIds], *, max_length: int, device: torch.device
) -> ResponsePack:
    """Packs `prompts[b] + responses[b]` into one row; `max_length` is T, the width of padded tensors."""
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


def with_end(response: TokenIds, end_of_turn_id: int, stop_token_ids: Collection[int]) -> tuple[int, ...]:
    """A response as a reward model reads it. It ends with the end-of-turn token of the reward model's
    training, also where the response was cut off or ended with another stop token.
    """
    ids = tuple(response)
    return (*(ids[:-1] if ids[-1] in stop_token_ids else ids), end_of_turn_id)


def sequence_scores(judge: Judge, sequences: Sequence[TokenIds], *, device: torch.device) -> Tensor:
    """Raw scores [B] of a reward model, each read at its sequence's last token; no gradient."""
    scores_B = judge.outputs(WholeSequences(row=pack(sequences).to(device)), Reads(scores=True)).scores_B
    assert scores_B is not None
    return scores_B


def scores_in_packs(
    judge: Judge, sequences: Sequence[TokenIds], *, micro_batch_size: int, device: torch.device
) -> Tensor:
    """`sequence_scores` of any number of sequences in their order, on the CPU; `micro_batch_size` to a row.

    The ranks share the rows out between them; each gets all scores.
    """
    scores_B = torch.zeros(len(sequences))
    plan = plan_packs([len(sequence) for sequence in sequences], micro_batch_size)
    for members, is_mine in ranks.shared_out(plan.packs):
        scores = sequence_scores(judge, [sequences[index] for index in members], device=device)
        if is_mine:
            scores_B[torch.tensor(members)] = scores.cpu()
    return ranks.sum_over_ranks(scores_B)


def logprobs_in_packs(
    judge: Judge,
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    *,
    temperature: float,
    micro_batch_size: int,
    device: torch.device,
) -> list[Tensor]:
    """Log-probs of each response's tokens on the CPU, ragged, in the order of `responses`.

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
        logprobs_N = judge.outputs(packed, Reads(logprobs=True, temperature=temperature)).logprobs_N
        assert logprobs_N is not None
        if is_mine:
            parts = split(logprobs_N.cpu(), [len(response) for response in chosen])
            for index, logprobs_T in zip(members, parts, strict=True):
                result[index].copy_(logprobs_T)
    return split(ranks.sum_over_ranks(all_N), [len(response) for response in responses])


def logprobs_by(judge: Judge, *, micro_batch_size: int, device: torch.device) -> LogprobsOf:
    """`logprobs_in_packs` of one model, as a parity gate asks for it."""

    def logprobs_of(
        prompts: Sequence[tuple[int, ...]], responses: Sequence[tuple[int, ...]], temperature: float
    ) -> list[list[float]]:
        scored = logprobs_in_packs(
            judge,
            prompts,
            responses,
            temperature=temperature,
            micro_batch_size=micro_batch_size,
            device=device,
        )
        return [logprobs_T.tolist() for logprobs_T in scored]

    return logprobs_of
