"""Experience: what one batch of trajectories becomes before the updates.

    trajectories --plan once--> RolloutPack each --judges--> JudgedBatch --credit--> Credited
                                                        Experience, one per pack <--'

The pack plan is made once per batch, and every forward on it uses the same rows, before and during the
updates. So the first ratio is exactly 1. Owns: that plan, these records, and the metrics of a batch. Does not
own: the forwards (roles), credit, the formulas (objectives).

Legend: B trajectories of a pack or of the batch, T response tokens (padded to the config's maximum), N
response tokens (concatenated). Rows of the batch are in pack order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from stages.config.correction import Correction
from stages.data.packing import PackedRow, plan_packs
from stages.objectives.correction import correction_weights
from stages.objectives.kl import k1, k3
from stages.objectives.masked import masked_stats
from stages.rl.trajectories import Trajectory
from stages.training.forwards import ResponsePack, pack_responses


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPack:
    """A few trajectories in one row."""

    trajectories: tuple[Trajectory, ...]
    packed: ResponsePack
    rollout_logprobs_BT: Tensor  # by the engine, at the sampling temperature
    truncated_B: Tensor  # bool: no end token


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What policy, reference and value model say of some trajectories, before any update. Where nobody reads
    a number it is None.
    """

    anchor_logprobs_BT: Tensor  # by the policy as it sampled
    entropies_BT: Tensor  # nats, of the policy
    reference_logprobs_BT: Tensor | None
    values_BT: Tensor | None
    final_values_B: Tensor | None  # values after the last tokens
    kl_B: Tensor | None  # nats per response, k1 summed


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement(Readings):
    """What all models say of a pack."""

    scores_B: Tensor | None  # by the reward model, normalised and clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedBatch(Readings):
    """A whole batch with what the models say of it. Its trajectories carry their scores, by source."""

    packs: tuple[RolloutPack, ...]

    @property
    def scores_B(self) -> Tensor:
        """What each response earned: its scores of all sources, added up."""
        totals = [reduce(add, _present(trajectory.scores)) for trajectory in self.trajectories]
        return torch.tensor(totals, dtype=torch.float32, device=self.anchor_logprobs_BT.device)

    @property
    def layout_BT(self) -> Tensor:
        """bool: response tokens that exist."""
        return torch.cat([pack.packed.mask_BT for pack in self.packs])

    @property
    def rollout_logprobs_BT(self) -> Tensor:
        """By the engine, at the sampling temperature."""
        return torch.cat([pack.rollout_logprobs_BT for pack in self.packs])

    @property
    def truncated_B(self) -> Tensor:
        """bool: no end token."""
        return torch.cat([pack.truncated_B for pack in self.packs])

    @property
    def trajectories(self) -> list[Trajectory]:
        """In pack order."""
        return [trajectory for pack in self.packs for trajectory in pack.trajectories]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credited:
    """What the tokens of a batch are worth. All 0 where the mask is False."""

    mask_BT: Tensor  # bool: tokens that are learned from; a rule may leave out whole responses
    advantages_BT: Tensor  # as the policy loss takes them
    returns_BT: Tensor  # what the value model learns: of advantages before whitening


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One pack, ready for the updates."""

    packed: ResponsePack  # its mask is the layout: response tokens that exist
    mask_BT: Tensor  # bool: tokens that are learned from
    rollout_logprobs_BT: Tensor  # by the engine, at the sampling temperature
    anchor_logprobs_BT: Tensor | None  # None: one update per batch, whose own log-probs are the anchor
    anchor_values_BT: Tensor | None
    reference_logprobs_BT: Tensor | None
    advantages_BT: Tensor
    returns_BT: Tensor
    kl_coef: float  # beta in force

    @property
    def row(self) -> PackedRow:
        """See `trainable.Pack`."""
        return self.packed.row

    @property
    def predicting_N(self) -> Tensor:
        """See `trainable.Pack`."""
        return self.packed.predicting_N

    @property
    def targets_N(self) -> Tensor:
        """See `trainable.Pack`."""
        return self.packed.targets_N


def _present(scores: Mapping[str, float | None]) -> list[float]:
    """Every source's score: a batch that reaches the trainer lacks none."""
    found = [score for score in scores.values() if score is not None]
    assert len(found) == len(scores) > 0, "a response without a score"
    return found


def pack_rollouts(
    trajectories: Sequence[Trajectory], *, micro_batch_size: int, max_length: int, device: torch.device
) -> list[RolloutPack]:
    """The pack plan of a batch, rows built: the only one its updates will use."""
    plan = plan_packs([trajectory.num_tokens for trajectory in trajectories], micro_batch_size)
    return [_packed([trajectories[index] for index in members], max_length, device) for members in plan.packs]


def experiences_of(
    batch: JudgedBatch, credited: Credited, *, kl_coef: float, keeps_anchor: bool
) -> list[Experience]:
    """The batch as it is learned from, by pack. `keeps_anchor`: the policy moves before its last update."""
    sizes = [len(pack.trajectories) for pack in batch.packs]
    columns = (
        credited.mask_BT,
        batch.anchor_logprobs_BT if keeps_anchor else None,
        batch.values_BT,
        batch.reference_logprobs_BT,
        credited.advantages_BT,
        credited.returns_BT,
    )
    shares = zip(
        *([None] * len(sizes) if column is None else column.split(sizes) for column in columns), strict=True
    )
    return [
        Experience(
            packed=pack.packed,
            mask_BT=mask_BT,
            rollout_logprobs_BT=pack.rollout_logprobs_BT,
            anchor_logprobs_BT=anchor_BT,
            anchor_values_BT=values_BT,
            reference_logprobs_BT=reference_BT,
            advantages_BT=advantages_BT,
            returns_BT=returns_BT,
            kl_coef=kl_coef,
        )
        for pack, (mask_BT, anchor_BT, values_BT, reference_BT, advantages_BT, returns_BT) in zip(
            batch.packs, shares, strict=True
        )
    ]


def engine_differences(batch: JudgedBatch) -> Tensor:
    """|log-prob of the engine - of the trainer| of every token of the batch, [N], in nats."""
    return (batch.anchor_logprobs_BT - batch.rollout_logprobs_BT)[batch.layout_BT].abs()


def batch_metrics(
    batch: JudgedBatch, credited: Credited, *, kl_coef: float, correction: Correction
) -> dict[str, float]:
    """What is seen of a batch before its updates."""
    layout_BT = batch.layout_BT
    differences_N = engine_differences(batch)
    found = {
        "rollout/score": float(batch.scores_B.mean()),
        "rollout/score_std": float(batch.scores_B.std(unbiased=False)),
        "rollout/length": float(layout_BT.sum(-1).float().mean()),
        "rollout/truncated": float(batch.truncated_B.float().mean()),
        "rollout/repeated": _repeated_share(
            [trajectory.turn.response_ids for trajectory in batch.trajectories]
        ),
        "rollout/entropy": float(masked_stats(values=batch.entropies_BT, mask=layout_BT).mean),
        "rollout/kl_coef": kl_coef,
        "rollout/engine_max_abs_diff": float(differences_N.max()),
        "rollout/engine_mean_abs_diff": float(differences_N.mean()),
    }
    if batch.values_BT is not None:
        found["ppo/explained_variance"] = _explained_variance(batch.values_BT, credited)
    if batch.kl_B is not None:
        found["rollout/kl"] = float(batch.kl_B.mean())
    return found | _correction_metrics(batch, correction)


def _correction_metrics(batch: JudgedBatch, correction: Correction) -> dict[str, float]:
    """How far the engine's distribution is from the trainer's over the tokens of the batch, and what the
    correction makes of it; whatever its type.
    """
    mask_BT, anchor_BT, rollout_BT = batch.layout_BT, batch.anchor_logprobs_BT, batch.rollout_logprobs_BT
    found = correction_weights(
        anchor_logprobs_BT=anchor_BT,
        rollout_logprobs_BT=rollout_BT,
        mask_BT=mask_BT,
        kind=correction.type,
        min_weight=correction.min_weight,
        max_weight=correction.max_weight,
    )
    ratios_N = found.ratios_BT[mask_BT]
    apart = {"policy_logprobs": rollout_BT[mask_BT], "reference_logprobs": anchor_BT[mask_BT]}
    return {
        "rollout/ratio_mean": float(ratios_N.mean()),
        "rollout/ratio_min": float(ratios_N.min()),
        "rollout/ratio_max": float(ratios_N.max()),
        "rollout/weight_mean": float(found.weights_BT[mask_BT].mean()),
        "rollout/weight_limited": float(found.limited_BT[mask_BT].float().mean()),
        "rollout/engine_kl_k1": float(k1(**apart).mean()),
        "rollout/engine_kl_k3": float(k3(**apart).mean()),
    }


def _explained_variance(values_BT: Tensor, credited: Credited) -> float:
    """1 - var(return - value) / var(return); 0 where all returns are the same."""
    spread = masked_stats(values=credited.returns_BT, mask=credited.mask_BT).std.square()
    errors_BT = credited.returns_BT - values_BT
    unexplained = masked_stats(values=errors_BT, mask=credited.mask_BT).std.square()
    return float(1 - unexplained / spread) if spread > 0 else 0.0


def _repeated_share(responses: Sequence[Sequence[int]], n: int = 4) -> float:
    """Mean over the responses of the share of n-grams that stood earlier in the same response; 0 for shorter
    ones.
    """
    shares = []
    for ids in responses:
        grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def _packed(trajectories: Sequence[Trajectory], max_length: int, device: torch.device) -> RolloutPack:
    turns = [trajectory.turn for trajectory in trajectories]
    packed = pack_responses(
        [turn.prompt_ids for turn in turns],
        [turn.response_ids for turn in turns],
        max_length=max_length,
        device=device,
    )
    logprobs_BT = torch.zeros(packed.mask_BT.shape)
    for row_T, turn in zip(logprobs_BT, turns, strict=True):
        row_T[: len(turn.logprobs)] = torch.tensor(turn.logprobs)
    return RolloutPack(
        trajectories=tuple(trajectories),
        packed=packed,
        rollout_logprobs_BT=logprobs_BT.to(device),
        truncated_B=torch.tensor([turn.finish_reason == "length" for turn in turns], device=device),
    )
