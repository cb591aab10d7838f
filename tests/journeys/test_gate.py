"""The gate in whole PPO runs: engines that lag, and batches that engine and trainer do not agree about, end
the run before it learns from them.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from forks import ENGINES
from inline import run_recipe, runtime_in
from ppo_inputs import killed_in_step, ppo_inputs, with_turn
from wrong_engines import LaggingEngine, SkewedEngine

from rollout import engines
from rollout.config import EngineConfig
from rollout.errors import ParityError
from stages.config.data import DataSource
from stages.config.model import ModelConfig
from stages.config.ppo import PPOConfig, PPOSettings
from stages.rl.journal import Journal
from stages.rl.publish import Publisher
from stages.rl.source import RolloutSource
from stages.rl.update import Learner
from stages.training.metrics import read_steps

CONFIG = {
    "max_steps": 6,
    "num_prompts": 8,
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_response_tokens": 6,
    "num_epochs": 1,
    "lr": 3e-5,  # an engine of four steps ago is within both limits of the log-probs in bf16
    "lr_schedule": "constant",
    "warmup_frac": 0.0,
    "checkpoint_every_steps": 1,
}
HELD_BACK = (
    r"after the sync of weight version {}, which reported no error, the engine does not hold the trainer's"
)


@pytest.fixture(scope="module")
def inputs(tied_model_dir, tmp_path_factory):
    return ppo_inputs(tied_model_dir, tmp_path_factory.mktemp("reward"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ["the cat", "a dog", "two and three", "please say", "the house", "red mat", "ran to", "sat on"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def opened_as(monkeypatch):
    """opened_as(wrap): every engine that is opened from now on is `wrap(engine)`."""
    open_engine = engines.open_engine

    def opened_as(wrap):
        async def opened(*arguments, **named):
            return wrap(await open_engine(*arguments, **named))

        monkeypatch.setattr("stages.engines.open_engine", opened)

    return opened_as


def settings_for(prompts: Path, *, rollout=None, **changes) -> PPOSettings:
    engine = {"engine": "hf", "parity_num_prompts": 2, "parity_max_tokens": 4, **(rollout or {})}
    return PPOSettings(
        seed=3,
        model=ModelConfig(context_length=64),
        ppo=PPOConfig(data=[DataSource(path=str(prompts))], **{**CONFIG, **changes}),
        rollout=EngineConfig(**engine),
    )


def run_in(directory: Path, settings: PPOSettings, inputs):
    metrics = run_recipe(settings, inputs, directory / "out", runtime_in(directory, "ppo"))
    return metrics, blake3((directory / "out" / "model.safetensors").read_bytes()).hexdigest()


def lines_of(directory: Path):
    return read_steps(directory / "work" / "metrics.jsonl")


def kept_in(directory: Path, **how):
    directory.mkdir(exist_ok=True)
    return lambda engine: LaggingEngine(engine, directory=directory, **how)


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_an_engine_that_lags_in_bf16_is_stopped_after_the_first_update(
    inputs, prompts, tmp_path, opened_as, lag
):
    opened_as(kept_in(tmp_path / "kept", lag=lag))
    with pytest.raises(ParityError, match=HELD_BACK.format(1) + r" \S+\.weight; "):
        run_in(tmp_path, settings_for(prompts, precision="bf16"), inputs)
    assert lines_of(tmp_path) == [], "the update on what it sampled next is not taken"


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_an_engine_that_begins_to_lag_is_stopped_by_the_next_comparison_where_log_probs_do_not_tell(
    inputs, prompts, tmp_path, opened_as, lag
):
    """It keeps up for two updates (versions 0 and 1); the sixth sync is that of version 5."""
    opened_as(kept_in(tmp_path / "kept", lag=lag, keeps_up=2))
    settings = settings_for(prompts, precision="bf16", rollout={"compare_tensors_every_syncs": 6})
    with pytest.raises(ParityError, match=HELD_BACK.format(5)):
        run_in(tmp_path, settings, inputs)
    lines = lines_of(tmp_path)
    assert [line["sync/version"] for line in lines] == [1.0, 2.0, 3.0, 4.0]
    assert ["sync/comparison_seconds" in line for line in lines] == [True, False, False, False]
    limit = math.log(settings.rollout.parity_max_mean_ratio)
    for line in lines:
        assert 0 < line["rollout/engine_mean_abs_diff"] < limit
        assert 0 < line["sync/parity_mean_abs_diff"] < limit


def test_while_only_the_value_model_learns_there_is_nothing_to_compare(inputs, prompts, tmp_path, opened_as):
    """The policy's first update is the third of the run."""
    opened_as(kept_in(tmp_path / "kept", lag=1))
    with pytest.raises(ParityError, match=HELD_BACK.format(3)):
        run_in(tmp_path, settings_for(prompts, precision="bf16", value_warmup_steps=2), inputs)
    assert not any("sync/comparison_seconds" in line for line in lines_of(tmp_path))


def test_a_resumed_run_compares_before_its_first_batch_for_its_engines_start_from_sft(
    inputs, prompts, tmp_path, opened_as, monkeypatch
):
    settings = settings_for(prompts, precision="bf16")
    run_killed_in_step(2, tmp_path, settings, inputs, monkeypatch)
    opened_as(kept_in(tmp_path / "kept", lag=1))
    with pytest.raises(ParityError, match=HELD_BACK.format(2)):
        run_in(tmp_path, settings, inputs)


@pytest.mark.engine
@pytest.mark.parametrize("lag", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_vllm_engine_that_lags_in_bf16_is_stopped_after_the_first_update(
    inputs, prompts, tmp_path, opened_as, lag
):
    opened_as(kept_in(tmp_path / "kept", lag=lag))
    vllm = {"engine": "vllm", "kv_cache_mib": 64, "max_num_seqs": 16}
    with ENGINES.forking(), pytest.raises(ParityError, match=HELD_BACK.format(1)):
        run_in(tmp_path, settings_for(prompts, precision="bf16", rollout=vllm), inputs)


def test_an_engine_that_keeps_up_is_compared_and_passes(inputs, prompts, tmp_path):
    settings = settings_for(prompts, precision="bf16", rollout={"compare_tensors_every_syncs": 3})
    metrics, _ = run_in(tmp_path, settings, inputs)
    compared = [line["step"] for line in lines_of(tmp_path) if "sync/comparison_seconds" in line]
    assert compared == [1, 2, 5], (
        "the first update; the third and the sixth sync, the one at the start counted"
    )
    assert 0 < metrics["engine_mean_abs_diff"] < metrics["engine_max_abs_diff"]
    assert not (tmp_path / "logs" / "ppo.warnings.log").exists()


@pytest.mark.parametrize(
    ("precision", "error", "num_tokens"),
    [
        ("fp32", 3e-4, 1),
        ("bf16", 0.1, 6),
        ("fp32", math.nan, 1),
        ("bf16", math.nan, 1),
        ("bf16", math.inf, 1),
    ],
)
def test_a_batch_that_engine_and_trainer_disagree_about_ends_the_run_before_anything_is_kept_of_it(
    inputs, prompts, tmp_path, opened_as, monkeypatch, precision, error, num_tokens
):
    """Of the probe the engine tells the truth."""
    opened_as(lambda engine: SkewedEngine(engine, error=error, num_tokens=num_tokens))
    monkeypatch.setattr(Learner, "update", lambda *_, **__: pytest.fail("it learns from the batch"))
    with pytest.raises(ParityError, match=r"at weight version 0: .* tokens of the training batch differ"):
        run_in(tmp_path, settings_for(prompts, precision=precision), inputs)
    assert not list((tmp_path / "work" / "journal").iterdir())


def test_in_bf16_the_mean_of_a_batch_decides_and_its_maximum_is_logged(inputs, prompts, tmp_path, opened_as):
    """One token of each response 0.15 nats off: the mean is below ln 1.05."""
    opened_as(lambda engine: SkewedEngine(engine, error=0.15, num_tokens=1))
    run_in(tmp_path, settings_for(prompts, precision="bf16", max_steps=1), inputs)
    (line,) = lines_of(tmp_path)
    assert line["rollout/engine_max_abs_diff"] > 0.1
    assert line["rollout/engine_mean_abs_diff"] < math.log(1.05)


def run_killed_in_step(step_to_die_in, directory, settings, inputs, monkeypatch):
    with killed_in_step(step_to_die_in, monkeypatch):
        run_in(directory, settings, inputs)


def test_a_batch_of_the_journal_that_other_weights_have_sampled_is_sampled_again(
    inputs, prompts, tmp_path, monkeypatch
):
    """As after a checkpoint was lost and its steps, taken again, gave other bits. The run is not stuck."""
    settings = settings_for(prompts, max_steps=3)
    _, whole = run_in(tmp_path / "whole", settings, inputs)
    run_killed_in_step(2, tmp_path / "killed", settings, inputs, monkeypatch)
    journal = Journal(tmp_path / "killed" / "work")
    entry = journal.read(2)
    others = tuple(
        with_turn(one, logprobs=tuple(logprob - 0.2 for logprob in one.turn.logprobs))
        for one in entry.trajectories
    )
    journal.write(replace(entry, trajectories=others))
    drawn = []
    draw = RolloutSource._draw

    async def counting(self, step):
        drawn.append(step)
        return await draw(self, step)

    monkeypatch.setattr(RolloutSource, "_draw", counting)
    _, resumed = run_in(tmp_path / "killed", settings, inputs)
    assert drawn == [2] and resumed == whole
    said = (tmp_path / "killed" / "logs" / "ppo.warnings.log").read_text()
    assert "ppo step 3: log-probs in the journal are 0.2 nats from the trainer's (0.2 at most)" in said


def test_what_could_not_be_compared_is_said_once_and_is_no_error(inputs, prompts, tmp_path, monkeypatch):
    """The engine does not answer in time: nothing is compared, in neither of the three comparisons."""

    async def unanswered(self, update):
        raise TimeoutError("no answer")

    monkeypatch.setattr("rollout.hf_engine.HFEngine.diagnose", unanswered)
    compared = []
    tell = Publisher._tell

    def counting(self, found):
        compared.append(found)
        tell(self, found)

    monkeypatch.setattr(Publisher, "_tell", counting)
    run_in(tmp_path, settings_for(prompts, rollout={"compare_tensors_every_syncs": 3}), inputs)
    assert len(compared) == 3
    (said,) = (tmp_path / "logs" / "ppo.warnings.log").read_text().splitlines()
    assert said.startswith(
        "ppo: the engines' weights could not all be compared with the trainer's: all weights"
    )


def test_the_weights_of_the_correction_and_what_they_are_made_of_are_logged_whatever_its_type(
    inputs, prompts, tmp_path, opened_as
):
    """The engine says 0.03 nats less than the truth of every token."""
    opened_as(lambda engine: SkewedEngine(engine, error=-0.03, num_tokens=6))
    loose = {"parity_max_abs_diff": 1.0}
    for kind, weight, limited in (("off", 1.0, 0.0), ("token_truncate", 1.0, 1.0)):
        limits = {} if kind == "off" else {"max": 1.0}
        settings = settings_for(
            prompts, max_steps=1, rollout=loose, rollout_correction={"type": kind, **limits}
        )
        run_in(tmp_path / kind, settings, inputs)
        (line,) = lines_of(tmp_path / kind)
        for name in ("mean", "min", "max"):
            assert line[f"rollout/ratio_{name}"] == pytest.approx(math.exp(0.03), abs=1e-4)
        assert line["rollout/weight_mean"] == pytest.approx(weight, abs=1e-6)
        assert line["rollout/weight_limited"] == limited
        assert line["rollout/engine_kl_k1"] == pytest.approx(-0.03, abs=1e-4)
        assert line["rollout/engine_kl_k3"] == pytest.approx(math.exp(0.03) - 1 - 0.03, abs=1e-5)
