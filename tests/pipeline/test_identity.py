"""What names an artifact: which changes of a config reach which stages, and which reach none."""

import os
from pathlib import Path

import pytest
from fake_chain import Chain

from pipeline import config as configs
from pipeline import dag, identity
from pipeline.experiment import ExperimentConfig
from pipeline.stage_table import STAGES
from stages.config.reward import RewardSettings
from stages.config.sampling import ResponseSampling
from stages.data.reading import readers
from stages.errors import DataError

CONFIGS = Path(__file__).parents[2] / "configs"
OUTSIDE = {"model": "m" * 16}
SINCE_NOVEMBER_2026 = {
    "prepare": "5dd43875368534aa",
    "pretrain": "3c1acac57c0f859f",
    "sft": "973a549d1ca84b33",
    "reward": "7cd45b716542b584",
    "ppo": "c1e6e6a2f58d5801",
    "evaluate": "505d66a291bd87d9",
}
"""Of configs/demo.yaml. A new RECIPE_VERSION or other data change them from their stage on; else nothing."""


def fingerprints(config: ExperimentConfig) -> dict[str, str]:
    selection = dag.select(config, dag.configured(config))
    nodes = identity.plan(config, selection, {key: OUTSIDE[key] for key in selection.outside})
    return {stage: node.fingerprint for stage, node in nodes.items()}


def changed(chain: Chain, *overrides: str) -> set[str]:
    """Stages whose fingerprint an override changes."""
    before, after = fingerprints(chain.config()), fingerprints(chain.config(*overrides))
    return {stage for stage in after if after[stage] != before[stage]}


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
    settings = chain.config(*overrides).settings_of("reward")
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
    assert changed(chain, "seed=1") == set(STAGES)


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
    one, other = (identity.plan(config, selection, {"model": text})["sft"].fingerprint for text in ("a", "b"))
    assert one != other


def test_a_new_recipe_version_changes_the_fingerprint(chain: Chain, monkeypatch: pytest.MonkeyPatch):
    before = fingerprints(chain.config())
    monkeypatch.setattr(identity, "recipe_version", lambda entry: 2)
    assert not before.items() & fingerprints(chain.config()).items()


def test_a_missing_dataset_is_named(chain: Chain):
    (chain.directory / "score.py").unlink()
    with pytest.raises(DataError, match=r"score\.py: evaluate\.score\.path: No such file"):
        fingerprints(chain.config())


def test_recipe_versions_are_read_without_importing_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "explosive.py").write_text("RECIPE_VERSION = 7\nraise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert identity.recipe_version("explosive:run") == 7


def test_a_hub_dataset_is_pinned_to_the_commit_it_means_for_every_process(chain: Chain):
    commit = "c" * 40
    config = chain.config(
        "sft.data.0.path=owner/name", f"sft.data.0.revision={commit}", "sft.data.0.subset=x"
    )
    settings = identity._pinned(config.settings_of("sft"))
    assert settings.sft.data[0].revision == commit
    (content,) = identity._contents(settings)
    assert (content.key, content.path, content.files) == ("sft.data.0", "owner/name", ())
    assert content.digest() == f"hub {commit} x train"
    local = chain.config().settings_of("sft")
    assert identity._pinned(local) is local


def test_evaluation_prompts_reach_prepare_unless_it_does_not_look_for_them(chain: Chain):
    sources = [key for key, _ in identity.data_sources(chain.config(), "prepare")]
    assert sources == ["prepare.data.0", "evaluate.prompts.0"]
    assert "prepare" in changed(chain, "evaluate.prompts.0.part=heldout")
    apart = "prepare.decontaminate=false"
    assert [key for key, _ in identity.data_sources(chain.config(apart), "prepare")] == ["prepare.data.0"]
    assert (
        fingerprints(chain.config(apart))["prepare"]
        == (fingerprints(chain.config(apart, "evaluate.prompts.0.part=heldout"))["prepare"])
    )


def test_a_source_of_weight_zero_is_neither_read_nor_part_of_what_is_trained_on(chain: Chain):
    unread = "sft.data=[{path: sft.jsonl}, {path: gone.jsonl, weight: 0}]"
    assert [key for key, _ in identity.data_sources(chain.config(unread), "sft")] == ["sft.data.0"]
    contents = identity._contents(chain.config(unread).settings_of("sft"))
    assert [content.key for content in contents] == ["sft.data.0"]


def test_the_demo_keeps_its_fingerprints():
    assert fingerprints(configs.load(CONFIGS / "demo.yaml").config) == SINCE_NOVEMBER_2026


def test_a_chain_with_a_given_model_keeps_its_fingerprints():
    found = fingerprints(configs.load(CONFIGS / "qwen_gsm8k_gpu.yaml").config)
    assert found == {
        "sft": "dce5e3a60b31a9c2",
        "reward": "62b68c11e4c0d7de",
        "ppo": "95c13edd20f7c5f3",
        "evaluate": "8d426bfc69e65977",
    }


def test_an_evaluation_without_ppo_has_a_fingerprint_of_its_own(chain: Chain):
    whole, part = fingerprints(chain.config()), fingerprints(chain.config("ppo=null"))
    assert part["sft"] == whole["sft"] and part["evaluate"] != whole["evaluate"]


def test_the_graph_plans_a_ppo_without_a_reward_stage(chain: Chain):
    config = chain.config("reward=null")
    nodes = identity.plan(config, dag.select(config, dag.configured(config)), {})
    assert nodes["ppo"].inputs == {"sft": nodes["sft"].fingerprint}


@pytest.mark.parametrize("trusting_stamps", [False, True])
def test_a_file_that_nobody_touched_since_the_plan_is_read_again_only_where_every_byte_is_asked_for(
    chain: Chain, monkeypatch, trusting_stamps
):
    config = chain.config()
    node = identity.plan(config, dag.select(config, dag.configured(config)), {})["sft"]
    read = []
    digest = readers.file_digest

    def remember(path, *part):
        read.append(path.name)
        return digest(path, *part)

    monkeypatch.setattr(readers, "file_digest", remember)
    identity.check_contents(node, trusting_stamps=trusting_stamps)
    assert read == ([] if trusting_stamps else ["sft.jsonl"])


@pytest.mark.parametrize("trusting_stamps", [False, True])
def test_a_file_of_other_bytes_is_found_also_with_the_size_and_the_time_it_had(chain: Chain, trusting_stamps):
    config = chain.config()
    node = identity.plan(config, dag.select(config, dag.configured(config)), {})["sft"]
    file = chain.directory / "sft.jsonl"
    stamp = file.stat()
    file.write_text(file.read_text()[::-1])
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(DataError, match=r"sft\.jsonl: sft\.data\.0: changed since the run was planned"):
        identity.check_contents(node, trusting_stamps=trusting_stamps)
