"""Running the graph, inline and on a real local Ray: what runs, what is skipped, how failures end."""

import io
import json
import os

import psutil
import pytest
from fake_chain import Chain, wait_for, write_model

from pipeline.errors import ConfigError, CorruptArtifact, MissingStage, StageFailed
from pipeline.executor import execute
from pipeline.planning import plan_run, plan_stage, validate_data
from pipeline.progress import Progress
from pipeline.stage_task import StageResult
from rollout.ground.errors import EnvironmentProblem
from stages.errors import DataError, ModelError, TrainingStopped

ALL = ["prepare", "pretrain", "sft", "reward", "ppo", "evaluate"]


def run(
    chain: Chain, *overrides: str, last: str | None = None, force: str | None = None
) -> dict[str, StageResult]:
    return execute(plan_run(chain.config(*overrides), last=last, force=force), Progress(io.StringIO()))


def to_run(chain: Chain, *overrides: str, force: str | None = None) -> list[str]:
    return list(plan_run(chain.config(*overrides), force=force).to_run)


def command(stage: str) -> str:
    return f"rlhf {stage} demo.yaml"


def test_a_run_goes_through_every_stage_and_a_second_one_skips_all(chain: Chain):
    results = run(chain)
    assert chain.calls() == ALL
    assert not any(result.skipped for result in results.values())
    again = run(chain)
    assert chain.calls() == []
    assert all(result.skipped for result in again.values())
    assert again["ppo"].metrics == results["ppo"].metrics


def test_the_run_directory_has_links_config_and_summary(chain: Chain):
    run(chain)
    run_dir = chain.outputs / "runs/demo"
    assert "ppo from ['policy', 'reward_model']" in (run_dir / "ppo/model.safetensors").read_text()
    assert (run_dir / "ppo/metrics.jsonl").read_text().count("\n") == 3
    assert "kl_coef: 0.05" in (run_dir / "config.yaml").read_text()
    summary = chain.summary()
    assert list(summary) == ALL
    assert summary["sft"]["metrics"] == {"loss": 0.25, "first_step": 1}
    assert summary["sft"]["skipped"] is False
    assert set(summary["sft"]) == {"fingerprint", "skipped", "seconds", "metrics"}
    assert os.readlink(run_dir / "sft").endswith(summary["sft"]["fingerprint"])
    run(chain)
    assert chain.summary()["sft"] == summary["sft"] | {"skipped": True}


def test_the_metrics_of_an_artifact_that_is_made_anew_are_not_taken_for_those_of_the_new_one(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
):
    run(chain, last="prepare")
    artifact = next(chain.outputs.glob("artifacts/prepare-*"))
    (artifact / "metrics.jsonl").write_text('{"step": 1, "max_steps": 1, "time": 0, "prepare/old": 1}\n')
    progress = Progress(shown := io.StringIO())
    polled_at_start = Progress.start

    def start(self: Progress, *arguments: object) -> None:
        polled_at_start(self, *arguments)  # type: ignore[arg-type]
        self.poll()

    monkeypatch.setattr(Progress, "start", start)
    execute(plan_run(chain.config(), last="prepare", force="prepare"), progress)
    assert "old" not in shown.getvalue() and "prepare: done" in shown.getvalue()


def test_changing_kl_coef_reruns_exactly_ppo_and_evaluate(chain: Chain):
    run(chain)
    chain.calls()
    run(chain, "ppo.kl_coef=0.2")
    assert chain.calls() == ["ppo", "evaluate"]


def test_two_runs_that_share_a_stage_share_its_artifact(chain: Chain):
    run(chain, last="sft")
    run(chain, "name=other", last="sft")
    links = {os.readlink(chain.outputs / "runs" / name / "sft") for name in ("demo", "other")}
    assert len(links) == 1


def test_until_ends_the_run_there(chain: Chain):
    run(chain, last="sft")
    assert chain.calls() == ["prepare", "pretrain", "sft"]
    assert list(chain.summary()) == ["prepare", "pretrain", "sft"]


def test_force_makes_a_stage_and_all_after_it_anew(chain: Chain):
    run(chain)
    started = {path.name: path.stat().st_ino for path in (chain.outputs / "artifacts").iterdir()}
    chain.calls()
    run(chain, force="reward")
    assert chain.calls() == ["reward", "ppo", "evaluate"]
    replaced = {path.name for path in (chain.outputs / "artifacts").iterdir()
                if path.stat().st_ino != started[path.name]}  # fmt: skip
    assert {name.partition("-")[0] for name in replaced} == {"reward", "ppo", "evaluate"}
    assert len(started) == len(list((chain.outputs / "artifacts").iterdir()))


def test_force_of_a_stage_outside_of_the_run_is_refused(chain: Chain):
    with pytest.raises(ConfigError, match="--force ppo: not a stage of this run"):
        plan_run(chain.config(), last="sft", force="ppo")


def test_force_replaces_a_corrupt_artifact_that_stops_every_other_run(chain: Chain):
    run(chain, last="sft")
    damaged = chain.outputs / "runs/demo/sft/model.safetensors"
    damaged.write_text("damaged")
    with pytest.raises(CorruptArtifact, match=r"sft-.*/model\.safetensors"):
        run(chain, last="sft")
    run(chain, last="sft", force="sft")
    assert "sft from ['start']" in damaged.read_text()


def test_a_failed_stage_leaves_the_finished_ones_recorded_and_resumes(chain: Chain):
    chain.order("sft", error="TrainingStopped")
    with pytest.raises(TrainingStopped, match=r"lower sft\.lr"):
        run(chain)
    assert chain.calls() == ["prepare", "pretrain", "sft"]
    assert list(chain.summary()) == ["prepare", "pretrain"]
    chain.order("sft")
    results = run(chain)
    assert chain.calls() == ["sft", "reward", "ppo", "evaluate"]
    assert results["sft"].metrics["first_step"] == 3  # the work directory was kept


def test_a_bug_of_ours_is_one_line_with_the_traceback_in_the_log(chain: Chain):
    chain.order("prepare", error="ValueError")
    with pytest.raises(StageFailed, match="prepare: ValueError: a bug of ours; this is a bug") as caught:
        run(chain)
    assert caught.value.exit_code == 1
    log = chain.outputs / "runs/demo/logs/prepare.traceback.txt"
    assert str(log) in str(caught.value)
    assert "fake_stages.py" in log.read_text()


def test_a_full_disk_is_the_machines_fault(chain: Chain):
    chain.order("prepare", error="OSError")
    with pytest.raises(EnvironmentProblem, match="No space left"):
        run(chain)


def test_a_stage_alone_runs_on_what_the_others_left(chain: Chain):
    run(chain, last="sft")
    chain.calls()
    planned = plan_stage(chain.config(), "reward", inputs={}, force=False, command=command)
    execute(planned, Progress(io.StringIO()))
    assert chain.calls() == ["reward"]
    assert list(chain.summary()) == ["prepare", "pretrain", "sft", "reward"]
    assert plan_stage(chain.config(), "reward", inputs={}, force=False, command=command).to_run == ()
    assert plan_stage(chain.config(), "reward", inputs={}, force=True, command=command).to_run == ("reward",)


def test_a_chain_without_reward_and_ppo_is_evaluated(chain: Chain):
    results = run(chain, "reward=null", "ppo=null")
    assert chain.calls() == ["prepare", "pretrain", "sft", "evaluate"]
    text = (chain.outputs / "runs/demo/evaluate/model.safetensors").read_text()
    assert "evaluate from ['base', 'corpus', 'sft']" in text
    assert list(chain.summary()) == list(results) == ["prepare", "pretrain", "sft", "evaluate"]


def test_an_evaluation_alone_takes_what_it_is_given_of_a_chain(chain: Chain):
    config = chain.config("prepare=null", "pretrain=null", "sft=null", "reward=null", "ppo=null")
    inputs = {"ppo": write_model(chain.directory / "mine")}
    planned = plan_stage(config, "evaluate", inputs=inputs, force=False, command=command)
    execute(planned, Progress(io.StringIO()))
    assert chain.calls() == ["evaluate"]
    text = (chain.outputs / "runs/demo/evaluate/model.safetensors").read_text()
    assert "evaluate from ['ppo']" in text


def test_a_missing_upstream_stage_names_the_command_that_makes_it(chain: Chain):
    with pytest.raises(MissingStage, match=r"ppo: needs sft, .* run `rlhf sft demo\.yaml`") as caught:
        plan_stage(chain.config(), "ppo", inputs={}, force=False, command=command)
    assert caught.value.exit_code == 2


def test_a_stage_alone_takes_a_given_model_by_its_content(chain: Chain):
    inputs = {"sft": write_model(chain.directory / "mine")}
    first = plan_stage(chain.config(), "reward", inputs=inputs, force=False, command=command)
    execute(first, Progress(io.StringIO()))
    assert chain.calls() == ["reward"]
    (chain.directory / "mine").rename(chain.directory / "moved")
    moved = {"sft": chain.directory / "moved"}
    assert plan_stage(chain.config(), "reward", inputs=moved, force=False, command=command).to_run == ()
    other = {"sft": write_model(chain.directory / "other", "other weights")}
    assert plan_stage(chain.config(), "reward", inputs=other, force=False, command=command).to_run == (
        "reward",
    )


def test_a_given_artifact_counts_like_the_stage_it_came_from(chain: Chain):
    run(chain, last="reward")
    inputs = {"sft": chain.outputs / "runs/demo/sft"}
    assert plan_stage(chain.config(), "reward", inputs=inputs, force=False, command=command).to_run == ()


def test_an_input_that_the_stage_does_not_take_is_refused(chain: Chain):
    with pytest.raises(ConfigError, match="--input ppo: reward takes sft"):
        plan_stage(chain.config(), "reward", inputs={"ppo": chain.directory}, force=False, command=command)


def test_links_of_an_older_config_disappear_and_current_ones_stay(chain: Chain):
    run(chain)
    run(chain, last="sft")
    assert list(chain.summary()) == ALL
    run(chain, "ppo.kl_coef=0.2", last="sft")
    assert list(chain.summary()) == ["prepare", "pretrain", "sft", "reward"]
    assert not (chain.outputs / "runs/demo/ppo").is_symlink()


def test_all_datasets_of_a_run_are_read_before_anything_starts(chain: Chain):
    (chain.directory / "prompts.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl:1"):
        validate_data(plan_run(chain.config()))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("corpus.jsonl", "prepare.data.0"),
        ("chat.jinja", "model.chat_template"),
        ("pairs.jsonl", "reward.data.0"),
        ("score.py", "evaluate.score.path"),
    ],
)
def test_a_file_that_changed_since_the_run_was_planned_stops_the_stage_that_is_to_read_it(
    chain: Chain, name: str, key: str
):
    file = chain.directory / name
    (chain.directory / "chat.jinja").write_text("{{ messages }}")
    planned = plan_run(chain.config("model.chat_template=chat.jinja"))
    before, stamp = file.read_text(), file.stat()
    file.write_text(before[::-1])
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(DataError) as caught:
        execute(planned, Progress(io.StringIO()))
    assert (
        str(caught.value) == f"{name}: {key}: changed since the run was planned; run the same command again"
    )
    stage = "prepare" if key.startswith("model") else key.partition(".")[0]
    assert caught.value.exit_code == 3 and chain.calls() == ALL[: ALL.index(stage)]
    file.write_text(before)
    execute(planned, Progress(io.StringIO()))
    assert chain.calls() == ALL[ALL.index(stage) :]


@pytest.mark.parametrize("while_it_runs", [False, True])
def test_a_given_model_that_changed_since_the_run_was_planned_is_not_published_from(
    chain: Chain, while_it_runs: bool
):
    given = {"sft": write_model(chain.directory / "mine")}
    planned = plan_stage(chain.config(), "reward", inputs=given, force=False, command=command)
    if while_it_runs:
        chain.order("reward", edit=str(given["sft"] / "config.json"))
    else:
        (given["sft"] / "config.json").write_text('{"other": 1}')
    with pytest.raises(DataError, match="mine: sft: changed since the run was planned"):
        execute(planned, Progress(io.StringIO()))
    assert chain.calls() == ["reward"] * while_it_runs
    assert not list(chain.outputs.glob("artifacts/*"))


def test_a_tokenizer_or_template_that_prepare_cannot_use_is_refused_before_anything_starts(chain: Chain):
    (chain.directory / "tokenizer").mkdir()
    (chain.directory / "tokenizer/tokenizer.json").write_text("{}")
    (chain.directory / "chat.jinja").write_text("{{ messages }}")
    for setting in ("prepare.tokenizer=tokenizer", "model.chat_template=chat.jinja"):
        with pytest.raises(ModelError):
            validate_data(plan_run(chain.config(setting)))


def test_a_piped_run_prints_one_plain_line_per_logged_step(chain: Chain):
    stream = io.StringIO()
    execute(plan_run(chain.config(), last="prepare"), Progress(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "prepare: running"
    assert [line for line in lines if "step 3/3" in line and "loss 0.3333" in line and "lr 0.1" in line]
    assert lines[-1].startswith("prepare: done in ")
    assert len(lines) == 5


@pytest.mark.ray
def test_a_whole_run_on_ray_with_one_branch_failing_beside_another(chain: Chain):
    command = ("run", "demo.yaml", "pipeline.executor=ray", "reward.init_from=pretrain")
    chain.order("reward", error="TrainingStopped")
    chain.order("sft", sleep_s=2)
    code, _, stderr = chain.cli(*command)
    assert (code, stderr) == (5, "sft: loss is nan at step 2; lower sft.lr\n")
    assert sorted(chain.calls()) == ["prepare", "pretrain", "reward", "sft"]
    assert list(chain.summary()) == ["prepare", "pretrain", "sft"]  # the branch beside it was kept

    chain.order("reward")
    chain.order("ppo", kill=True)
    code, _, stderr = chain.cli(*command)
    assert (code, stderr.count("\n")) == (4, 1)
    assert stderr.startswith("ppo: a process of it died (WorkerCrashedError")
    assert list(chain.summary()) == ["prepare", "pretrain", "sft", "reward"]

    code, stdout, stderr = chain.cli(*command)
    assert (code, stderr) == (0, "")
    assert "ppo: step 3/3" in stdout
    summary = chain.summary()
    assert list(summary) == ALL
    assert summary["ppo"]["metrics"]["first_step"] == 3  # the work directory of the killed worker was used
    assert chain.calls() == ["reward", "ppo", "ppo", "evaluate"]
    logs = chain.outputs / "runs/demo/logs"
    assert f"threads {len(os.sched_getaffinity(0))}" in (logs / "evaluate.log").read_text()
    assert "GPUs ''" in (logs / "evaluate.log").read_text()  # a stage's own process uses none
    assert (logs / "ray/raylet.out").exists()
    manifest = json.loads((chain.outputs / "runs/demo/ppo/manifest.json").read_text())
    assert manifest["inputs"] == {stage: summary[stage]["fingerprint"] for stage in ("sft", "reward")}


@pytest.mark.ray
def test_a_dead_raylet_ends_the_run_in_one_line_and_not_in_a_hang(chain: Chain):
    chain.order("prepare", sleep_s=100)
    process = chain.start("run", "demo.yaml", "pipeline.executor=ray")
    wait_for(chain.control / "prepare.sleeping")
    raylet = next(child for child in psutil.Process(process.pid).children(recursive=True)
                  if child.name() == "raylet")  # fmt: skip
    raylet.kill()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, len(stderr.splitlines())) == (4, 1), stderr
