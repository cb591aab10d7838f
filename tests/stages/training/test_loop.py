"""The supervised loop: exact resume, sound checkpoints, and stopping at numbers that are none."""

import json

import pytest
import torch
from regression import CONFIG, MAX_STEPS, Killed, train
from torch import nn

from rollout.ground.errors import EnvironmentProblem
from stages.data.batches import BatchOrder
from stages.training.checkpoint import Checkpoints
from stages.training.metrics import MetricsLog, StepLog, read_steps
from stages.training.optimize import Optimizer


@pytest.mark.parametrize("die_at", [1, 3, 4, 6, 9])
def test_a_killed_and_resumed_training_ends_in_the_same_bits(tmp_path, die_at):
    whole, expected = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", die_at=die_at)
    resumed, result = train(tmp_path / "killed")
    assert torch.equal(resumed, whole)
    steps = [line["step"] for line in read_steps(tmp_path / "killed" / "work" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == MAX_STEPS
    assert result["steps"] == expected["steps"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path, caplog):
    with pytest.raises(Killed):
        train(tmp_path, die_at=8)
    newest = tmp_path / "work" / "checkpoints" / "step-000006"
    victim = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    resumed, _ = train(tmp_path)
    whole, _ = train(tmp_path / "other")
    assert torch.equal(resumed, whole)
    assert "step-000006: damaged checkpoint" in caplog.text


def test_an_unfinished_checkpoint_is_not_one(tmp_path):
    (tmp_path / "work" / "checkpoints" / "step-000003.tmp").mkdir(parents=True)
    optimizer = Optimizer(nn.Linear(2, 1), CONFIG, lr=0.1, max_steps=4)
    assert Checkpoints(tmp_path).restore({"model": optimizer.state()}) == (0, {})


def test_the_last_checkpoints_and_the_one_of_the_lowest_loss_are_kept(tmp_path):
    train(tmp_path)
    lines = read_steps(tmp_path / "work" / "metrics.jsonl")
    loss_at = {
        saved: [line["train/loss"] for line in lines if line["step"] <= saved][-1] for saved in (3, 6, 9)
    }
    best = min(loss_at, key=loss_at.__getitem__)
    kept = {int(path.name.removeprefix("step-")) for path in (tmp_path / "work" / "checkpoints").iterdir()}
    assert kept == {6, 9, best}


def test_the_learning_rate_warms_up_and_decays(tmp_path):
    train(tmp_path)
    rates = {line["step"]: line["train/lr"] for line in read_steps(tmp_path / "work" / "metrics.jsonl")}
    assert rates[2] <= CONFIG.lr and rates[4] > rates[10] >= CONFIG.lr * CONFIG.min_lr_frac


def test_matrices_decay_and_vectors_do_not():
    optimizer = Optimizer(nn.Linear(3, 2), CONFIG, lr=0.1, max_steps=1)
    decays = {
        group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.adamw.param_groups
    }
    assert decays == {0.1: [2], 0.0: [1]}


def test_steps_come_from_the_config_or_from_epochs_over_the_data():
    order = BatchOrder(num_rows=10, batch_size=4, seed=0)
    assert order.num_steps(2.0, 7) == 7
    assert order.num_steps(2.0, None) == order.num_steps(2.0) == 5


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit in the key": (lambda path: flip(path, 3), 1),
    "a flipped bit in a line's end": (lambda path: flip(path, path.read_bytes().index(b"\n")), 1),
    "a zeroed block": (lambda path: path.write_bytes(bytes(50) + path.read_bytes()[50:]), 1),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\n[1]\n7\n" + path.read_bytes()), 3),
    "a step that is none": (lambda path: path.write_text('{"step": true}\n{"step": "3"}\n'), 2),
    "nests too deep": (lambda path: path.write_text("[" * 100_000 + "\n"), 1),
    "a bad sector": (lambda path: (path.unlink(), path.symlink_to("/proc/self/mem")), None),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_lines_of_metrics_cost_one_warning_and_no_step(tmp_path, caplog, kind):
    damage, num_lines = DAMAGE[kind]
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", die_at=8)
    path = tmp_path / "killed" / "work" / "metrics.jsonl"
    damage(path)
    resumed, _ = train(tmp_path / "killed")
    assert torch.equal(resumed, whole)
    assert [line["step"] for line in read_steps(path)][-2:] == [8, 10]
    lines = [record.getMessage() for record in caplog.records if record.name == "stages.training.metrics"]
    reason = "Input/output error; it begins again" if num_lines is None else f"{num_lines} of "
    assert len(lines) == 1 and lines[0].startswith(f"{path}: damaged: {reason}")


def test_a_disk_that_takes_no_metrics_is_one_line(tmp_path):
    log = StepLog(path := tmp_path / "metrics.jsonl", resumed_step=0)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(EnvironmentProblem, match=r"metrics\.jsonl: No space left on device; .*go on$"):
        log.write([{"step": 1}])
    path.unlink()
    path.mkdir()
    with pytest.raises(EnvironmentProblem, match=r"metrics\.jsonl: Is a directory"):
        log.cut(0)


def test_an_undeclared_metric_is_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="made/up"):
        MetricsLog(tmp_path, max_steps=1, resumed_step=0)(1, {"made/up": 1.0})


def test_a_resumed_log_drops_the_steps_it_will_take_again_and_a_torn_last_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "x"')
    StepLog(path, resumed_step=2).write([{"step": 3, "text": "é"}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "text": "é"},
    ]
