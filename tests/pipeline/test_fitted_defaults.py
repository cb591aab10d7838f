"""What a silent config gets where a model is given: the field's numbers, fitted to size and device."""

import io
import json
import struct
from pathlib import Path

import pytest
from fake_chain import Chain, write_model
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cli
from pipeline.architecture import Architecture
from pipeline.changes import identity_of
from pipeline.config import ConfigError, json_schema, load
from pipeline.config_fields import field_at
from pipeline.executor import execute
from pipeline.experiment import ExperimentConfig
from pipeline.fitted_defaults import LEARNING_RATES, Fit, fit, high_rates, learning_rate
from pipeline.given_model import GivenModel
from pipeline.planning import PlannedRun, fitted_to_what_is_here, plan_run, plan_stage
from pipeline.progress import Progress
from pipeline.unstated import MATTER, fitted_line, table, unstated
from stages.config.training import FITTED

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
GPT2_LIKE = {"n_embd": 768, "n_layer": 12}
ON_GPUS = tuple(f"resources.{stage}.num_gpus=1" for stage in ("pretrain", "sft", "reward", "ppo"))
RATES = tuple(LEARNING_RATES)


def given_model(directory: Path, sizes: dict[str, object], num_elements: int = 0) -> Path:
    """A model directory with this config.json, and a tensor of so many elements if any."""
    write_model(directory)
    (directory / "config.json").write_text(json.dumps(sizes))
    if num_elements:
        entry = {"dtype": "F4", "shape": [num_elements], "data_offsets": [0, num_elements // 2]}
        header = json.dumps({"w": entry}).encode()
        with (directory / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + num_elements // 2)  # a hole: nothing is written
    return directory


def values(config: ExperimentConfig, *keys: str) -> list[object]:
    found = []
    for key in keys:
        stage, _, name = key.partition(".")
        found.append(getattr(getattr(config, stage), name))
    return found


def fitted(chain: Chain, sizes: dict[str, object], *overrides: str) -> Fit:
    if not (chain.directory / "given").is_dir():
        given_model(chain.directory / "given", sizes)
    return fitted_to_what_is_here(chain.config("model.path=./given", *overrides))


def planned_alone(chain: Chain, stage: str, *overrides: str, **inputs: Path) -> PlannedRun:
    config = chain.config(*overrides)
    return plan_stage(config, stage, inputs=inputs, force=False, command=lambda missing: f"rlhf {missing}")


@pytest.mark.parametrize(
    ("num_parameters", "rates"),
    [
        (None, [5e-5, 2e-5, 1e-5, 1e-6, 1e-5]),
        (70_000_000_000, [5e-5, 2e-5, 1e-5, 1e-6, 1e-5]),
        (7_241_732_096, [5e-5, 2e-5, 1e-5, 1e-6, 1e-5]),
        (1_000_000_000, [5e-5, 2e-5, 1e-5, 1e-6, 1e-5]),
        (494_032_768, [7.1e-5, 2.8e-5, 1.4e-5, 1.4e-6, 1.4e-5]),
        (134_515_008, [1.4e-4, 5.5e-5, 2.7e-5, 2.7e-6, 2.7e-5]),
        (1_000_000, [1.6e-3, 6.3e-4, 3.2e-4, 3.2e-5, 3.2e-4]),
        (1_000, [2e-3, 1e-3, 1e-3, 3e-4, 1e-3]),
    ],
)
def test_learning_rates_are_the_fields_from_1b_on_and_grow_with_the_root_below(num_parameters, rates):
    found = [learning_rate(key, num_parameters, at_most=_from_scratch(key)) for key in RATES]
    assert found == pytest.approx(rates, rel=1e-9)


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.sampled_from(RATES))
def test_a_larger_model_never_gets_a_larger_rate_and_none_more_than_from_scratch(first, second, key):
    small, large = sorted((first, second))
    rates = [learning_rate(key, size, at_most=_from_scratch(key)) for size in (small, large)]
    assert _from_scratch(key) >= rates[0] >= rates[1] >= LEARNING_RATES[key]


def _from_scratch(key: str) -> float:
    field = field_at(tuple(key.split(".")))
    assert field is not None
    return float(field.default)


@pytest.mark.parametrize("key", [f"{stage}.{name}" for stage in ("sft", "reward", "ppo") for name in FITTED])
def test_every_fitted_setting_that_is_there_is_chosen_and_no_other(chain: Chain, key: str):
    chosen = {choice.key for choice in fitted(chain, SMOLLM2_135M).choices}
    assert (key in chosen) == (field_at(tuple(key.split("."))) is not None)


@pytest.mark.parametrize(
    ("sizes", "overrides", "expected"),
    [
        (SMOLLM2_135M, (), ["fp32", 2, False]),
        (SMOLLM2_135M, ("model.context_length=2048",), ["fp32", 1, True]),
        (SMOLLM2_135M, (*ON_GPUS, "model.context_length=2048"), ["bf16", 2, False]),
        (SMOLLM2_135M, ("sft.batch_size=2",), ["fp32", 2, False]),  # never more than the batch
        (TINY, ("sft.batch_size=1",), ["fp32", 1, False]),
        (GPT2_LIKE, ("sft.batch_size=1",), ["fp32", 1, True]),
        (LLAMA_8B, (*ON_GPUS, "model.context_length=2048"), ["bf16", 2, True]),
        (LLAMA_8B, (*ON_GPUS, "model.context_length=2048", "sft.micro_batch_size=1"), ["bf16", 1, True]),
        (LLAMA_8B, (*ON_GPUS, "model.context_length=2048", "sft.gradient_checkpointing=false"),
         ["bf16", 1, False]),
        (LLAMA_8B, (*ON_GPUS, "sft.precision=fp32"), ["fp32", 2, False]),
        (TINY, (), ["fp32", 16, False]),
        (TINY, ON_GPUS, ["fp32", 16, False]),
        (GPT2_LIKE, (), ["fp32", 1, True]),  # no tensor tells its size either
    ],
)  # fmt: skip
def test_precision_micro_batch_and_recomputation_follow_from_size_context_and_device(
    chain: Chain, sizes, overrides, expected
):
    config = fitted(chain, sizes, *overrides).config
    assert values(config, "sft.precision", "sft.micro_batch_size", "sft.gradient_checkpointing") == expected


def test_a_stated_value_is_never_changed(chain: Chain):
    stated = {"sft.lr": 0.5, "reward.micro_batch_size": 3, "ppo.value_lr": 0.25, "ppo.precision": "bf16"}
    found = fitted(chain, LLAMA_8B, *(f"{key}={value}" for key, value in stated.items()))
    assert values(found.config, *stated) == list(stated.values())
    assert not stated.keys() & {choice.key for choice in found.choices}


def test_a_value_equal_to_the_default_from_scratch_is_stated_all_the_same(chain: Chain):
    assert fitted(chain, LLAMA_8B, "sft.lr=1e-3").config.sft.lr == 1e-3


def test_null_is_silence_and_takes_back_what_a_base_states(chain: Chain):
    (chain.directory / "base.yaml").write_text((chain.directory / "demo.yaml").read_text())
    text = "base: base.yaml\nmodel: {path: ./given}\nsft: {lr: null, micro_batch_size: ~}\nppo: {lr: 0.5}\n"
    (chain.directory / "demo.yaml").write_text(text)
    config = fitted(chain, LLAMA_8B, "ppo.lr=null", "reward.precision=null").config
    assert values(config, "sft.lr", "ppo.lr", "sft.micro_batch_size") == [2e-5, 1e-6, 2]
    with pytest.raises(ConfigError, match=r"sft\.batch_size: must be a whole number"):
        chain.config("sft.batch_size=null")


def test_editors_are_told_that_null_is_allowed():
    settings = json_schema()["$defs"]["PPOConfig"]["properties"]
    for name in FITTED:
        assert {"type": "null"} in settings[name]["anyOf"] and settings[name]["description"], name
    assert "anyOf" not in settings["batch_size"]


def test_null_from_scratch_is_the_default(chain: Chain):
    assert chain.config("sft.lr=null", "sft.micro_batch_size=null") == chain.config()


def test_continued_pretraining_starts_as_low_as_its_model_needs(chain: Chain):
    assert fitted(chain, LLAMA_8B).config.pretrain.lr == 5e-5
    assert chain.config().pretrain.lr == 2e-3


def test_a_chain_from_scratch_is_left_as_it_is(chain: Chain):
    config = chain.config("reward.init_from=pretrain")
    found = fitted_to_what_is_here(config)
    assert found == Fit(config=config, model=None, choices=())
    assert plan_run(config).config == config


@pytest.mark.parametrize("sizes", [TINY, LLAMA_8B, GPT2_LIKE], ids=["tiny", "8b", "gpt2"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_states_all_that_its_fingerprints_cover(path: Path, sizes, tmp_path: Path):
    config, file = load(path).config, tmp_path / "config.json"
    file.write_text(json.dumps(sizes))
    model = GivenModel.described_in(file, named="x")
    assert identity_of(fit(config, model).config) == identity_of(config)


def test_where_nothing_fits_the_least_is_taken_and_the_reason_says_so(chain: Chain):
    choices = {choice.key: choice for choice in fitted(chain, LLAMA_8B, "model.context_length=8192").choices}
    assert choices["reward.micro_batch_size"].value == 1
    assert choices["reward.gradient_checkpointing"].value is True
    assert choices["reward.micro_batch_size"].why.startswith("no less is possible: 14.")


def test_fitting_twice_changes_nothing(chain: Chain):
    once = fitted(chain, SMOLLM2_135M)
    again = fit(once.config, once.model)
    assert (again.config, again.choices) == (once.config, ())


def test_hf_engines_keep_ppo_in_fp32(chain: Chain):
    config = fitted(chain, LLAMA_8B, *ON_GPUS, "rollout.engine=hf").config
    assert values(config, "sft.precision", "ppo.precision") == ["bf16", "fp32"]


def test_ppo_gets_a_micro_batch_that_divides_its_batch(chain: Chain):
    ppo = fitted(chain, TINY, "ppo.batch_size=24", "ppo.num_prompts=24").config.ppo
    assert (ppo.micro_batch_size, ppo.pack_size) == (8, 8)
    with pytest.raises(ConfigError, match=r"ppo\.batch_size: 24 is not a multiple of micro_batch_size 16"):
        chain.config("ppo.batch_size=24")


def test_with_a_token_budget_the_micro_batch_is_not_read_and_so_not_chosen(chain: Chain):
    found = fitted(chain, LLAMA_8B, "sft.batch_tokens=1024")
    assert "sft.micro_batch_size" not in {choice.key for choice in found.choices}


def test_with_a_token_budget_a_reason_counts_rows(chain: Chain):
    found = fitted(chain, LLAMA_8B, "sft.batch_tokens=4096", "model.context_length=4096")
    reasons = {choice.key: choice.why for choice in found.choices}
    assert reasons["sft.gradient_checkpointing"].startswith("without it, a row at once would hold ")
    assert reasons["reward.gradient_checkpointing"].startswith("without it, 1 at once would hold ")


# --- the size


def test_a_family_with_other_names_is_counted_by_its_weights(tmp_path: Path):
    directory = given_model(tmp_path / "gpt2", GPT2_LIKE, num_elements=124_000_000)
    model = GivenModel.in_directory(directory, named="x")
    assert (model.num_parameters, model.architecture) == (124_000_000, None)
    assert model.size == "124M parameters"


def test_a_config_json_goes_before_the_weights(tmp_path: Path):
    model = GivenModel.in_directory(given_model(tmp_path / "m", SMOLLM2_135M, 1000), named="x")
    assert model.num_parameters == 134_515_008 and model.num_positions == 8192


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hidden_size": "wide"}', "[" * 10_000])
def test_a_config_json_that_tells_nothing_leaves_the_size_open(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    model = GivenModel.described_in(tmp_path / "config.json", named="x")
    assert (model.num_parameters, model.num_positions, model.size) == (None, None, "of unknown size")


def test_a_hub_model_that_is_not_here_is_judged_by_the_config_json_that_is_given(chain: Chain):
    (chain.directory / "architecture.json").write_text(json.dumps(SMOLLM2_135M))
    config = chain.config("model.path=nobody/nothing-here")
    assert fitted_to_what_is_here(config).config.sft.lr == 2e-5, "nothing tells its size"
    described = chain.config("model.path=nobody/nothing-here", "model.architecture=architecture.json")
    found = fitted_to_what_is_here(described)
    assert found.config.sft.lr == 5.5e-5
    assert found.model.architecture == Architecture.from_file(chain.directory / "architecture.json")


# --- where it counts


def test_the_fitted_values_are_what_the_stage_gets_and_the_run_records(chain: Chain):
    given_model(chain.directory / "given", SMOLLM2_135M)
    planned = plan_run(chain.config("model.path=./given"))
    execute(planned, Progress(io.StringIO()))
    settings = planned.nodes["sft"].settings
    recorded = load(chain.outputs / "runs/demo/config.yaml").config
    manifest = json.loads((chain.outputs / "runs/demo/sft/manifest.json").read_text())
    for section in (settings.sft, recorded.sft):
        assert (section.lr, section.micro_batch_size) == (5.5e-5, 2)
    assert manifest["settings"]["sft"]["lr"] == 5.5e-5
    assert plan_run(recorded).to_run == (), "the recorded config is the same run"
    stated = chain.config("model.path=./given", "sft.lr=5.5e-5", "sft.precision=fp32")
    assert plan_run(stated).to_run == (), "stating what was fitted changes nothing"
    assert "sft" in plan_run(chain.config("model.path=./given", "sft.lr=1e-3")).to_run


def test_a_stage_alone_is_fitted_as_within_the_graph(chain: Chain):
    given_model(chain.directory / "given", SMOLLM2_135M)
    whole = plan_run(chain.config("model.path=./given"))
    execute(whole, Progress(io.StringIO()))
    alone = planned_alone(chain, "reward", "model.path=./given")
    assert alone.to_run == () and alone.nodes["reward"] == whole.nodes["reward"]
    on_input = planned_alone(chain, "reward", "model.path=./given", sft=chain.outputs / "runs/demo/sft")
    assert on_input.nodes["reward"].fingerprint == whole.nodes["reward"].fingerprint


def test_somebody_elses_model_as_an_input_is_a_given_model_too(chain: Chain):
    mine = given_model(chain.directory / "mine", SMOLLM2_135M)
    assert planned_alone(chain, "reward", sft=mine).config.reward.lr == 2.7e-5
    execute(plan_run(chain.config(), last="sft"), Progress(io.StringIO()))
    ours = planned_alone(chain, "reward", sft=chain.outputs / "runs/demo/sft")
    assert ours.config.reward.lr == 1e-3, "an artifact of a chain from scratch"


def test_a_model_that_is_only_compared_fits_nothing(chain: Chain):
    mine = given_model(chain.directory / "mine", SMOLLM2_135M)
    execute(plan_run(chain.config(), last="reward"), Progress(io.StringIO()))
    compared = planned_alone(chain, "evaluate", ppo=mine)
    assert compared.to_run == ("evaluate",) and {"sft", "reward"} <= compared.present.keys()
    assert (compared.config.sft.lr, compared.config.reward.lr) == (1e-3, 1e-3)
    assert compared.fit.choices == ()
    trained = planned_alone(chain, "reward", "reward.init_from=pretrain", pretrain=mine)
    assert trained.config.reward.lr == 2.7e-5


# --- what is said of it


def test_every_setting_of_the_table_exists():
    assert [
        f"{name}.{key}" for name, keys in MATTER.items() for key in keys if field_at((name, key)) is None
    ] == []
    assert all(name in MATTER[stage] for stage, _, name in (key.partition(".") for key in RATES))


def test_the_table_has_every_silent_setting_with_its_value_and_reason_and_no_stated_one(chain: Chain):
    config = chain.config("model.path=./given", "sft.batch_size=8", "sft.lr=null")
    found = fitted(chain, SMOLLM2_135M, "sft.batch_size=8", "sft.lr=null")
    rows = {row.key: (row.value, row.why) for row in unstated(config, found)}
    assert rows["sft.lr"] == (5.5e-5, "2e-05 x sqrt(1 B / parameters)")
    assert rows["sft.precision"] == ("fp32", "on the CPU (resources.sft.num_gpus is 0)")
    assert rows["ppo.temperature"][0] == 1.0 and rows["ppo.temperature"][1].startswith("default: Sampling")
    assert rows["model.context_length"][1].endswith("the model was made for up to 8192")
    assert "sft.batch_size" not in rows and "sft.max_steps" not in rows, "stated"
    assert "model.layers" not in rows, "of a model from scratch"


def test_the_table_of_a_chain_from_scratch_says_default(chain: Chain):
    config = chain.config()
    rows = {row.key: row for row in unstated(config, fitted_to_what_is_here(config))}
    assert (rows["sft.lr"].value, rows["model.layers"].value, rows["prepare.vocab_size"].value) == (
        1e-3,
        4,
        512,
    )
    assert all(row.why.startswith("default") for row in rows.values())
    assert not [line for line in table(config, fitted_to_what_is_here(config)) if not line.isprintable()]


def test_check_prints_the_table_and_a_run_says_what_it_fitted(chain: Chain, capsys, monkeypatch):
    given_model(chain.directory / "given", SMOLLM2_135M)
    monkeypatch.setattr("pipeline.planning.check_given_models", lambda *_: None)  # the weights are none
    monkeypatch.setattr("pipeline.cli.previews", lambda *_, **__: iter(()))
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "demo.yaml", "model.path=./given"])
    assert ended.value.code == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "ppo.value_lr 2.7e-05 1e-05 x sqrt(1 B / parameters)" in lines
    assert any("activations of 1024 tokens" in line for line in lines), "4 sequences of 256: the fitted ones"
    line = fitted_line(plan_run(chain.config("model.path=./given")).fit)
    assert line is not None and line.startswith(
        f"not stated, so fitted to model.path {chain.directory}/given (134.5M parameters): "
    )
    assert "sft.lr 5.5e-05" in line
    assert fitted_line(plan_run(chain.config()).fit) is None


@pytest.mark.parametrize(
    ("sizes", "overrides", "keys"),
    [
        (LLAMA_8B, (), []),
        (LLAMA_8B, ("sft.lr=9e-5", "ppo.lr=4e-6"), []),  # within reason
        (LLAMA_8B, ("sft.lr=1.1e-4",), ["sft.lr"]),
        (LLAMA_8B, ("ppo.value_lr=1e-3", "pretrain.lr=2e-3"), ["pretrain.lr", "ppo.value_lr"]),
        (LLAMA_8B, ("sft=null",), []),
        (SMOLLM2_135M, ("sft.lr=1.1e-4",), []),
        (TINY, ("sft.lr=1e-3",), []),
    ],
)
def test_a_stated_rate_far_above_what_the_model_would_get_is_remarked_upon(
    chain: Chain, sizes, overrides, keys
):
    assert [key for key, _ in high_rates(fitted(chain, sizes, *overrides))] == keys


def test_from_scratch_no_rate_is_too_high():
    assert [*high_rates(Fit(config=load(CONFIGS[0]).config, model=None, choices=()))] == []


def test_check_and_run_say_where_a_rate_far_too_high_is_stated(chain: Chain, capsys, monkeypatch):
    given_model(chain.directory / "given", SMOLLM2_135M)
    monkeypatch.setattr("pipeline.planning.check_given_models", lambda *_: None)  # the weights are none
    monkeypatch.setattr("pipeline.cli.previews", lambda *_, **__: iter(()))
    stated = (chain.directory / "demo.yaml").read_text().replace("sft: {", "sft: {lr: 1e-3, ")
    (chain.directory / "demo.yaml").write_text(stated)
    (chain.directory / "mine.yaml").write_text(
        "base: demo.yaml\nmodel: {path: ./given}\nprepare: null\npretrain: null\n"
    )
    note = (
        f"note: demo.yaml:4: sft.lr: 0.001 is 18 times the 5.5e-05 that model.path {chain.directory}/given "
        "(134.5M parameters) would get; null leaves it open"
    )
    for command, times in (("check", 1), ("run", 1), ("run", 0)):  # the second run trains nothing
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "mine.yaml"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.splitlines().count(note) == times, command


def test_nodes_of_a_plan_hold_no_setting_that_is_still_open(chain: Chain):
    given_model(chain.directory / "given", SMOLLM2_135M)
    for stage, node in plan_run(chain.config("model.path=./given")).nodes.items():
        section = getattr(node.settings, stage)
        open_ = [name for name in FITTED if name in type(section).model_fields]
        assert set(open_) <= section.model_fields_set, stage
