"""The stage table: what its columns name is there."""

import importlib

import pytest

from pipeline import identity
from pipeline.config_fields import has_setting
from pipeline.experiment import STAGE_FIELDS
from pipeline.stage_table import EVALUATED, STAGES, Stage, data_of


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_every_entry_of_the_stage_table_is_a_recipe(stage: Stage):
    for named in filter(None, (stage.recipe.entry, stage.recipe.prepares, stage.recipe.holds)):
        module, _, function = named.partition(":")
        recipe = importlib.import_module(module)
        assert callable(getattr(recipe, function))
        assert identity.recipe_version(named) == recipe.RECIPE_VERSION


def test_the_stages_of_the_table_are_the_sections_of_a_config():
    assert tuple(STAGES) == STAGE_FIELDS
    assert all(name == stage.name for name, stage in STAGES.items())


def test_every_setting_that_the_table_names_is_one():
    for stage in STAGES.values():
        named = [*stage.matter, *stage.rates, *([] if stage.data is None else [stage.data.field])]
        assert all(has_setting((stage.name, name)) for name in named), stage.name
        assert all(has_setting(tuple(key.split("."))) for key in stage.also_reads.values())
        assert stage.also_reads.keys() <= stage.settings.model_fields.keys()


def test_the_section_of_a_stage_knows_its_key():
    for stage in STAGES.values():
        section = stage.settings.model_fields[stage.name].annotation
        assert section is not None and stage.name == section.KEY


def test_the_prompts_of_sft_and_ppo_are_those_that_an_evaluation_should_not_ask():
    trained = {stage for stage, row in STAGES.items() if row.data and row.data.asks == "to train"}
    assert trained == {"sft", "ppo"}
    assert data_of("evaluate").asks == "to evaluate"
    assert EVALUATED == ("base", "sft", "ppo")
