"""Limits: a batch of rollouts that must not be learned from ends the run.

    metrics of a batch --check_rollouts--> nothing | TrainingStopped, which names the setting

Owns: the limits of a config on its batches. Does not own: their numbers (experience), nor whether engine
and trainer agree about a batch (publish).
"""

from collections.abc import Mapping

from stages.config.ppo import PPOConfig
from stages.errors import TrainingStopped


def check_rollouts(step: int, summary: Mapping[str, float], config: PPOConfig) -> None:
    """Raise TrainingStopped (exit 5) when a batch of rollouts is beyond a limit of the config, because
    training on it would only make the policy worse. `summary`: its metrics; `step` counts from 0.
    """
    key, problems = config.KEY, []
    score_std, entropy = summary["rollout/score_std"], summary["rollout/entropy"]
    truncated, repeated = summary["rollout/truncated"], summary["rollout/repeated"]
    if "rollout/kl" in summary and not summary["rollout/kl"] <= config.max_kl:
        problems.append(
            f"KL to the reference is {summary['rollout/kl']:.1f} nats per response, above {key}.max_kl "
            f"{config.max_kl:g}; raise {key}.kl_coef or lower {key}.lr"
        )
    if config.responses_per_step > 1 and not score_std >= config.min_score_std:
        problems.append(
            f"scores spread by {score_std:.2g} only, below {key}.min_score_std {config.min_score_std:g}: a "
            "constant reward teaches nothing; look at the reward model"
        )
    if not entropy >= config.min_entropy:
        problems.append(
            f"entropy is {entropy:.3g} nats per token, below {key}.min_entropy {config.min_entropy:g}: the "
            f"policy has collapsed; raise {key}.kl_coef or {key}.entropy_coef"
        )
    if truncated > config.max_truncated_frac:
        problems.append(
            f"{truncated:.0%} of the responses are cut off, above {key}.max_truncated_frac "
            f"{config.max_truncated_frac:g}; raise {key}.max_response_tokens or {key}.missing_eos_penalty"
        )
    if repeated > config.max_repeated_frac:
        problems.append(
            f"{repeated:.0%} of the responses' 4-grams are repetitions, above {key}.max_repeated_frac "
            f"{config.max_repeated_frac:g}; raise {key}.kl_coef, or look at the reward model"
        )
    if problems:
        raise TrainingStopped(f"{key} step {step + 1}: {problems[0]}")
