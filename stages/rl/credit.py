"""Credit: from the scores of a batch to the advantages and returns of its tokens.

    scores, values, log-probs of the whole batch --rule for missing ends--> token rewards --GAE--> returns
                                                                   advantages --whitened once--> the losses

It sees the whole batch at once, rows in pack order, because a group may be spread over packs and whitening
comes last. Owns: that order. Does not own: the formulas (objectives), what the models said (roles).
Legend: B trajectories of the batch, T response tokens (padded).
"""

from dataclasses import dataclass
from typing import Protocol

from stages.config.ppo import PPOConfig
from stages.objectives.advantages import end_responses, gae, token_rewards
from stages.objectives.masked import masked_whiten
from stages.rl.experience import Credited, JudgedBatch
from stages.training.trainable import Reads


class Credit(Protocol):
    """How a batch's scores become advantages."""

    @property
    def reads(self) -> Reads:
        """What it needs the value model to say."""

    def __call__(self, batch: JudgedBatch, *, kl_coef: float) -> Credited:
        """Of the whole batch, rows in pack order. `kl_coef`: beta in force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneralisedAdvantages:
    """GAE over token rewards: the score on the last token, less beta k1 on every token where the KL is in the
    reward (Schulman et al. 2016, arXiv 1506.02438).
    """

    config: PPOConfig

    @property
    def reads(self) -> Reads:
        """See `Credit`: what truncated responses bootstrap from only where they do."""
        return Reads(values=True, final_values=self.config.truncation == "bootstrap")

    def __call__(self, batch: JudgedBatch, *, kl_coef: float) -> Credited:
        """See `Credit`. Order: the rule for missing ends, KL penalty, GAE, returns, whitening."""
        config = self.config
        ends = end_responses(
            scores_B=batch.scores_B,
            mask_BT=batch.layout_BT,
            truncated_B=batch.truncated_B,
            missing_eos=config.truncation,
            penalty=config.missing_eos_penalty if config.truncation == "penalty" else None,
            last_values_B=batch.final_values_B,
        )
        rewards_BT = token_rewards(
            scores_B=ends.scores_B,
            anchor_logprobs_BT=batch.anchor_logprobs_BT,
            reference_logprobs_BT=batch.reference_logprobs_BT,
            mask_BT=ends.mask_BT,
            kl_coef=kl_coef if config.kl_placement == "reward" else 0.0,
        )
        assert batch.values_BT is not None, "GAE reads a value model"
        raw = gae(
            rewards_BT=rewards_BT,
            values_BT=batch.values_BT,
            mask_BT=ends.mask_BT,
            final_values_B=ends.final_values_B,
            gamma=config.gamma,
            lam=config.gae_lambda,
        )
        advantages_BT = raw.advantages_BT
        if config.whiten_advantages:
            advantages_BT = masked_whiten(values=advantages_BT, mask=ends.mask_BT, shift_mean=True)
        return Credited(mask_BT=ends.mask_BT, advantages_BT=advantages_BT, returns_BT=raw.returns_BT)
