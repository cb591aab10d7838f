"""Why `FetchReceiver._rebuild_tied_heads` is there: a trainer that sends what `save_pretrained` writes sends
no tied head, and the engine then keeps its old packed copy of it. No error, nothing in the log.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rollout.api import WeightUpdate
from rollout.weight_file import WeightFileWriter, checkpoint_layout
from rollout.weight_source import ModuleSource

pytestmark = pytest.mark.engine

PROGRAM = Path(__file__).with_name("tied_head_without_cure.py")


def test_pin_36_a_tied_head_stays_stale_unless_it_is_rebuilt_or_sent(tied_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tied_model_dir, dtype=torch.float32)
    untold = moved(model, tmp_path / "a", factor=1.5, alias=False), moved(model, tmp_path / "b", factor=1.5)
    cured = moved(model, tmp_path / "c", factor=2.0, alias=False), moved(model, tmp_path / "d", factor=2.0)
    told = moved(model, tmp_path / "e", factor=3.0), moved(model, tmp_path / "f", factor=3.0)
    cases = {
        "checkpoint names, no cure": untold,
        "checkpoint names, with cure": cured,
        "tied name sent, no cure": told,
    }
    found = diagnoses(tied_model_dir, cases, tmp_path)
    num_tensors = found["checkpoint names, with cure"].pop("num_same")
    assert found["checkpoint names, no cure"].pop("num_same") == num_tensors - 1 > 0
    assert found["tied name sent, no cure"].pop("num_same") == num_tensors
    assert found == {
        "checkpoint names, no cure": {"differing": ["lm_head.weight"], "not_compared": []},
        "checkpoint names, with cure": {"differing": [], "not_compared": []},
        "tied name sent, no cure": {"differing": [], "not_compared": []},
    }


def moved(model: PreTrainedModel, path: Path, *, factor: float, alias: bool = True) -> WeightUpdate:
    """All weights times `factor`; with `alias`, under the name of the tied head too."""
    with torch.no_grad(), WeightFileWriter(path) as writer:
        for group in ModuleSource(model, dtype="float32").groups():
            for name, tensor in group.items():
                writer.add(name, tensor * factor)
        if alias:
            writer.add_alias("lm_head.weight", of="model.embed_tokens.weight")
        return writer.finish(1)


def diagnoses(
    model_dir: Path, cases: dict[str, tuple[WeightUpdate, WeightUpdate]], tmp_path: Path
) -> dict[str, dict[str, Any]]:
    """{case: what the engine says of the second update, after it was sent the first}."""
    message = tmp_path / "message.json"
    message.write_text(
        json.dumps(
            {
                "model_dir": str(model_dir),
                "init": dataclasses.asdict(checkpoint_layout(model_dir, dtype="float32"))
                | {"timeout_s": 30.0},
                "updates": {
                    case: {"sent": dataclasses.asdict(sent), "meant": dataclasses.asdict(meant)}
                    for case, (sent, meant) in cases.items()
                },
            }
        )
    )
    answer = subprocess.run(
        [sys.executable, PROGRAM, message], check=True, timeout=120, capture_output=True, text=True
    )
    return json.loads(answer.stdout.splitlines()[-1])
