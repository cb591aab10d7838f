"""What came of a run, in words."""

import math

import pytest

from pipeline.headline import cards, headline, percent, sentence, share, two_digits

EVALUATED = {
    "reward_base": -0.2568, "score_base": 0.376, "score_sft": 0.4902, "score_ppo": 0.9031, "reward_ppo": 1.2,
    "prompts": 288.0, "win_rate_ppo_vs_sft": 0.874, "win_rate_low": 0.84, "win_rate_high": 0.891,
    "kl_ppo_vs_sft": 2.2,
}  # fmt: skip
REWARD = {"accuracy_heldout": 0.953, "pairs_heldout": 500.0, "loss_final": 0.2149, "steps": 90.0}
PPO = {"score_final": 1.234, "kl_final": 2.1, "samples_per_second": 38.4, "parity_max_abs_diff": 3.24e-6}


def without(*keys: str) -> dict[str, float]:
    return {key: value for key, value in EVALUATED.items() if not key.endswith(keys)}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"reward": REWARD, "ppo": PPO, "evaluate": EVALUATED},
         "score 0.49 -> 0.90, ppo wins 87 % (84 to 89), KL 2.2"),
        ({"sft": {"loss_final": 1.0}, "evaluate": without("_ppo", "_vs_sft", "_low", "_high")},
         "score 0.38 -> 0.49 (base -> sft)"),
        ({"evaluate": {"score_sft": 0.4902, "prompts": 288.0}}, "score 0.49 (sft)"),
        ({"evaluate": {"reward_sft": -0.1, "reward_ppo": 1.2, "kl_ppo_vs_sft": 12.3}},
         "reward -0.10 -> 1.2 (sft -> ppo), KL 12"),
        ({"evaluate": {"length_base": 31.5, "prompts": 8.0}}, "length 32 (base)"),
        ({"reward": REWARD, "ppo": PPO},
         "ppo: reward 1.2, KL 2.1, 38 responses per second, engine and trainer within 3.2e-06 nats"),
        ({"sft": {"loss_final": 1.234}, "reward": REWARD},
         "reward: accuracy on held-out pairs 0.95, loss 0.21"),
        ({"sft": {"loss_final": 1.234}}, "sft: loss 1.2"),
        ({"sft": {"loss_final": 1.234}, "reward": {}}, "sft: loss 1.2"),
        ({"sft": {"loss_final": math.nan}}, None),
        ({"sft": {"loss_final": "<b>"}, "evaluate": {"score_sft": None}, "other": {}}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_sentence_says_what_came_of_the_stages_there_are(metrics, said):
    assert sentence(metrics) == said


def test_a_stage_is_told_by_its_headline_metrics_and_not_by_its_first():
    assert headline("reward", {"steps": 9.0, **REWARD}) == "accuracy on held-out pairs 0.95, loss 0.21"
    assert headline("prepare", {"documents": 9, "documents_kept": 8, "tokens_train": 1204224}) == (
        "8 documents, 1,204,224 tokens"
    )
    assert headline("evaluate", EVALUATED) == "score of base 0.38, sft 0.49, ppo 0.90"
    assert headline("no such stage", {"loss_final": 1.0}) == ""


@pytest.mark.parametrize(
    ("count", "shown"), [(100, "0.49"), (288, "0.49"), (99, "0.5"), (8, "0.5"), (0, "0.5"), (None, "0.49")]
)
def test_a_share_has_a_second_digit_where_enough_was_counted(count, shown):
    """The standard error of a share is 0.5 / sqrt(n) at most: 0.05 at 100."""
    assert share(0.4902, count) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(2.2, "2.2"), (2.0, "2.0"), (0.034, "0.034"), (-0.2568, "-0.26"), (38.4, "38"), (1234.5, "1,234"),
     (3.24e-6, "3.2e-06"), (9.94, "9.9"), (9.96, "10"), (-9.99, "-10"), (0.0996, "0.10")],
)  # fmt: skip
def test_numbers_have_two_digits_and_no_fewer_before_the_point(value, shown):
    assert two_digits(value) == shown


def test_the_cards_hold_the_comparison_and_the_telling_metrics():
    shown = {
        card.label: (card.value, card.small_print) for card in cards({"ppo": PPO, "evaluate": EVALUATED})
    }
    assert shown["Score, sft \u2192 ppo"] == ("0.49 \u2192 0.90", "base 0.38")
    assert shown["ppo wins over sft"] == ("87 %", "ties half; 95 % interval 84 % to 89 %")
    assert shown["KL of ppo to sft"] == ("2.2", "nats per response")
    assert shown["Responses per second"] == ("38", "whole loop")
    assert "Reward, sft \u2192 ppo" not in shown  # of ppo alone
    assert percent(0.874) == "87 %"
