"""The whole chain as a user runs it: the command line, Ray, vLLM, six stages, one tiny model. And killed
runs.
"""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from blake3 import blake3
from cli_runs import CONFIG, RLHF, STAGES, family_once_training, rlhf, summary_of
from forks import ENGINES
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from vllm_directly import by_vllm

from pipeline import cli

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def finished(watched_run):
    """A directory in which the whole chain has run once on Ray and vLLM."""
    return watched_run.directory


def test_all_six_stages_run_on_ray_and_vllm_and_say_what_they_measured(finished):
    summary = summary_of(finished)
    assert list(summary) == STAGES
    assert not any(entry["skipped"] for entry in summary.values())
    metrics = {stage: entry["metrics"] for stage, entry in summary.items()}
    assert {"accuracy_heldout", "accuracy_longer_wins", "score_std"} <= metrics["reward"].keys()
    assert {
        "parity_max_abs_diff",
        "version_final",
        "sync_seconds_median",
        "samples_per_second",
        "generation_seconds",
        "training_seconds",
        "kl_final",
    } <= metrics["ppo"].keys()
    assert {
        "score_base",
        "score_sft",
        "score_ppo",
        "score_correct_ppo",
        "score_polite_sft",
        "score_short_base",
        "win_rate_ppo_vs_sft",
        "win_rate_low",
        "win_rate_high",
        "kl_ppo_vs_sft",
        "perplexity_base",
        "perplexity_sft",
    } <= metrics["evaluate"].keys()
    assert metrics["ppo"]["version_final"] == 2
    assert metrics["ppo"]["parity_max_abs_diff"] <= 1e-4 and metrics["ppo"]["engine_max_abs_diff"] <= 1e-4
    assert metrics["evaluate"]["win_rate_low"] <= metrics["evaluate"]["win_rate_ppo_vs_sft"]
    assert metrics["evaluate"]["win_rate_ppo_vs_sft"] <= metrics["evaluate"]["win_rate_high"]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_pin_39_every_language_model_loads_in_transformers_as_it_lies(finished, stage):
    directory = finished / "outputs/runs/tiny" / stage
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does a cow say?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert not list(directory.glob("*.bin")) or stage == "prepare"


def test_the_reward_model_loads_in_transformers_with_its_head_and_a_pad_that_is_no_end_token(finished):
    directory = finished / "outputs/runs/tiny/reward"
    model, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.config.pad_token_id != tokenizer.eos_token_id
    assert (directory / "score_normaliser.json").is_file()


def in_this_process(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that ends well."""
    with ENGINES.forking(), pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    output = capsys.readouterr()
    assert ended.value.code == 0, output.err
    return output.out


def test_pin_39_the_ppo_model_answers_through_vllm_as_it_lies(finished, capsys, monkeypatch):
    monkeypatch.chdir(finished)
    arguments = ["outputs/runs/tiny/ppo", "What does a cow say?", "--temperature", "0", "--max-tokens", "6"]
    by_vllm, by_transformers = (
        in_this_process(capsys, "generate", *arguments, "--engine", engine) for engine in ("vllm", "hf")
    )
    assert by_vllm == by_transformers != ""


def test_rollouts_samples_metrics_and_report_are_there(finished):
    run = finished / "outputs/runs/tiny"
    rollouts = [json.loads(line) for line in (run / "ppo/rollouts.jsonl").read_text().split("\n")[:-1]]
    assert {line["step"] for line in rollouts} == {1, 2}
    assert [line["version"] for line in rollouts if line["step"] == 2] == [1] * 8
    assert {"prompt", "response", "score", "kl"} <= rollouts[0].keys()
    assert len((run / "evaluate/samples.jsonl").read_text().split("\n")[:-1]) == 8
    for stage in ("pretrain", "sft", "reward", "ppo"):
        assert (run / stage / "metrics.jsonl").stat().st_size > 0
    report = (run / "report.html").read_text()
    assert "<svg" in report and "http://" not in report.replace("http://www.w3.org", "")


def test_the_same_command_again_skips_every_stage(finished):
    before = summary_of(finished)
    result = rlhf(finished, "run", "tiny.yaml")
    assert result.returncode == 0, result.stderr
    after = summary_of(finished)
    assert all(entry["skipped"] for entry in after.values())
    assert [entry["metrics"] for entry in after.values()] == [entry["metrics"] for entry in before.values()]


def test_another_kl_coef_would_run_exactly_ppo_and_evaluate(finished, capsys, monkeypatch):
    monkeypatch.chdir(finished)
    said = in_this_process(capsys, "check", "tiny.yaml", "ppo.kl_coef=0.5")
    verdicts = {
        line.split()[0]: line.split()[1]
        for line in said.splitlines()
        if line.split()[:1] and line.split()[0] in STAGES
    }
    assert [stage for stage, verdict in verdicts.items() if verdict == "run"] == ["ppo", "evaluate"], said


def take_artifacts(finished: Path, directory: Path, *, until: str) -> None:
    """Copy what the finished run has made of the stages up to `until`."""
    later = STAGES[STAGES.index(until) + 1 :]
    shutil.copytree(
        finished / "outputs/artifacts",
        directory / "outputs/artifacts",
        ignore=shutil.ignore_patterns(*(f"{stage}-*" for stage in later)),
        symlinks=True,
    )


def kill_once_training(directory: Path, stage: str, command: list) -> list[str]:
    """SIGKILL driver and trainer after two steps of `stage` and wait for the rest to end by itself; all their
    names. (With the driver alone killed, the trainer of a model this small is done before Ray notices.)
    """
    with (directory / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
        family = family_once_training(driver, directory, stage)
    names = {process: process.name() for process in family}
    trainers = [process for process, name in names.items() if name.startswith("ray::_Training")]
    assert trainers, names
    for process in (driver, *trainers):
        process.send_signal(signal.SIGKILL)
    driver.wait()
    _gone, alive = psutil.wait_procs(family, timeout=90)
    assert not alive, alive
    return list(names.values())


def test_a_killed_run_leaves_no_half_artifact_and_the_same_command_ends_in_the_same_weights(
    finished, tmp_path
):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    take_artifacts(finished, tmp_path, until="prepare")
    kill_once_training(tmp_path, "pretrain", [RLHF, "run", "tiny.yaml", "--until", "pretrain"])
    assert not list((tmp_path / "outputs/artifacts").glob("pretrain-*"))
    result = rlhf(tmp_path, "run", "tiny.yaml", "--until", "pretrain")
    assert result.returncode == 0, result.stdout + result.stderr
    digests = {
        blake3((directory / "outputs/runs/tiny/pretrain/model.safetensors").read_bytes()).hexdigest()
        for directory in (finished, tmp_path)
    }
    assert len(digests) == 1


# Slow: more engines, and a kill while they live


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_pin_39_vllm_itself_answers_as_transformers_does_from_a_directory_as_it_lies(finished, stage):
    """No option of ours: dtype aside, what the directory says is all there is."""
    directory = finished / "outputs/runs/tiny" / stage
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
            "input_ids"
        ]
        for text in ("What does a cow say?", "Hello! What is the opposite of hot?")
    ]
    for prompt, answer in zip(prompts, by_vllm("generate", directory, prompts), strict=True):
        plain = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        tokens, logprobs = zip(*answer, strict=True)
        assert list(tokens) == plain.tolist()
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        expected_T = logits_TV.log_softmax(-1).gather(1, plain[:, None])[:, 0]
        assert list(logprobs) == pytest.approx(expected_T.tolist(), abs=1e-4)


@pytest.mark.slow
def test_pin_39_vllm_itself_scores_as_transformers_does_with_the_reward_model_as_it_lies(finished):
    directory = finished / "outputs/runs/tiny/reward"
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    sequences = [[4, 5, 6, 2], [9, 10, 11, 12, 40, 2], [100, 2]]
    with torch.no_grad():
        plain = [model(torch.tensor([ids])).logits[0].tolist() for ids in sequences]
    for found, expected in zip(by_vllm("score", directory, sequences), plain, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for (score,) in plain}) == 3


@pytest.mark.slow
def test_ppo_killed_with_its_engines_alive_ends_by_the_same_command_in_the_same_weights(finished, tmp_path):
    command = [RLHF, "run", "tiny.yaml", "--until", "ppo", "ppo.max_steps=5", "ppo.checkpoint_every_steps=1"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny.yaml").write_text(CONFIG)
        take_artifacts(finished, tmp_path / name, until="reward")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = rlhf(whole, *command[1:])
    assert result.returncode == 0, result.stdout + result.stderr

    names = kill_once_training(killed, "ppo", command)
    assert any(name.startswith("VLLM") for name in names), names
    assert not list((killed / "outputs/artifacts").glob("ppo-*"))
    (metrics,) = killed.glob("outputs/work/ppo-*/metrics.jsonl")
    before = metrics.read_text().split("\n")[:-1]
    assert 2 <= len(before) < 5
    result = rlhf(killed, *command[1:])
    assert result.returncode == 0, result.stdout + result.stderr
    assert [entry["skipped"] for entry in summary_of(killed).values()] == [True] * 4 + [False]
    after = (killed / "outputs/runs/tiny/ppo/metrics.jsonl").read_text().split("\n")[:-1]
    assert len(after) == 5 and after[0] == before[0], "it went on; it did not start again"
    for name in ("model.safetensors", "rollouts.jsonl"):
        digests = {
            blake3((directory / "outputs/runs/tiny/ppo" / name).read_bytes()).hexdigest()
            for directory in (whole, killed)
        }
        assert len(digests) == 1, name
    assert summary_of(killed)["ppo"]["metrics"]["version_final"] == 5


@pytest.mark.slow
def test_two_engines_give_the_same_tokens_and_the_same_weights_as_one(finished, tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    take_artifacts(finished, tmp_path, until="reward")
    result = rlhf(tmp_path, "run", "tiny.yaml", "--until", "ppo", "rollout.num_engines=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "outputs/runs/tiny/logs/ppo-engines/engine-1.log").exists()
    for name in ("model.safetensors", "rollouts.jsonl"):
        one, two = (directory / "outputs/runs/tiny/ppo" / name for directory in (finished, tmp_path))
        assert blake3(one.read_bytes()).digest() == blake3(two.read_bytes()).digest(), name
