"""The graph: which edges a config has, and which part of it some targets need."""

import pytest
from fake_chain import Chain

from pipeline import dag
from pipeline.errors import ConfigError
from pipeline.stage_table import STAGES


def test_the_edges_of_a_chain_from_scratch(chain: Chain):
    config = chain.config()
    assert {stage: dag.needs(config, stage) for stage in STAGES} == {
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


def test_a_stage_that_needs_an_unconfigured_one_says_what_to_add(chain: Chain):
    config = chain.config("sft=null")
    with pytest.raises(ConfigError, match=r"sft: no such section, which reward needs; add `sft:`"):
        dag.select(config, dag.configured(config))


def test_until_is_inclusive(chain: Chain):
    assert dag.until(chain.config(), "sft") == ("prepare", "pretrain", "sft")


def test_forcing_a_stage_forces_all_after_it(chain: Chain):
    assert dag.downstream(chain.config(), "reward") == {"reward", "ppo", "evaluate"}


@pytest.mark.parametrize(
    ("absent", "needs"),
    [
        (("ppo",), ("prepare", "pretrain", "sft", "reward")),
        (("reward", "ppo"), ("prepare", "pretrain", "sft")),
        (("sft", "reward", "ppo"), ("prepare", "pretrain")),
        (("prepare",), ("pretrain", "sft", "reward", "ppo")),
    ],
)
def test_evaluate_takes_whatever_of_the_chain_there_is(
    chain: Chain, absent: tuple[str, ...], needs: tuple[str, ...]
):
    assert dag.needs(chain.config(*(f"{stage}=null" for stage in absent)), "evaluate") == needs


def test_evaluate_takes_what_is_given_although_no_section_makes_it(chain: Chain):
    config = chain.config("prepare=null", "pretrain=null", "sft=null", "reward=null", "ppo=null")
    assert dag.needs(config, "evaluate") == ()
    assert dag.needs(config, "evaluate", given=["ppo", "reward"]) == ("reward", "ppo")
    assert dag.select(config, ["evaluate"], given=["ppo", "reward"]).outside == ("reward", "ppo")


def test_a_ppo_without_a_reward_stage_is_planned(chain: Chain):
    config = chain.config("reward=null")
    assert dag.needs(config, "ppo") == ("sft",)
    selection = dag.select(config, dag.configured(config))
    assert selection.stages == ("prepare", "pretrain", "sft", "ppo", "evaluate")
    assert dag.levels(config, selection.stages)[-2:] == [("ppo",), ("evaluate",)]


def test_a_ppo_without_a_reward_stage_is_not_run(chain: Chain):
    config = chain.config("reward=null")
    with pytest.raises(
        ConfigError, match=r"^reward: no such section, which ppo needs; add `reward:`, or give"
    ):
        dag.check_can_run(config, dag.configured(config))
    dag.check_can_run(config, dag.until(config, "sft"))
    dag.check_can_run(config, ["ppo"], given=["reward"])


def test_an_evaluation_of_no_model_is_not_run(chain: Chain):
    config = chain.config("prepare=null", "pretrain=null", "sft=null", "ppo=null")
    with pytest.raises(ConfigError, match=r"^sft: no such section, which evaluate needs"):
        dag.check_can_run(config, ["evaluate"])
    dag.check_can_run(config, ["evaluate"], given=["ppo"])


def test_ppo_without_sft_tunes_the_model_that_the_chain_starts_from(chain: Chain):
    config = chain.config("sft=null", "reward.init_from=pretrain")
    assert dag.needs(config, "ppo") == ("pretrain", "reward")
    given = chain.config("sft=null", "reward.init_from=pretrain", "pretrain=null", "model.path=owner/name")
    assert dag.needs(given, "ppo") == ("model", "reward")
    assert dag.needs(given, "ppo", given=["sft"]) == ("sft", "reward")
