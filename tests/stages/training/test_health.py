"""Bad steps: skipped, kept, counted; too many in a row and training goes back and leaves those data out."""

import contextlib
import math

import pytest
import torch
from inline import runtime_in
from regression import CONFIG, MAX_STEPS, Killed, Regression, train
from safetensors.torch import load_file

from rollout.ground.errors import EnvironmentProblem
from stages.config.training import HealthConfig
from stages.errors import Interrupted, TrainingStopped
from stages.training.health import Health
from stages.training.metrics import read_steps

BAD_ROW = (4, 5, 6, 7)  # four in a row, behind the checkpoint of step 3


def test_a_step_that_is_not_finite_is_skipped_counted_and_its_batch_kept(tmp_path, caplog):
    regression = Regression(directory=tmp_path, spoiled=[4])
    weights, result = regression.train()
    assert torch.isfinite(weights).all()
    assert result["steps_skipped"] == 1.0
    assert regression.positions == list(range(MAX_STEPS))
    assert "sft step 5: loss nan, gradient norm nan: not finite; step skipped" in caplog.text
    (kept,) = (tmp_path / "logs" / "bad_batches").iterdir()
    assert kept.name == "sft-0001-step-000005-rank-0.safetensors"
    assert {name: tuple(value.shape) for name, value in load_file(kept).items()} == {
        "batch.0.inputs": (2, 3),
        "batch.1.inputs": (2, 3),
    }
    last = read_steps(tmp_path / "work" / "metrics.jsonl")[-1]
    assert last["train/skipped_steps"] == 1.0 and last["train/loss"] == pytest.approx(result["loss_final"])


def test_a_disk_that_takes_no_bad_batch_is_one_line(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "bad_batches").touch()
    with pytest.raises(EnvironmentProblem, match=r"bad_batches: File exists; .*go on$"):
        train(tmp_path, spoiled=[4])


def test_a_skipped_step_leaves_weights_and_moments_alone(tmp_path):
    """Nine good steps, the last one bad: the weights of nine steps."""
    after_nine = Regression(directory=tmp_path / "nine", die_at=9)
    with pytest.raises(Killed):
        after_nine.train()
    expected = torch.cat([value.detach().flatten() for value in after_nine.model.parameters()])
    weights, _ = train(tmp_path / "bad", spoiled=[9])
    assert torch.equal(weights, expected)


def test_after_four_bad_steps_in_a_row_training_goes_back_and_leaves_those_data_out(tmp_path, caplog):
    regression = Regression(directory=tmp_path / "bad", spoiled=BAD_ROW)
    weights, result = regression.train()
    assert regression.positions == [0, 1, 2, 3, 4, 5, 6, 7, *range(8, 15)]
    assert "sft step 8: 4 bad steps in a row; back to step 3, leaving out the 5 batches" in caplog.text
    expected, _ = train(tmp_path / "without", left_out=[3, *BAD_ROW])
    assert torch.equal(weights, expected)
    assert result["steps"] == MAX_STEPS and result["steps_skipped"] == 4
    steps = [line["step"] for line in read_steps(tmp_path / "bad" / "work" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == MAX_STEPS


@pytest.mark.parametrize("die_at", [5, 9, 12, 14])
def test_a_run_killed_before_or_after_going_back_ends_in_the_same_bits(tmp_path, die_at):
    whole, _ = train(tmp_path / "whole", spoiled=BAD_ROW)
    with pytest.raises(Killed):
        train(tmp_path / "killed", spoiled=BAD_ROW, die_at=die_at)
    resumed, _ = train(tmp_path / "killed", spoiled=BAD_ROW)
    assert torch.equal(resumed, whole)


def test_without_a_checkpoint_training_goes_on_behind_the_bad_data(tmp_path, caplog):
    weights, result = train(tmp_path, spoiled=[0, 1, 2, 3])
    assert torch.isfinite(weights).all() and result["steps_skipped"] == 4
    assert "no checkpoint yet; going on behind them" in caplog.text


def test_the_third_time_stops_the_run(tmp_path):
    """Twice four bad positions in a row, then four of the many that are left."""
    regression = Regression(directory=tmp_path, spoiled=range(4, 100))
    with pytest.raises(
        TrainingStopped, match=r"sft step \d+: 4 bad steps in a row for the 3. time .*bad_batches"
    ):
        regression.train()
    assert TrainingStopped.exit_code == 5
    assert regression.positions == list(range(16))  # 0 to 7, back to 3; 8 to 11, back to 3; 12 to 15


def test_a_training_without_a_single_step_taken_is_no_success(tmp_path):
    """Too short for a third time: two returns, then the end."""
    said = "sft: none of the steps was taken: loss or its gradient was not finite in 10 steps; lower"
    with pytest.raises(TrainingStopped, match=said):
        train(tmp_path, spoiled=range(100))
    lines = read_steps(tmp_path / "work" / "metrics.jsonl")
    assert lines and all("train/loss" not in line for line in lines)


@pytest.mark.parametrize("max_skipped_in_a_row", [0, 3])
def test_a_training_that_ends_in_bad_steps_without_a_checkpoint_reports_the_last_loss_it_had(
    tmp_path, max_skipped_in_a_row
):
    """Six good steps, four bad ones; the only line of the log is that of the end."""
    health = HealthConfig(max_skipped_in_a_row=max_skipped_in_a_row, max_rollbacks=4)
    rare = {"log_every_steps": 100, "checkpoint_every_steps": 100, "health": health}
    config = CONFIG.model_copy(update=rare)
    weights, result = train(tmp_path / "bad", config=config, spoiled=range(6, MAX_STEPS))
    (line,) = read_steps(tmp_path / "bad" / "work" / "metrics.jsonl")
    assert line["step"] == result["steps"] == MAX_STEPS and result["steps_skipped"] == 4
    each = config.model_copy(update={"log_every_steps": 1})
    expected, _ = train(tmp_path / "each", config=each, spoiled=range(6, MAX_STEPS))
    lines = read_steps(tmp_path / "each" / "work" / "metrics.jsonl")
    losses = [logged["train/loss"] for logged in lines]
    assert result["loss_final"] == line["train/loss"] == pytest.approx(sum(losses[:6]) / 6)
    assert losses[6:] == [losses[5]] * 4, "a window without a loss reports the last one's"
    assert torch.equal(weights, expected)


def test_where_training_goes_back_to_does_not_depend_on_where_it_was_stopped_before(tmp_path):
    """Stopped behind step 4: that checkpoint is newer than the one of step 3, and not taken."""
    whole, _ = train(tmp_path / "whole", spoiled=BAD_ROW)
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", spoiled=BAD_ROW, stop_at=3)
    (tmp_path / "stopped" / "stop").unlink()
    resumed, _ = train(tmp_path / "stopped", spoiled=BAD_ROW)
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize(
    ("every", "keep", "first_bad", "executions"),
    [
        pytest.param(7, 1, 10, [{"stop_at": 9}], id="a stop where one is kept"),
        pytest.param(7, 2, 10, [{"stop_at": 8}, {"stop_at": 9}], id="as many stops as are kept"),
        pytest.param(7, 2, 10, [{"stop_at": 9}, {"stop_at": 15}], id="a stop behind the return"),
        pytest.param(7, 2, 10, [{"stop_at": 9}, {"die_at": 15}], id="a kill behind the return"),
        pytest.param(4, 2, 4, [{"stop_at": 3}, {"every": 5}], id="another interval"),
        pytest.param(7, 2, 4, [{"stop_at": 3}], id="a stop before the first regular checkpoint"),
    ],
)
def test_where_training_goes_back_to_is_that_of_the_run_that_nothing_interrupted(
    tmp_path, every, keep, first_bad, executions
):
    """What a stop left is no place to go back to, pushes none out, and is gone once training went back."""
    config = CONFIG.model_copy(update={"checkpoint_every_steps": every, "keep_checkpoints": keep})
    how = {"spoiled": range(first_bad, first_bad + 4), "max_steps": 16}
    whole, _ = train(tmp_path / "whole", config=config, **how)
    for execution in executions:
        if "every" in execution:
            config = config.model_copy(update={"checkpoint_every_steps": execution["every"]})
            continue
        with pytest.raises((Interrupted, Killed)):
            train(tmp_path / "resumed", config=config, **how, **execution)
        (tmp_path / "resumed" / "stop").unlink(missing_ok=True)
    resumed, _ = train(tmp_path / "resumed", config=config, **how)
    assert torch.equal(resumed, whole)


def test_a_spike_is_told_and_taken_or_skipped(tmp_path, caplog):
    counts = {}
    for on_spike in ("log", "skip"):
        config = CONFIG.model_copy(update={"health": HealthConfig(on_spike=on_spike), "warmup_frac": 0.0})
        directory = tmp_path / on_spike
        _, result = train(directory, config=config, max_steps=30, wild=[25])
        counts[on_spike] = result["steps_skipped"]
        assert read_steps(directory / "work" / "metrics.jsonl")[-1]["train/loss_spikes"] == 1.0
    assert counts == {"log": 0, "skip": 1}
    assert caplog.text.count("sft step 26: loss") == 2 and caplog.text.count("a spike; step skipped") == 1


def test_a_run_that_is_asked_to_stop_does_so_at_the_step_boundary_and_goes_on_in_the_same_bits(tmp_path):
    whole, _ = train(tmp_path / "whole")
    stopped = Regression(directory=tmp_path / "stopped", stop_at=4)
    with pytest.raises(Interrupted, match="sft: stopped at step 5 of 10, state saved") as error:
        stopped.train()
    assert error.value.exit_code == 75 and stopped.positions == [0, 1, 2, 3, 4]
    (tmp_path / "stopped" / "stop").unlink()
    going_on = Regression(directory=tmp_path / "stopped")
    resumed, _ = going_on.train()
    assert torch.equal(resumed, whole) and going_on.positions == [5, 6, 7, 8, 9]
    lines = [read_steps(tmp_path / name / "work" / "metrics.jsonl") for name in ("whole", "stopped")]
    losses = [[line["train/loss"] for line in run] for run in lines]
    assert losses[0] == losses[1]


def test_a_run_stopped_after_its_last_step_has_nothing_left_to_train(tmp_path):
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 10 of 10"):
        train(tmp_path / "stopped", stop_at=9)
    (tmp_path / "stopped" / "stop").unlink()
    going_on = Regression(directory=tmp_path / "stopped")
    resumed, _ = going_on.train()
    assert torch.equal(resumed, whole) and going_on.positions == []


def test_further_metrics_are_of_the_steps_that_were_taken(tmp_path):
    """Skipped, gone back, killed and resumed: the lines are those of a run in which nothing happened."""

    def lines_of(name: str, **how: object) -> list[tuple[int, float, float]]:
        with contextlib.suppress(Killed):
            train(tmp_path / name, **how)
        train(tmp_path / name, **{**how, "die_at": None})
        lines = read_steps(tmp_path / name / "work" / "metrics.jsonl")
        return [(line["step"], line["train/loss"], line["train/margin"]) for line in lines]

    undisturbed = lines_of("whole", left_out=[3, *BAD_ROW])
    assert len(undisturbed) == MAX_STEPS / CONFIG.log_every_steps
    assert lines_of("back", spoiled=BAD_ROW) == undisturbed
    for die_at in (5, 8, 10, 11):
        assert lines_of(f"killed-{die_at}", spoiled=BAD_ROW, die_at=die_at) == undisturbed, die_at
    once = lines_of("skipped", spoiled=[4])
    assert all(math.isfinite(margin) for _, _, margin in once)


def test_both_causes_are_named_where_steps_were_skipped_and_batches_left_out(tmp_path):
    health = Health(CONFIG.health, runtime_in(tmp_path, "ppo"))
    assert not health.accepts("value loss", 0, math.nan, math.nan)
    health.leave_out("every response was cut off")
    said = (
        "value loss or its gradient was not finite in 1 steps; .*bad_batches; and every response was cut off$"
    )
    with pytest.raises(TrainingStopped, match=said):
        health.check_end("policy loss")
