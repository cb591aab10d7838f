"""A fixed loss must never reuse the buggy artifact: changed code needs a new RECIPE_VERSION."""

import shutil
from pathlib import Path

import pytest
import recipe_lock


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the code behind the recipes."""
    for package in recipe_lock.FIRST_PARTY:
        shutil.copytree(recipe_lock.ROOT / package, tmp_path / package)
    return tmp_path


def changed_stages(source: Path, path: str, old: str, new: str) -> set[str]:
    """Stages whose digest an edit of one file changes."""
    before = {stage: entry["digest"] for stage, entry in recipe_lock.current(source).items()}
    text = (source / path).read_text()
    assert old in text
    (source / path).write_text(text.replace(old, new))
    after = {stage: entry["digest"] for stage, entry in recipe_lock.current(source).items()}
    return {stage for stage in after if after[stage] != before[stage]}


def test_no_recipe_changed_without_a_new_version():
    lock = recipe_lock.read_lock()
    now = recipe_lock.current()
    assert lock.keys() == now.keys(), "run `make recipe-lock` and commit tests/recipe_versions.json"
    changed = [stage for stage in now if lock[stage] != now[stage]]
    assert not changed, (
        f"code behind {changed} changed: raise RECIPE_VERSION in stages/<stage>.py where results change, "
        "then run `make recipe-lock` (FORCE=1 where none does)"
    )


def test_a_changed_import_at_any_depth_is_noticed(source: Path):
    assert "ppo" in changed_stages(source, "stages/objectives/masked.py", "return ", "return 2 * ")


def test_comments_docstrings_and_layout_are_not_noticed(source: Path):
    assert changed_stages(source, "stages/ppo.py", '"""Recipe', '"""Reworded recipe') == set()
    text = (source / "stages/ppo.py").read_text()
    assert changed_stages(source, "stages/ppo.py", text, text + "\n\n# a comment\n") == set()


def test_a_new_knob_is_not_noticed_for_its_value_is_in_the_fingerprint(source: Path):
    knob = "class PPOConfig(TrainingConfig):\n    new_knob: int = 3\n"
    assert changed_stages(source, "stages/config/ppo.py", "class PPOConfig(TrainingConfig):\n", knob) == set()


def test_a_changed_recipe_touches_its_own_stage_only(source: Path):
    edit = ("stages/sft.py", "RECIPE_VERSION = ", "SURPRISE = 1\nRECIPE_VERSION = ")
    assert changed_stages(source, *edit) == {"sft"}
