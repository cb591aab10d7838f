"""How long is the way from the command to the loss? Our named functions on the stack, in a real run.

    python benchmarks/frames.py [STAGE ...]        sft and ppo where none is named

Runs a tiny chain in this process (`pipeline.executor: inline`, the transformers engine) in a temporary
directory. While an optimizer step is taken, each call of an objective is looked at: the functions of this
repository above it, from the entry point on. Lambdas and comprehensions have no name and are not counted.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pipeline.cli

ROOT = Path(pipeline.cli.__file__).parents[1]
PACKAGES = ("pipeline", "stages", "rollout")
OBJECTIVES = "stages/objectives/"
SCHEDULES = "stages/objectives/schedules.py"  # of learning rates: no loss
STEP = "take_step"
CONFIG = """
name: tiny
model: {layers: 1, hidden_size: 64, intermediate_size: 96, num_heads: 2, num_kv_heads: 1, context_length: 64}
prepare: {data: [{path: text.jsonl}], vocab_size: 320, heldout_frac: 0.1, shard_tokens: 1024}
pretrain: {max_steps: 2, batch_size: 2, micro_batch_size: 2}
sft: {data: [{path: talks.jsonl}], max_steps: 2, batch_size: 2, micro_batch_size: 2}
reward: {data: [{path: pairs.jsonl}], max_steps: 2, batch_size: 2, micro_batch_size: 2, min_accuracy: 0,
  heldout_frac: 0.5, normaliser_prompts: 2}
ppo: {data: [{path: talks.jsonl}], max_steps: 1, num_prompts: 2, batch_size: 2, micro_batch_size: 2,
  max_response_tokens: 4}
rollout: {engine: hf, parity_num_prompts: 2, parity_max_tokens: 4}
pipeline: {executor: inline}
"""
Way = tuple[tuple[str, str], ...]  # (file, function), from the entry point on


def main() -> int:
    """Print the ways of each stage; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", default=["sft", "ppo"])
    asked = parser.parse_args().stages
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        _write_data()
        for stage in ("prepare", "pretrain", "sft", "reward", "ppo"):
            ways = _run(stage)
            if stage in asked:
                print("\n".join(_listed(stage, ways)))
    return 0


def _write_data() -> None:
    facts = [
        (name, sound) for name in ("cow", "dog", "cat", "duck", "sheep") for sound in ("moo", "woof", "baa")
    ]
    files: dict[str, list[dict[str, Any]]] = {
        "text.jsonl": [{"text": f"The {a} says {b}, again and again. " * 20} for a, b in facts],
        "talks.jsonl": [{"prompt": f"What says the {a}?", "completion": f"It says {b}."} for a, b in facts],
        "pairs.jsonl": [
            {"prompt": f"And the {a}?", "chosen": f"It says {b}.", "rejected": b} for a, b in facts
        ],
    }
    for name, rows in files.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tiny.yaml").write_text(CONFIG)


def _run(stage: str) -> set[Way]:
    """The ways on which `rlhf STAGE` calls objectives in its steps."""
    ways: set[Way] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        called = _file(frame.f_code.co_filename)
        if event == "call" and called.startswith(OBJECTIVES) and called != SCHEDULES:
            way = tuple(reversed(list(_above(frame))))
            if any(name == STEP for _, name in way):
                ways.add(way)

    said = io.StringIO()
    sys.setprofile(look)
    try:
        with contextlib.redirect_stdout(said):
            pipeline.cli.main([stage, "tiny.yaml"])
    except SystemExit as ended:
        assert not ended.code, said.getvalue()
    finally:
        sys.setprofile(None)
    return ways


def _above(frame: FrameType) -> Iterator[tuple[str, str]]:
    """Named functions of ours above an objective, the nearest first, down to the entry point."""
    above: FrameType | None = frame.f_back
    while above is not None:
        file, name = _file(above.f_code.co_filename), above.f_code.co_name
        if file.startswith(PACKAGES) and not file.startswith(OBJECTIVES) and not name.startswith("<"):
            yield file, name
        above = above.f_back


@cache
def _file(name: str) -> str:
    """Relative to the repository; "" outside."""
    path = Path(name)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ""


def _listed(stage: str, ways: set[Way]) -> Iterator[str]:
    lengths = sorted({len(way) for way in ways})
    counted = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
    files = {file for way in ways for file, _ in way if file.startswith("stages/")}
    yield f"rlhf {stage}: {counted} named frames to the loss, {len(files)} files in stages"
    longest = max(ways, key=len)
    yield from (f"  {name:24} {file}" for file, name in longest)
    for way in sorted(ways - {longest}):
        yield f"  also {len(way)}: ... {' > '.join(name for _, name in way[-3:])}"


if __name__ == "__main__":
    sys.exit(main())
