"""Why `ShmReceiver._rebuild_tied_heads` is there: without it, the tied output head stays old and nothing says so."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout.weight_file import WeightFileWriter, checkpoint_layout
from rollout.weight_sync import ModuleSource

PROGRAM = Path(__file__).with_name("tied_head_without_cure.py")


@pytest.mark.parametrize(("cure", "differing"), [("without", ["lm_head.weight"]), ("with", [])])
def test_pin_36_a_tied_head_stays_stale_unless_it_is_rebuilt(tied_model_dir, tmp_path, cure, differing):
    message = tmp_path / "update.json"
    message.write_text(json.dumps({"init": dataclasses.asdict(checkpoint_layout(tied_model_dir, dtype="float32")),
                                   "update": dataclasses.asdict(moved_weights(tied_model_dir, tmp_path / "w"))}))
    answer = subprocess.run([sys.executable, PROGRAM, tied_model_dir, message, cure], check=True, timeout=120,
                            capture_output=True, text=True)
    assert json.loads(answer.stdout.splitlines()[-1]) == differing


def moved_weights(model_dir: Path, path: Path):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    source = ModuleSource(model, dtype="float32")
    with torch.no_grad(), WeightFileWriter(path) as writer:
        for group in source.groups():
            for name, tensor in group.items():
                writer.add(name, tensor * 1.5)
        writer.add_alias("lm_head.weight", of="model.embed_tokens.weight")
        return writer.finish(1)
