"""The four models of PPO and what they say of a batch before it is trained on.

    policy (trained), reference (frozen sft), reward model (frozen), value model (trained, from the reward)

Owns: which directory each comes from, their precision, and the forwards of one pack.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stages.config.ppo import PPOConfig
from stages.data.experience import Judgement, RolloutPack
from stages.objectives.advantages import process_scores
from stages.objectives.kl import sequence_log_ratio
from stages.training import ranks
from stages.training.distributed import Worker, place
from stages.training.forwards import (
    final_values,
    response_logprobs,
    response_logprobs_and_entropies,
    response_values,
    sequence_scores,
    with_end,
)
from stages.training.models import (
    CausalLM,
    ScoreNormaliser,
    TokenScorer,
    freeze,
    load_causal_lm,
    load_reward_model,
    value_from_reward_model,
)
from stages.training.randomness import recompute_activations

Model = TypeVar("Model", CausalLM, TokenScorer)


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOModels:
    """All models of one PPO worker, on its device."""

    policy: CausalLM
    reference: CausalLM | None  # absent when nothing weighs the KL: no forward for a number nobody uses
    reward_model: TokenScorer
    value_model: TokenScorer
    normaliser: ScoreNormaliser


def load_ppo_models(config: PPOConfig, inputs: Mapping[str, Path], worker: Worker) -> PPOModels:
    """Policy and reference from `inputs["sft"]`, reward and value model from `inputs["reward"]`. Raises
    ModelError.
    """
    # One after the other: a whole model lies in host memory until it is placed.
    policy = _trained(load_causal_lm(inputs["sft"]), config, worker)
    value_model = _trained(value_from_reward_model(inputs["reward"]), config, worker)
    reference = _frozen(load_causal_lm(inputs["sft"]), config, worker) if config.reads_reference else None
    reward_model = _frozen(load_reward_model(inputs["reward"]), config, worker)
    return PPOModels(
        policy=policy,
        reference=reference,
        reward_model=reward_model,
        value_model=value_model,
        normaliser=ScoreNormaliser.load(inputs["reward"]),
    )


def _trained(model: Model, config: PPOConfig, worker: Worker) -> Model:
    if config.gradient_checkpointing:
        recompute_activations(model.inner)
    place(model, worker, precision=config.precision, trained=True)
    return model


def _frozen(model: Model, config: PPOConfig, worker: Worker) -> Model:
    place(freeze(model), worker, precision=config.precision, trained=False)
    return model


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
    anchor_BT, entropies_BT = response_logprobs_and_entropies(
        models.policy, packed, temperature=config.temperature
    )
    reference_BT = kl_B = None
    if models.reference is not None:
        reference_BT = response_logprobs(models.reference, packed, temperature=config.temperature)
        kl_B = sequence_log_ratio(
            policy_logprobs_BT=anchor_BT, reference_logprobs_BT=reference_BT, mask_BT=packed.mask_BT
        )
    sequences = [
        (*rollout.prompt_ids, *with_end(rollout.response_ids, end_of_turn_id, stop_token_ids))
        for rollout in pack.rollouts
    ]
    raw_scores_B = sequence_scores(models.reward_model, sequences, device=device)
    return Judgement(
        anchor_logprobs_BT=anchor_BT,
        entropies_BT=entropies_BT,
        reference_logprobs_BT=reference_BT,
        values_BT=response_values(models.value_model, packed),
        final_values_B=final_values(models.value_model, packed) if config.truncation == "bootstrap" else None,
        scores_B=process_scores(
            raw_scores_B=raw_scores_B,
            mean=models.normaliser.mean,
            std=models.normaliser.std,
            clip=config.score_clip,
        ),
        kl_B=kl_B,
    )
