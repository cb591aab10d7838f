"""The four models of PPO and what they say of a batch before it is trained on.

    policy (trained), reference (frozen sft), reward model (frozen), value model (trained, from the reward)

Owns: which directory each comes from, their precision, and the forwards of one pack.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.config.ppo import PPOConfig
from stages.data.experience import Judgement, RolloutPack
from stages.objectives.advantages import process_scores
from stages.objectives.kl import sequence_log_ratio
from stages.training import ranks
from stages.training.distributed import Worker
from stages.training.forwards import sequence_scores, with_end
from stages.training.fsdp import Placed, Trained, frozen, trained
from stages.training.models import (
    ScoreNormaliser,
    load_causal_lm,
    load_reward_model,
    value_from_reward_model,
)
from stages.training.trainable import Reads


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOModels:
    """All models of one PPO worker, on its device."""

    policy: Trained
    reference: Placed | None  # absent when nothing weighs the KL: no forward for a number nobody uses
    reward_model: Placed
    value_model: Trained
    normaliser: ScoreNormaliser


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSteps:
    """How many optimizer steps a run takes: what learning rates are scheduled over."""

    packs_per_step: int
    per_epoch: int
    value_only: int  # before the policy's first
    total: int

    @classmethod
    def of(cls, config: PPOConfig) -> "UpdateSteps":
        packs_per_step = config.batch_size // config.pack_size
        num_packs = math.ceil(config.responses_per_step / config.pack_size)
        per_epoch = math.ceil(num_packs / packs_per_step)
        per_iteration = config.num_epochs * per_epoch
        return cls(
            packs_per_step=packs_per_step,
            per_epoch=per_epoch,
            value_only=config.value_warmup_steps * per_iteration,
            total=config.max_steps * per_iteration,
        )


def load_ppo_models(config: PPOConfig, inputs: Mapping[str, Path], worker: Worker) -> PPOModels:
    """Policy and reference from `inputs["sft"]`, reward and value model from `inputs["reward"]`. Raises
    ModelError.
    """
    # One after the other: a whole model lies in host memory until it is placed.
    steps = UpdateSteps.of(config)
    policy = trained(
        load_causal_lm(inputs["sft"]), worker, config, lr=config.lr, max_steps=steps.total - steps.value_only
    )
    value_model = trained(
        value_from_reward_model(inputs["reward"]), worker, config, lr=config.value_lr, max_steps=steps.total
    )
    reference = None
    if config.reads_reference:
        reference = frozen(load_causal_lm(inputs["sft"]), worker, precision=config.precision)
    return PPOModels(
        policy=policy,
        reference=reference,
        reward_model=frozen(load_reward_model(inputs["reward"]), worker, precision=config.precision),
        value_model=value_model,
        normaliser=ScoreNormaliser.load(inputs["reward"]),
    )


def judge_all(
    models: PPOModels,
    packs: Sequence[RolloutPack],
    config: PPOConfig,
    *,
    end_of_turn_id: int,
    stop_token_ids: Collection[int],
) -> list[Judgement]:
    """`judge` of every pack. The ranks share the packs out between them; each gets all judgements: they are a
    few numbers per token, and with the whole batch on every rank advantages are whitened over it as one.
    """
    judged = [
        (judge(models, pack, config, end_of_turn_id=end_of_turn_id, stop_token_ids=stop_token_ids), is_mine)
        for pack, is_mine in ranks.shared_out(packs)
    ]
    if ranks.world_size() == 1:
        return [judgement for judgement, _ in judged]
    return _gathered(judged, [len(pack.rollouts) for pack in packs])


def _gathered(judged: Sequence[tuple[Judgement, bool]], sizes: Sequence[int]) -> list[Judgement]:
    """The judgements of all packs (of `sizes` responses) from each rank's own, field by field."""
    columns: dict[str, Any] = {}
    for entry in fields(Judgement):
        like: Tensor | None = getattr(judged[0][0], entry.name)
        if like is None:
            columns[entry.name] = [None] * len(sizes)
            continue
        parts = [like.new_zeros((size, *like.shape[1:])) for size in sizes]
        for turn, (judgement, is_mine) in enumerate(judged):
            if is_mine:
                parts[turn * ranks.world_size() + ranks.rank()] = getattr(judgement, entry.name)
        columns[entry.name] = ranks.sum_over_ranks(torch.cat(parts)).split(list(sizes))
    return [
        Judgement(**{name: column[index] for name, column in columns.items()}) for index in range(len(sizes))
    ]


@torch.no_grad()
def judge(
    models: PPOModels,
    pack: RolloutPack,
    config: PPOConfig,
    *,
    end_of_turn_id: int,
    stop_token_ids: Collection[int],
) -> Judgement:
    """Anchor and reference log-probs, values and normalised scores of one pack."""
    packed = pack.packed
    device = packed.mask_BT.device
    logprobs = Reads(logprobs=True, temperature=config.temperature)
    policy = models.policy.outputs(packed, logprobs | Reads(entropies=True, temperature=config.temperature))
    anchor_BT = packed.padded(policy.logprobs_N)
    reference_BT = kl_B = None
    if models.reference is not None:
        reference_BT = packed.padded(models.reference.outputs(packed, logprobs).logprobs_N)
        kl_B = sequence_log_ratio(
            policy_logprobs_BT=anchor_BT, reference_logprobs_BT=reference_BT, mask_BT=packed.mask_BT
        )
    bootstraps = config.truncation == "bootstrap"
    values = models.value_model.outputs(packed, Reads(values=True, final_values=bootstraps))
    sequences = [
        (*rollout.prompt_ids, *with_end(rollout.response_ids, end_of_turn_id, stop_token_ids))
        for rollout in pack.rollouts
    ]
    raw_scores_B = sequence_scores(models.reward_model, sequences, device=device)
    return Judgement(
        anchor_logprobs_BT=anchor_BT,
        entropies_BT=packed.padded(policy.entropies_N),
        reference_logprobs_BT=reference_BT,
        values_BT=packed.padded(values.values_N),
        final_values_B=values.final_values_B,
        scores_B=process_scores(
            raw_scores_B=raw_scores_B,
            mean=models.normaliser.mean,
            std=models.normaliser.std,
            clip=config.score_clip,
        ),
        kl_B=kl_B,
    )
