"""The graph: edges, what identifies an artifact and what does not."""

import importlib
from pathlib import Path

import pytest
from fake_chain import Chain

from pipeline import dag
from pipeline.errors import ConfigError
from pipeline.experiment import ExperimentConfig
from stages.config.reward import RewardSettings
from stages.config.sampling import ResponseSampling
from stages.errors import DataError

OUTSIDE = {"model": "m" * 16}


def fingerprints(config: ExperimentConfig) -> dict[str, str]:
    selection = dag.select(config, dag.configured(config))
    nodes = dag.plan(config, selection, {key: OUTSIDE[key] for key in selection.outside})
    return {stage: node.fingerprint for stage, node in nodes.items()}


def changed(chain: Chain, *overrides: str) -> set[str]:
    """Stages whose fingerprint an override changes."""
    before, after = fingerprints(chain.config()), fingerprints(chain.config(*overrides))
    return {stage for stage in after if after[stage] != before[stage]}


def test_the_edges_of_a_chain_from_scratch(chain: Chain):
    config = chain.config()
    assert {stage: dag.needs(config, stage) for stage in dag.STAGES} == {
        "prepare": (),
        "pretrain": ("prepare",),
        "sft": ("pretrain",),
        "reward": ("sft",),
        "ppo": ("sft", "reward"),
        "evaluate": ("prepare", "pretrain", "sft", "reward", "ppo"),
    }


def test_with_a_model_path_sft_starts_from_it_and_prepare_and_pretrain_are_absent(chain: Chain):
    config = chain.config("model.path=owner/name", "prepare=null", "pretrain=null")
    assert dag.select(config, dag.configured(config)) == dag.Selection(
        stages=("sft", "reward", "ppo", "evaluate"), outside=("model",)
    )
    assert dag.needs(config, "sft") == ("model",)
    assert dag.needs(config, "evaluate") == ("model", "sft", "reward", "ppo")


def test_with_a_model_path_and_a_pretrain_section_pretraining_is_continued(chain: Chain):
    config = chain.config("model.path=owner/name")
    assert dag.needs(config, "prepare") == ("model",)
    assert dag.needs(config, "pretrain") == ("prepare", "model")
    assert dag.needs(config, "sft") == ("pretrain",)


def test_a_reward_model_from_pretrain_may_run_beside_sft(chain: Chain):
    config = chain.config("reward.init_from=pretrain")
    assert dag.needs(config, "reward") == ("pretrain",)
    assert dag.side_by_side(config, dag.configured(config)) == 2
    assert dag.side_by_side(chain.config(), dag.configured(config)) == 1


def test_changing_kl_coef_changes_exactly_ppo_and_evaluate(chain: Chain):
    assert changed(chain, "ppo.kl_coef=0.2") == {"ppo", "evaluate"}


BEHIND_REWARD = {"reward", "ppo", "evaluate"}
OWN_LENGTH = "reward.normaliser_max_response_tokens=32"
FROM_PRETRAIN = "reward.init_from=pretrain"


@pytest.mark.parametrize(
    ("before", "override", "stages"),
    [
        ((), "ppo.max_response_tokens=40", BEHIND_REWARD),
        ((), "ppo.temperature=0.7", BEHIND_REWARD),
        ((OWN_LENGTH,), "ppo.max_response_tokens=40", {"ppo", "evaluate"}),
        ((OWN_LENGTH,), "ppo.temperature=0.7", BEHIND_REWARD),
        ((), "reward.normaliser_max_response_tokens=24", BEHIND_REWARD),
        ((FROM_PRETRAIN,), "ppo.max_response_tokens=40", {"ppo", "evaluate"}),
        ((FROM_PRETRAIN,), "ppo.temperature=0.7", {"ppo", "evaluate"}),
        ((), OWN_LENGTH, set()),  # what holds anyway
    ],
)
def test_the_reward_stage_follows_what_its_normaliser_is_sampled_by(
    chain: Chain, before: tuple[str, ...], override: str, stages: set[str]
):
    old, new = fingerprints(chain.config(*before)), fingerprints(chain.config(*before, override))
    assert {stage for stage in new if new[stage] != old[stage]} == stages


@pytest.mark.parametrize(
    ("overrides", "max_response_tokens", "temperature"),
    [
        (("ppo.max_response_tokens=48", "ppo.temperature=0.7"), 48, 0.7),
        (("ppo.max_response_tokens=48", "ppo.temperature=0.7", OWN_LENGTH), 32, 0.7),
        (("ppo=null", "evaluate=null"), 32, 1.0),
        (("ppo=null", "evaluate=null", "reward.normaliser_max_response_tokens=24"), 24, 1.0),
    ],
)
def test_the_normaliser_is_sampled_as_ppo_samples(
    chain: Chain, overrides: tuple[str, ...], max_response_tokens: int, temperature: float
):
    settings = dag.settings_for(chain.config(*overrides), "reward")
    assert isinstance(settings, RewardSettings)
    assert settings.normaliser == ResponseSampling(
        max_response_tokens=max_response_tokens, temperature=temperature
    )


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "outputs=elsewhere",
        "resources.ppo.num_cpus=2",
        "rollout.kv_cache_mib=64",
        "sft.checkpoint_every_steps=7",
        "pipeline.executor=ray",
    ],
)
def test_what_cannot_change_the_result_changes_no_fingerprint(chain: Chain, override: str):
    assert changed(chain, override) == set()


def test_the_seed_changes_every_fingerprint(chain: Chain):
    assert changed(chain, "seed=1") == set(dag.STAGES)


def test_a_dataset_counts_by_content_and_not_by_name(chain: Chain):
    before = fingerprints(chain.config())
    (chain.directory / "sft.jsonl").rename(chain.directory / "renamed.jsonl")
    assert fingerprints(chain.config("sft.data.0.path=renamed.jsonl")) == before
    with (chain.directory / "renamed.jsonl").open("a") as file:
        file.write('{"prompt": "two and two", "completion": "four"}\n')
    after = fingerprints(chain.config("sft.data.0.path=renamed.jsonl"))
    assert {stage for stage in after if after[stage] != before[stage]} == {"sft", "reward", "ppo", "evaluate"}


def test_the_scoring_function_counts_by_content(chain: Chain):
    before = fingerprints(chain.config())
    (chain.directory / "score.py").write_text("def score(prompt, response, row):\n    return 0.5\n")
    after = fingerprints(chain.config())
    assert {stage for stage in after if after[stage] != before[stage]} == {"evaluate"}


def test_the_given_model_counts_by_its_fingerprint(chain: Chain):
    config = chain.config("model.path=owner/name", "prepare=null", "pretrain=null")
    selection = dag.select(config, ["sft"])
    one, other = (dag.plan(config, selection, {"model": text})["sft"].fingerprint for text in ("a", "b"))
    assert one != other


def test_a_new_recipe_version_changes_the_fingerprint(chain: Chain, monkeypatch: pytest.MonkeyPatch):
    before = fingerprints(chain.config())
    monkeypatch.setattr(dag, "recipe_version", lambda entry: 2)
    assert not before.items() & fingerprints(chain.config()).items()


def test_a_missing_dataset_is_named(chain: Chain):
    (chain.directory / "score.py").unlink()
    with pytest.raises(DataError, match=r"score\.py: evaluate\.score\.path: No such file"):
        fingerprints(chain.config())


def test_a_stage_that_needs_an_unconfigured_one_says_what_to_add(chain: Chain):
    with pytest.raises(ConfigError, match=r"ppo: no such section, which evaluate needs; add `ppo:`"):
        fingerprints(chain.config("ppo=null"))


def test_until_is_inclusive(chain: Chain):
    assert dag.until(chain.config(), "sft") == ("prepare", "pretrain", "sft")


def test_forcing_a_stage_forces_all_after_it(chain: Chain):
    assert dag.downstream(chain.config(), "reward") == {"reward", "ppo", "evaluate"}


def test_recipe_versions_are_read_without_importing_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "explosive.py").write_text("RECIPE_VERSION = 7\nraise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert dag.recipe_version("explosive:run") == 7


@pytest.mark.parametrize("stage", dag.STAGES.values(), ids=lambda stage: stage.name)
def test_every_entry_of_the_stage_table_is_a_recipe(stage: dag.Stage):
    module, _, function = stage.entry.partition(":")
    recipe = importlib.import_module(module)
    assert callable(getattr(recipe, function))
    assert dag.recipe_version(stage.entry) == recipe.RECIPE_VERSION


def test_a_hub_dataset_is_pinned_to_the_commit_it_means_for_every_process(chain: Chain):
    commit = "c" * 40
    config = chain.config(
        "sft.data.0.path=owner/name", f"sft.data.0.revision={commit}", "sft.data.0.subset=x"
    )
    settings = dag._pinned(dag.settings_for(config, "sft"))
    assert settings.sft.data[0].revision == commit
    assert list(dag._contents(settings)) == [("sft.data.0", "owner/name", f"hub {commit} x train")]
    local = dag.settings_for(chain.config(), "sft")
    assert dag._pinned(local) is local


def test_evaluation_prompts_reach_prepare_unless_it_does_not_look_for_them(chain: Chain):
    sources = [key for key, _ in dag.data_sources(chain.config(), "prepare")]
    assert sources == ["prepare.data.0", "evaluate.prompts.0"]
    assert "prepare" in changed(chain, "evaluate.prompts.0.part=heldout")
    apart = "prepare.decontaminate=false"
    assert [key for key, _ in dag.data_sources(chain.config(apart), "prepare")] == ["prepare.data.0"]
    assert (
        fingerprints(chain.config(apart))["prepare"]
        == (fingerprints(chain.config(apart, "evaluate.prompts.0.part=heldout"))["prepare"])
    )


def test_a_source_of_weight_zero_is_neither_read_nor_part_of_what_is_trained_on(chain: Chain):
    unread = "sft.data=[{path: sft.jsonl}, {path: gone.jsonl, weight: 0}]"
    assert [key for key, _ in dag.data_sources(chain.config(unread), "sft")] == ["sft.data.0"]
    contents = dag._contents(dag.settings_for(chain.config(unread), "sft"))
    assert [content.key for content in contents] == ["sft.data.0"]
