"""What a person sees of a run that says something out of the ordinary, or lies on a disk that does."""

import io
import json
import math
import time

from pipeline.progress import Progress


def test_warnings_of_a_stage_are_shown_once_and_those_of_an_earlier_execution_are_not(tmp_path):
    warnings = tmp_path / "sft.warnings.log"
    warnings.write_text("sft step 3: of an earlier execution\n")
    progress = Progress(shown := io.StringIO())
    progress.start("sft", [tmp_path / "metrics.jsonl"], warnings)
    with warnings.open("a") as file:
        file.write("sft step 5: loss nan, gradient norm nan: not finite; step skipped\nsft step 6: to")
        file.flush()
        progress.poll()
        progress.poll()
        file.write("rn\n")
    progress.end("sft", "done", seconds=1.0)
    assert shown.getvalue().splitlines() == [
        "sft: running",
        "sft step 5: loss nan, gradient norm nan: not finite; step skipped",
        "sft step 6: torn",
        "sft: done in 1.0 s",
    ]


def test_damaged_lines_are_passed_over_and_those_behind_them_are_shown(tmp_path):
    progress = Progress(shown := io.StringIO())
    progress.start("sft", [path := tmp_path / "metrics.jsonl"], None)
    later = time.time() + 60
    sound = [{"step": step, "max_steps": 4, "time": later + step, "train/loss": 0.5} for step in (1, 4)]
    damaged = [
        {"stap": 2, "time": later},
        {"step": 2, "tyme": later},
        {"step": 2, "time": math.inf},
        {"step": 2, "time": later, "max_steps": 0},
        {"step": "2", "time": later},
        [2],
    ]
    first, *others = (json.dumps(line).encode() for line in (sound[0], *damaged, sound[1]))
    path.write_bytes(b"\n".join([first, bytes(80), b'{"step": \xff}', *others, b""]))
    progress.end("sft", "done")
    assert shown.getvalue().splitlines() == [
        "sft: running",
        "sft: step 1/4 loss 0.5",
        "sft: step 4/4 1.00 steps/s loss 0.5",
        "sft: done",
    ]


def test_a_metric_that_is_no_number_is_not_shown(tmp_path):
    """As of a stage of one step: JSON has no infinity."""
    line = {"step": 1, "time": time.time() + 60, "evaluate/kl": None, "evaluate/score": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    progress = Progress(shown := io.StringIO())
    progress.start("evaluate", [tmp_path / "metrics.jsonl"], None)
    progress.end("evaluate", "done")
    assert shown.getvalue().splitlines()[1:] == ["evaluate: step 1 score 2", "evaluate: done"]


def test_what_cannot_be_read_now_is_shown_by_a_later_call(tmp_path):
    metrics, warnings = tmp_path / "metrics.jsonl", tmp_path / "sft.warnings.log"
    for path in (metrics, warnings):
        path.symlink_to("/proc/self/mem")  # no memory lies at address 0: an I/O error
    progress = Progress(shown := io.StringIO())
    progress.start("sft", [metrics], warnings)
    progress.poll()
    for path in (metrics, warnings):
        path.unlink()
    metrics.write_text(json.dumps({"step": 1, "time": time.time() + 60, "train/loss": 0.5}) + "\n")
    warnings.write_text("sft step 1: a spike\n")
    progress.end("sft", "done")
    assert shown.getvalue().splitlines()[1:] == ["sft step 1: a spike", "sft: step 1 loss 0.5", "sft: done"]
