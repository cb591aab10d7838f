import pytest

from stages.objectives.schedules import constant, cosine, linear, lr_factor


def test_warmup_starts_above_zero_and_reaches_one_once():
    factors = [constant(step=step, warmup_steps=4) for step in range(7)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert constant(step=0, warmup_steps=0) == 1.0


def test_linear_by_hand():
    factors = [linear(step=step, warmup_steps=1, total_steps=5, final_frac=0.2) for step in range(8)]
    assert factors == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_cosine_by_hand():
    factors = [cosine(step=step, warmup_steps=0, total_steps=4, final_frac=0.1) for step in range(6)]
    upper, lower = 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 0.1 + 0.9 * (1 - 0.5**0.5) / 2
    assert factors == pytest.approx([1.0, upper, 0.55, lower, 0.1, 0.1])


def test_a_run_that_is_all_warmup_is_defined():
    for schedule in (linear, cosine):
        factors = [schedule(step=step, warmup_steps=3, total_steps=3, final_frac=0.0) for step in range(4)]
        assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_after_warmup_a_decay_never_rises_and_stays_above_its_floor(schedule):
    factors = [
        lr_factor(schedule=schedule, step=step, warmup_steps=10, total_steps=100, final_frac=0.05)
        for step in range(10, 120)
    ]
    assert factors == sorted(factors, reverse=True) and min(factors) >= 0.05
    assert factors[0] == 1.0


def test_the_name_in_the_config_picks_the_schedule():
    rest = {"step": 7, "warmup_steps": 2, "total_steps": 12}
    assert lr_factor(schedule="constant", final_frac=0.0, **rest) == 1.0
    assert lr_factor(schedule="linear", final_frac=0.0, **rest) == pytest.approx(0.5)
    assert lr_factor(schedule="cosine", final_frac=0.5, **rest) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="polynomial"):
        lr_factor(schedule="polynomial", final_frac=0.0, **rest)


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        cosine(step=0, warmup_steps=5, total_steps=4, final_frac=0.0)
    with pytest.raises(ValueError, match="final_frac"):
        linear(step=0, warmup_steps=0, total_steps=4, final_frac=1.5)
    with pytest.raises(ValueError, match=">= 0"):
        constant(step=-1, warmup_steps=0)
