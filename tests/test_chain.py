"""The whole chain as a user runs it: the command line, Ray, vLLM, six stages, one tiny model. And a killed
run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from blake3 import blake3
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

REPOSITORY = Path(__file__).parents[1]
RLHF = Path(sys.executable).with_name("rlhf")
STAGES = ["prepare", "pretrain", "sft", "reward", "ppo", "evaluate"]
CONFIG = f"""
base: {REPOSITORY}/configs/demo.yaml
name: tiny
model: {{layers: 2, hidden_size: 64, intermediate_size: 96, num_heads: 2, num_kv_heads: 1}}
prepare: {{vocab_size: 320}}
pretrain: {{max_steps: 8, batch_size: 4, micro_batch_size: 4, log_every_steps: 1, checkpoint_every_steps: 1}}
sft: {{max_steps: 4, batch_size: 4, micro_batch_size: 4, log_every_steps: 1}}
reward: {{max_steps: 4, batch_size: 4, micro_batch_size: 4, min_accuracy: 0, normaliser_prompts: 8}}
ppo: {{max_steps: 2, num_prompts: 8, batch_size: 4, micro_batch_size: 4, max_response_tokens: 8}}
evaluate: {{max_prompts: 8, max_response_tokens: 8}}
rollout: {{kv_cache_mib: 64, max_num_seqs: 16}}
"""


def rlhf(directory: Path, *arguments: str, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RLHF, *arguments], cwd=directory, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory in which the whole chain has run once on Ray and vLLM."""
    directory = tmp_path_factory.mktemp("chain")
    (directory / "tiny.yaml").write_text(CONFIG)
    result = rlhf(directory, "run", "tiny.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


def summary_of(directory: Path) -> dict:
    return json.loads((directory / "outputs/runs/tiny/summary.json").read_text())


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


def test_pin_39_the_ppo_model_answers_through_vllm_as_it_lies(finished):
    arguments = ["outputs/runs/tiny/ppo", "What does a cow say?", "--temperature", "0", "--max-tokens", "6"]
    by_vllm = rlhf(finished, "generate", *arguments, "--engine", "vllm")
    by_transformers = rlhf(finished, "generate", *arguments, "--engine", "hf")
    assert by_vllm.returncode == by_transformers.returncode == 0, by_vllm.stderr + by_transformers.stderr
    assert by_vllm.stdout == by_transformers.stdout != ""


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


def test_another_kl_coef_would_run_exactly_ppo_and_evaluate(finished):
    result = rlhf(finished, "check", "tiny.yaml", "ppo.kl_coef=0.5")
    verdicts = {
        line.split()[0]: line.split()[1]
        for line in result.stdout.splitlines()
        if line.split()[:1] and line.split()[0] in STAGES
    }
    assert [stage for stage, verdict in verdicts.items() if verdict == "run"] == ["ppo", "evaluate"], (
        result.stdout
    )


def test_a_killed_run_leaves_no_half_artifact_and_the_same_command_ends_in_the_same_weights(
    finished, tmp_path
):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    command = [RLHF, "run", "tiny.yaml", "--until", "pretrain"]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        family = _family_once_training(driver, tmp_path)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _gone, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, alive
    assert not list((tmp_path / "outputs/artifacts").glob("pretrain-*"))
    result = rlhf(tmp_path, "run", "tiny.yaml", "--until", "pretrain")
    assert result.returncode == 0, result.stdout + result.stderr
    digests = {
        blake3((directory / "outputs/runs/tiny/pretrain/model.safetensors").read_bytes()).hexdigest()
        for directory in (finished, tmp_path)
    }
    assert len(digests) == 1


def _family_once_training(driver: subprocess.Popen, directory: Path) -> list[psutil.Process]:
    """The driver's raylet and workers, as soon as pretrain has taken two steps. (Ray's own agents take longer
    to notice; they hold nothing of a run.)"""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert driver.poll() is None, (directory / "log").read_text()
        for path in directory.glob("outputs/work/pretrain-*/metrics.jsonl"):
            if path.read_text().count("\n") >= 2:
                family = psutil.Process(driver.pid).children(recursive=True)
                return [
                    process
                    for process in family
                    if process.name().startswith(("raylet", "gcs_server", "ray::"))
                ]
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    raise AssertionError((directory / "log").read_text())
