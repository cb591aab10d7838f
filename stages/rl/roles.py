"""The models of an algorithm, and what they say of a batch before it is trained on.

    policy, reference <- policy_dir    reward model, value model (the normaliser folded in) <- reward_dir
    packs --every model's forward--> JudgedBatch

Owns: which models are loaded, which directory each comes from, what is asked of them, who computes which
pack. Does not own: which roles there are (algorithms), the packs (experience). A reward model reads packs of
its own: prompt and response as it was trained to read them. Every forward is a collective.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from stages.config.ppo import PPOConfig, Role
from stages.data.chat.tokenizer import ChatTokenizer
from stages.objectives.advantages import process_scores
from stages.objectives.kl import sequence_log_ratio
from stages.rl.algorithms import Algorithm
from stages.rl.experience import JudgedBatch, Judgement, RolloutPack, pack_rollouts
from stages.rl.source import Scores
from stages.rl.trajectories import Batch, Trajectory
from stages.rl.update import UpdateSteps, first_active
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
from stages.training.trainable import Reads, Trainable

REWARD_MODEL: Role = "reward_model"
"""The role; the source of its scores is called like it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models of one worker, on its device. A role that the algorithm does not have is None."""

    policy: Trained
    value: Trained | None
    reference: Placed | None
    reward_model: Placed | None
    normaliser: ScoreNormaliser | None  # of the reward model's scores

    @property
    def trained(self) -> dict[Role, Trainable]:
        """By the names that a checkpoint gives them."""
        both: dict[Role, Trainable | None] = {"policy": self.policy, "value": self.value}
        return {role: model for role, model in both.items() if model is not None}


def load_models(
    algorithm: Algorithm, config: PPOConfig, worker: Worker, *, policy_dir: Path, reward_dir: Path | None
) -> Models:
    """Policy and reference from `policy_dir`, reward and value model from `reward_dir`, which may be None
    where the algorithm has neither. Raises ModelError.
    """
    # One after the other: a whole model lies in host memory until it is placed.
    steps, roles, precision = UpdateSteps.of(config), algorithm.roles, config.precision

    def learning(role: Role, model: Any, lr: float) -> Trained:
        total = steps.total(active_from=first_active(algorithm.terms, role))
        return trained(model, worker, config, lr=lr, max_steps=total)

    policy = learning("policy", load_causal_lm(policy_dir), config.lr)
    value = reference = reward_model = normaliser = None
    if "value" in roles:
        assert reward_dir is not None, "a value model begins as the reward model"
        value = learning("value", value_from_reward_model(reward_dir), config.value_lr)
    if "reference" in roles:
        reference = frozen(load_causal_lm(policy_dir), worker, precision=precision)
    if "reward_model" in roles:
        assert reward_dir is not None, "a reward model has a directory"
        reward_model = frozen(load_reward_model(reward_dir), worker, precision=precision)
        normaliser = ScoreNormaliser.load(reward_dir)
    return Models(
        policy=policy, value=value, reference=reference, reward_model=reward_model, normaliser=normaliser
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judges:
    """What is asked of the models about a batch, before any update."""

    models: Models
    config: PPOConfig
    value_reads: Reads  # of the algorithm's credit
    end_of_turn_id: int  # as the reward model was trained to read it behind a response
    stop_token_ids: Collection[int]
    device: torch.device

    @classmethod
    def of(
        cls,
        models: Models,
        algorithm: Algorithm,
        config: PPOConfig,
        *,
        chat: ChatTokenizer,
        device: torch.device,
    ) -> Self:
        """As the algorithm reads them, for responses in the template of `chat`."""
        return cls(
            models=models,
            config=config,
            value_reads=algorithm.credit.reads,
            end_of_turn_id=chat.end_of_turn_id,
            stop_token_ids=chat.stop_token_ids,
            device=device,
        )

    def judge(self, trajectories: Sequence[Trajectory]) -> JudgedBatch:
        """Of a batch, packed once."""
        config = self.config
        packs = pack_rollouts(
            trajectories,
            micro_batch_size=config.pack_size,
            max_length=config.max_response_tokens,
            device=self.device,
        )
        return self.judge_packs(packs)

    def judge_packs(self, packs: Sequence[RolloutPack]) -> JudgedBatch:
        """What the models say of all packs. The ranks share the packs out between them, and each gets all
        numbers: they are a few per token, and credit needs the whole batch.
        """
        said = [(self.judge_pack(pack), is_mine) for pack, is_mine in ranks.shared_out(packs)]
        columns = _whole(said, [len(pack.trajectories) for pack in packs])
        scores_B = columns.pop("scores_B")
        scored = packs if scores_B is None else with_scores(packs, REWARD_MODEL, scores_B.tolist())
        return JudgedBatch(packs=tuple(scored), **columns)

    def judge_pack(self, pack: RolloutPack) -> Judgement:
        """Anchor and reference log-probs, values and normalised scores of one pack."""
        models, packed, temperature = self.models, pack.packed, self.config.temperature
        logprobs = Reads(logprobs=True, temperature=temperature)
        policy = models.policy.outputs(packed, logprobs | Reads(entropies=True, temperature=temperature))
        anchor_BT = packed.padded(policy.logprobs_N)
        reference_BT = kl_B = values_BT = final_values_B = None
        if models.reference is not None:
            reference_BT = packed.padded(models.reference.outputs(packed, logprobs).logprobs_N)
            kl_B = sequence_log_ratio(
                policy_logprobs_BT=anchor_BT, reference_logprobs_BT=reference_BT, mask_BT=packed.mask_BT
            )
        if models.value is not None:
            values = models.value.outputs(packed, self.value_reads)
            values_BT, final_values_B = packed.padded(values.values_N), values.final_values_B
        return Judgement(
            anchor_logprobs_BT=anchor_BT,
            entropies_BT=packed.padded(policy.entropies_N),
            reference_logprobs_BT=reference_BT,
            values_BT=values_BT,
            final_values_B=final_values_B,
            scores_B=self._scores(pack),
            kl_B=kl_B,
        )

    def _scores(self, pack: RolloutPack) -> Tensor | None:
        """Of the reward model: normalised, then clipped."""
        if self.models.reward_model is None:
            return None
        turns = [trajectory.turn for trajectory in pack.trajectories]
        sequences = [
            (*turn.prompt_ids, *with_end(turn.response_ids, self.end_of_turn_id, self.stop_token_ids))
            for turn in turns
        ]
        normaliser, device = self.models.normaliser, pack.packed.mask_BT.device
        assert normaliser is not None, "it is loaded with the reward model"
        return process_scores(
            raw_scores_B=sequence_scores(self.models.reward_model, sequences, device=device),
            mean=normaliser.mean,
            std=normaliser.std,
            clip=self.config.score_clip,
        )


def with_scores(packs: Sequence[RolloutPack], source: str, scores: Sequence[float]) -> list[RolloutPack]:
    """The packs with one more score for each trajectory, in pack order. A score that a trajectory brings out
    of the journal stays, because a judge may not say the same twice.
    """
    ids = [trajectory.id for pack in packs for trajectory in pack.trajectories]
    by_id = dict(zip(ids, scores, strict=True))
    return [
        replace(
            pack,
            trajectories=tuple(
                replace(one, scores={source: by_id[one.id], **one.scores}) for one in pack.trajectories
            ),
        )
        for pack in packs
    ]


def scores_to_commit(batch: JudgedBatch, drawn: Batch) -> Scores:
    """The scores by source, in the order in which the batch was drawn."""
    by_id = {trajectory.id: trajectory.scores for trajectory in batch.trajectories}
    rows = [by_id[trajectory.id] for trajectory in drawn.trajectories]
    return {source: [row[source] for row in rows] for source in rows[0]}


def _whole(said: Sequence[tuple[Judgement, bool]], sizes: Sequence[int]) -> dict[str, Any]:
    """The columns of all packs (of `sizes` trajectories) from each rank's own. A collective."""
    columns: dict[str, Any] = {}
    for entry in fields(Judgement):
        like: Tensor | None = getattr(said[0][0], entry.name)
        if like is None:
            columns[entry.name] = None
            continue
        parts = [like.new_zeros((size, *like.shape[1:])) for size in sizes]
        for turn, (judgement, is_mine) in enumerate(said):
            if is_mine:
                parts[turn * ranks.world_size() + ranks.rank()] = getattr(judgement, entry.name)
        columns[entry.name] = ranks.sum_over_ranks(torch.cat(parts))
    return columns
