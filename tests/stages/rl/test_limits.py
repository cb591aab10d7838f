"""Limits: batches that the run must not learn from, hand-written."""

import pytest

from stages.config.data import DataSource
from stages.config.ppo import PPOConfig
from stages.errors import TrainingStopped
from stages.rl.limits import check_rollouts

SOUND = {
    "rollout/kl": 1.0,
    "rollout/score_std": 0.5,
    "rollout/entropy": 0.7,
    "rollout/truncated": 0.2,
    "rollout/repeated": 0.1,
}
LIMITS = PPOConfig(
    data=[DataSource(path="x")],
    max_kl=5.0,
    min_score_std=0.01,
    min_entropy=0.05,
    max_truncated_frac=0.5,
    max_repeated_frac=0.4,
)


def test_a_sound_batch_of_rollouts_passes_every_limit():
    check_rollouts(6, SOUND, LIMITS)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rollout/kl", 5.1, "KL to the reference is 5.1 nats per response, above ppo.max_kl 5"),
        ("rollout/kl", float("nan"), "above ppo.max_kl"),
        ("rollout/score_std", 0.001, "below ppo.min_score_std 0.01: a constant reward teaches nothing"),
        ("rollout/entropy", 0.01, "entropy is 0.01 nats per token, below ppo.min_entropy 0.05"),
        ("rollout/truncated", 0.6, "60% of the responses are cut off, above ppo.max_truncated_frac 0.5"),
        (
            "rollout/repeated",
            0.5,
            "50% of the responses' 4-grams are repetitions, above ppo.max_repeated_frac 0.4",
        ),
    ],
)
def test_a_batch_of_rollouts_beyond_a_limit_stops_the_run_in_one_line(key, value, said):
    with pytest.raises(TrainingStopped, match=r"^ppo step 7: ") as error:
        check_rollouts(6, SOUND | {key: value}, LIMITS)
    assert said in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 5
