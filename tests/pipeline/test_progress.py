"""What a person sees of a run that says something out of the ordinary."""

import io

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
