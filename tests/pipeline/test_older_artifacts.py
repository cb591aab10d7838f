"""Artifacts in november_2026/, which the code of that month made (commit ce3c517), are taken as they are."""

import io
import json
import shutil
from pathlib import Path

import pytest
from pydantic import Field

from pipeline import config as configs
from pipeline.executor import execute
from pipeline.experiment import ExperimentConfig
from pipeline.planning import plan_run
from pipeline.progress import Progress
from rollout.ground.section import as_before
from stages.config.pretrain import PretrainConfig

OLDER = Path(__file__).with_name("november_2026")
MADE_THEN = {"prepare": "157b41b1d569ed8b", "pretrain": "e262e4e9cb2c3f10"}


class NewerConfig(PretrainConfig):
    """`pretrain:` with a setting that older code did not have, and did as if it were 0.5."""

    knob: float = Field(default=0.5, json_schema_extra=as_before(0.5))


class UnmarkedConfig(PretrainConfig):
    """The same, not marked."""

    knob: float = 0.5


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    """The config of these artifacts, beside `outputs/` with them."""
    shutil.copytree(OLDER / "artifacts", tmp_path / "outputs/artifacts")
    for name in ("text.jsonl", "tiny.yaml"):
        shutil.copy(OLDER / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return configs.load(tmp_path / "tiny.yaml").config


def with_section(
    config: ExperimentConfig, section: type[PretrainConfig], **settings: float
) -> ExperimentConfig:
    assert config.pretrain is not None
    return config.model_copy(update={"pretrain": section(**config.pretrain.model_dump(), **settings)})


def test_a_finished_artifact_of_older_code_is_taken_as_it_is(older: ExperimentConfig):
    results = execute(plan_run(older), Progress(io.StringIO()))
    assert {stage: result.fingerprint for stage, result in results.items()} == MADE_THEN
    summary = json.loads(Path("outputs/runs/tiny/summary.json").read_text())
    assert all(entry["skipped"] for entry in summary.values())
    assert summary["pretrain"]["metrics"]["steps"] == 2


def test_it_is_taken_by_code_with_a_newer_setting_that_does_what_was_done_before(older: ExperimentConfig):
    planned = plan_run(with_section(older, NewerConfig))
    assert planned.to_run == ()
    assert {stage: node.fingerprint for stage, node in planned.nodes.items()} == MADE_THEN


def test_another_value_of_the_newer_setting_makes_the_stage_anew(older: ExperimentConfig):
    assert plan_run(with_section(older, NewerConfig, knob=0.25)).to_run == ("pretrain",)


def test_without_the_mark_a_newer_setting_makes_every_artifact_anew(older: ExperimentConfig):
    assert plan_run(with_section(older, UnmarkedConfig)).to_run == ("pretrain",)
