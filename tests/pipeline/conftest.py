"""The `chain` fixture: six fake stages, configured, in a temporary working directory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_chain import CONFIG, IMPORTABLE, ROWS, Chain

from pipeline.stage_table import STAGES, Recipe


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, replace(stage, recipe=Recipe(entry="fake_stages:run")))
    made = Chain(directory=tmp_path, control=tmp_path / "control")
    made.control.mkdir()
    monkeypatch.setenv("FAKE_STAGES", str(made.control))
    monkeypatch.setenv("PYTHONPATH", IMPORTABLE)  # of Ray's workers and of the cli
    monkeypatch.chdir(tmp_path)
    for name, row in ROWS.items():
        lines = [json.dumps({key: f"{value} {index}" for key, value in row.items()}) for index in range(12)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (tmp_path / "score.py").write_text("def score(prompt, response, row):\n    return 1.0\n")
    (tmp_path / "demo.yaml").write_text(CONFIG)
    return made
