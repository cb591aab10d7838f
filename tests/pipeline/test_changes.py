"""What a run says when its config is not the one it was started with before."""

import pytest
from fake_chain import Chain
from test_cli import complaint, rlhf

from pipeline import changes
from pipeline.changes import ABSENT, Change, compare, listed


def changed(chain: Chain, *overrides: str, before: tuple[str, ...] = ()) -> str:
    return listed(changes.between(chain.config(*before), chain.config(*overrides)))


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, [Change(key="a.c", before=2, now=3)]),
        ({"a": [1, 2]}, {"a": [1]}, [Change(key="a.1", before=2, now=ABSENT)]),
        ({"a": {"b": 1}}, {"a": None}, [Change(key="a", before={"b": 1}, now=None)]),
        ({}, {"a": {"b": 1}}, [Change(key="a", before=ABSENT, now={"b": 1})]),
    ],
)
def test_a_comparison_names_the_outermost_keys_that_differ(before, now, found):
    assert compare(before, now) == found


def test_equal_configs_have_no_change(chain: Chain):
    assert changes.between(chain.config(), chain.config()) == []
    assert changes.reached(chain.config(), chain.config()) == frozenset()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sft.lr=0.002", "sft.lr 0.001 -> 0.002"),
        ("sft.precision=bf16", "sft.precision fp32 -> bf16"),
        ("ppo.dual_clip=3", "ppo.dual_clip null -> 3.0"),
        ("seed=7", "seed 0 -> 7"),
        ("model.layers=2", "model.layers 4 -> 2"),
        ("rollout.engine=hf", "rollout.engine vllm -> hf"),
        ("sft.data.0.weight=2", "sft.data.0.weight 1.0 -> 2.0"),
        ("sft.data.1={path: sft.jsonl}", "sft.data.1 added"),
        ("evaluate.score=null", None),
        ("evaluate=null", "evaluate removed"),
    ],
)
def test_a_setting_that_can_change_a_result_is_a_change(chain: Chain, override: str, line: str | None):
    found = changed(chain, override)
    assert found and line in (found, None)


def test_what_the_normaliser_is_sampled_by_is_named_where_it_changes(chain: Chain):
    line = changed(chain, "ppo.max_response_tokens=40")
    assert line == ("reward.normaliser_max_response_tokens 32 -> 40; ppo.max_response_tokens 32 -> 40")
    assert changed(chain, "reward.normaliser_max_response_tokens=32") == ""
    with_ppo, without = chain.config("ppo.temperature=0.7", "evaluate=null"), chain.config("evaluate=null")
    assert "reward.normaliser_temperature 1.0 -> 0.7" in listed(changes.between(without, with_ppo))
    assert "reward" in changes.reached(without, with_ppo)


@pytest.mark.parametrize(
    "override",
    [
        "outputs=elsewhere",
        "name=other",
        "sft.log_every_steps=3",
        "ppo.checkpoint_every_steps=1",
        "sft.data.0.path=moved.jsonl",
        "rollout.start_timeout_s=5",
        "resources.sft.num_cpus=2",
        "pipeline.lock_timeout_s=9",
    ],
)
def test_paths_intervals_workers_and_deadlines_are_no_change(chain: Chain, override: str):
    assert changed(chain, override) == ""


def test_many_changes_are_counted_after_the_fifth(chain: Chain):
    overrides = [f"ppo.{key}=0.5" for key in ("lr", "value_lr", "gamma", "gae_lambda", "clip_low", "kl_coef")]
    line = changed(chain, *overrides, "seed=1")
    assert line.startswith("seed 0 -> 1; ppo.lr 0.0003 -> 0.5; ") and line.endswith("; and 2 more")
    assert line.count(";") == 5


def test_a_change_reaches_the_stages_after_it_and_no_other(chain: Chain):
    now = chain.config("reward.lr=0.5")
    assert changes.reached(chain.config(), now) == {"reward", "ppo", "evaluate"}
    apart = "prepare.decontaminate=false"
    assert changes.reached(chain.config("evaluate=null", apart), chain.config(apart)) == {"evaluate"}
    everything = changes.reached(chain.config("evaluate=null"), chain.config())
    assert everything > {"prepare", "evaluate"}, "what is evaluated on is kept out of the training text"


def test_a_hostile_value_stays_on_one_printable_line(chain: Chain):
    line = changed(chain, r'evaluate.base_prompt="{prompt}\e[2J\n' + "x" * 500 + '"')
    assert line.startswith(r"evaluate.base_prompt {prompt}\n -> {prompt}\x1b[2J\n")
    assert line.isprintable() and len(line) < 200


def test_a_run_with_a_changed_config_says_so_in_one_line_and_goes_on(chain: Chain, capsys):
    rlhf(capsys, "run", "demo.yaml", "--until", "reward")
    chain.calls()
    code, stdout, stderr = rlhf(capsys, "run", "demo.yaml", "sft.lr=0.002", "--until", "reward")
    assert (code, stderr) == (0, "")
    assert "changed since the last run 'demo': sft.lr 0.001 -> 0.002; anew: sft, reward\n" in stdout
    assert chain.calls() == ["sft", "reward"]
    _, stdout, _ = rlhf(capsys, "run", "demo.yaml", "--until", "reward")  # back: both are still there
    assert "sft.lr 0.002 -> 0.001; anew: no stage\n" in stdout
    assert chain.calls() == []


def test_an_unchanged_run_says_nothing_of_changes(chain: Chain, capsys):
    for _ in range(2):
        assert "changed" not in rlhf(capsys, "run", "demo.yaml", "--until", "sft")[1]


def test_resume_goes_on_with_the_same_settings(chain: Chain, capsys):
    chain.order("sft", error="TrainingStopped")
    assert rlhf(capsys, "run", "demo.yaml")[0] == 5
    chain.order("sft")
    chain.calls()
    assert rlhf(capsys, "run", "demo.yaml", "--resume", "sft.log_every_steps=1")[0] == 0
    assert chain.calls() == ["sft", "reward", "ppo", "evaluate"]


def test_resume_refuses_a_changed_config_before_anything_starts(chain: Chain, capsys):
    rlhf(capsys, "run", "demo.yaml", "--until", "sft")
    kept = (chain.outputs / "runs/demo/config.yaml").read_bytes()
    chain.calls()
    code, stderr = complaint(capsys, "run", "demo.yaml", "--resume", "sft.lr=0.002", "seed=4")
    assert code == 2
    assert "config.yaml): seed 0 -> 4; sft.lr 0.001 -> 0.002; set them back" in stderr
    assert chain.calls() == []
    assert (chain.outputs / "runs/demo/config.yaml").read_bytes() == kept


def test_resume_of_a_run_that_never_started_is_code_2(chain: Chain, capsys):
    code, stderr = complaint(capsys, "run", "demo.yaml", "--resume")
    assert code == 2 and stderr.startswith("--resume: run 'demo' was not started yet")
    assert not chain.outputs.exists()


def test_a_last_config_of_another_version_is_refused_by_resume_and_told_without(chain: Chain, capsys):
    rlhf(capsys, "run", "demo.yaml", "--until", "prepare")
    path = chain.outputs / "runs/demo/config.yaml"
    path.write_text(path.read_text() + "a_setting_of_the_past: 1\n")
    code, stderr = complaint(capsys, "run", "demo.yaml", "--resume")
    assert code == 2 and "a_setting_of_the_past" in stderr
    code, stdout, _ = rlhf(capsys, "run", "demo.yaml", "--until", "prepare")
    assert code == 0 and "the config of the last run cannot be compared" in stdout
