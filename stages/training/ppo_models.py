"""The four models of PPO and what they say of a batch before it is trained on.

    policy (trained), reference (frozen sft), reward model (frozen), value model (trained, from the reward)

Owns: which directory each comes from, their precision, and the forwards of one pack.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.config import PPOConfig
from stages.data.experience import Judgement, RolloutPack
from stages.objectives.advantages import process_scores
from stages.objectives.kl import sequence_log_ratio
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
    policy = load_causal_lm(inputs["sft"])
    value_model = value_from_reward_model(inputs["reward"])
    for trained in (policy, value_model):
        if config.gradient_checkpointing:
            trained.inner.gradient_checkpointing_enable()
        trained.train()
        place(trained, worker, precision=config.precision, trained=True)
    reference = load_causal_lm(inputs["sft"]) if config.reads_reference else None
    reward_model = load_reward_model(inputs["reward"])
    for frozen in (reference, reward_model):
        if frozen is not None:
            freeze(frozen)
            place(frozen, worker, precision=config.precision, trained=False)
    return PPOModels(
        policy=policy,
        reference=reference,
        reward_model=reward_model,
        value_model=value_model,
        normaliser=ScoreNormaliser.load(inputs["reward"]),
    )


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
