"""The command as users meet it: exit codes, one line for a mistake, signals."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
from fake_chain import Chain, wait_for

from pipeline import cli

ROOT = Path(__file__).parents[2]


def rlhf(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    output = capsys.readouterr()
    return int(str(ended.value.code)), output.out, output.err


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command that must fail with exactly one line."""
    code, _, stderr = rlhf(capsys, *arguments)
    assert stderr.count("\n") == 1, stderr
    return code, stderr


def test_a_run_ends_with_the_place_of_its_report(chain: Chain, capsys: pytest.CaptureFixture[str]):
    code, stdout, stderr = rlhf(capsys, "run", "demo.yaml")
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[-1] == "report: outputs/runs/demo/report.html"
    assert (chain.outputs / "runs/demo/report.html").is_file()
    _, stdout, _ = rlhf(capsys, "run", "demo.yaml", "--until", "sft")
    assert len(re.findall("^(prepare|pretrain|sft) +skipped", stdout, re.M)) == 3


def test_a_setting_that_does_not_exist_is_code_2(chain: Chain, capsys: pytest.CaptureFixture[str]):
    code, stderr = complaint(capsys, "run", "demo.yaml", "sft.lrr=1")
    assert code == 2
    assert "lrr" in stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "two  spaces.yaml"], "two  spaces.yaml"),
        (["run", "demo.yaml", "--until", "sfft"], "--until sfft: no such stage; did you mean 'sft'?"),
        (["run", "demo.yaml", "--force", "dpo"], "--force dpo: no such stage; did you mean 'ppo'?"),
        (["run", "demo.yaml", "--untill", "sft"], "--untill"),
        (["runn", "demo.yaml"], "Did you mean 'run'?"),
        (["reward", "demo.yaml"], "reward: needs sft, which has not finished with this config; run `rlhf"),
        (["reward", "demo.yaml", "--input", "sft=nowhere"], "--input sft=nowhere: no such directory"),
        (["reward", "demo.yaml", "--input", "sft"], "--input sft: write STAGE=DIR"),
        (["reward", "demo.yaml", "--input", "sftt=x"], "--input sftt: no such stage; did you mean 'sft'?"),
        (["reward", "demo.yaml", "--input", "ppo=x"], "--input ppo: reward takes sft"),
        (["run"], "CONFIG"),
        (["generate", "nowhere", "hello"], "nowhere"),
        (["doctor", "--address", "h:\u00b2"], "--address h:\u00b2: must be `auto`, or `host:port`"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_code_2(
    chain: Chain, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    code, stderr = complaint(capsys, *arguments)
    assert said in stderr
    assert code == 2


def test_the_command_that_makes_a_missing_stage_repeats_the_overrides(
    chain: Chain, capsys: pytest.CaptureFixture[str]
):
    _, stderr = complaint(capsys, "reward", "demo.yaml", "seed=3")
    assert "`rlhf sft demo.yaml seed=3`" in stderr


def test_a_missing_dataset_is_code_3(chain: Chain, capsys: pytest.CaptureFixture[str]):
    (chain.directory / "pairs.jsonl").unlink()
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 3
    assert "pairs.jsonl" in stderr
    assert rlhf(capsys, "run", "demo.yaml", "--until", "sft")[0] == 0


def test_a_broken_row_is_code_3_before_any_stage_runs(chain: Chain, capsys: pytest.CaptureFixture[str]):
    (chain.directory / "prompts.jsonl").write_text("{broken\n")
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 3
    assert "prompts.jsonl:1" in stderr
    assert chain.calls() == []


def test_a_corrupt_artifact_is_code_4_and_named(chain: Chain, capsys: pytest.CaptureFixture[str]):
    rlhf(capsys, "run", "demo.yaml")
    (chain.outputs / "runs/demo/sft/model.safetensors").write_text("damaged")
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 4
    assert "sft-" in stderr and "model.safetensors" in stderr and "--force sft" in stderr


def test_an_outputs_path_that_cannot_be_written_is_code_4(chain: Chain, capsys: pytest.CaptureFixture[str]):
    (chain.directory / "taken").write_text("a file")
    code, stderr = complaint(capsys, "run", "demo.yaml", "outputs=taken")
    assert code == 4
    assert "outputs=DIR" in stderr


def test_a_stage_that_stops_itself_is_code_5_and_the_finished_ones_are_reported(
    chain: Chain, capsys: pytest.CaptureFixture[str]
):
    chain.order("sft", error="TrainingStopped")
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert (code, stderr) == (5, "sft: loss is nan at step 2; lower sft.lr\n")
    assert list(chain.summary()) == ["prepare", "pretrain"]
    assert (chain.outputs / "runs/demo/report.html").is_file()


def test_a_bug_in_a_stage_is_code_1_and_names_the_traceback(chain: Chain, capsys: pytest.CaptureFixture[str]):
    chain.order("sft", error="ValueError")
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 1
    assert stderr.rstrip().endswith("outputs/runs/demo/logs/sft.traceback.txt")


def test_a_bug_elsewhere_is_code_1_and_names_the_traceback(
    chain: Chain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("pipeline.planning.plan_run", broken)
    code, stderr = complaint(capsys, "run", "demo.yaml")
    assert code == 1
    log = Path(stderr.split()[-1])
    assert "surprise" in log.read_text()
    log.unlink()


def test_a_stage_alone_on_a_given_model(
    chain: Chain, capsys: pytest.CaptureFixture[str], tied_model_dir: Path
):
    shutil.copytree(tied_model_dir, chain.directory / "mine")
    assert rlhf(capsys, "reward", "demo.yaml", "--input", "sft=mine")[0] == 0
    assert chain.calls() == ["reward"]
    assert list(chain.summary()) == ["reward"]
    rlhf(capsys, "reward", "demo.yaml", "--input", "sft=mine")
    assert chain.calls() == []
    rlhf(capsys, "reward", "demo.yaml", "--input", "sft=mine", "--force")
    assert chain.calls() == ["reward"]


def test_check_shows_rows_and_what_would_be_skipped_and_starts_nothing(
    chain: Chain, capsys: pytest.CaptureFixture[str]
):
    rlhf(capsys, "run", "demo.yaml", "--until", "sft")
    chain.calls()
    code, stdout, _ = rlhf(capsys, "check", "demo.yaml", "ppo.max_steps=7")
    assert code == 0
    assert "sft.data.0: " in stdout and "\u27e6two " in stdout
    actions = dict(re.findall(r"^  (\w+) +(skip|run) ", stdout, re.M))
    assert actions == dict.fromkeys(["prepare", "pretrain", "sft"], "skip") | dict.fromkeys(
        ["reward", "ppo", "evaluate"], "run"
    )
    assert "7 steps" in stdout
    assert chain.calls() == []


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_ppo_without_a_reward_model_is_refused_in_one_line_with_the_ways_out(
    chain: Chain, capsys: pytest.CaptureFixture[str], command: str
):
    code, _, stderr = rlhf(capsys, command, "demo.yaml", "reward=null")
    assert code == 2 and chain.calls() == []
    assert stderr == (
        "reward: no such section, which ppo needs; add `reward:`, or give `rlhf ppo` --input reward=DIR\n"
    )


def test_a_run_ends_with_what_came_of_it(chain: Chain, capsys: pytest.CaptureFixture[str]):
    chain.order("sft", metrics={"loss_final": 1.25})
    figures = {"score_sft": 0.49, "score_ppo": 0.9, "win_rate_ppo_vs_sft": 0.87, "prompts": 288}
    chain.order("evaluate", metrics=figures)
    code, stdout, _ = rlhf(capsys, "run", "demo.yaml")
    *_, headline, gap, sentence, report = stdout.splitlines()
    assert code == 0 and gap == ""
    assert headline.split(maxsplit=3)[0] == "evaluate" and headline.endswith("score of sft 0.49, ppo 0.90")
    assert sentence == "score 0.49 -> 0.90, ppo wins 87 %"
    assert report == "report: outputs/runs/demo/report.html"
    assert sentence.replace(">", "&gt;") in (chain.outputs / "runs/demo/report.html").read_text()


def test_a_run_of_some_stages_says_what_its_report_says(chain: Chain, capsys: pytest.CaptureFixture[str]):
    chain.order("evaluate", metrics={"score_sft": 0.49, "score_ppo": 0.9, "prompts": 288})
    rlhf(capsys, "run", "demo.yaml")
    _, stdout, _ = rlhf(capsys, "run", "demo.yaml", "--until", "ppo")
    *_, gap, sentence, _ = stdout.splitlines()
    assert (gap, sentence) == ("", "score 0.49 -> 0.90 (sft -> ppo)"), "the evaluation is still current"
    assert sentence.replace(">", "&gt;") in (chain.outputs / "runs/demo/report.html").read_text()


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("absent", ["reward", "sft"])
def test_check_refuses_what_run_refuses_where_the_model_is_not_here(
    chain: Chain, capsys: pytest.CaptureFixture[str], command: str, absent: str
):
    settings = ("model.path=nobody/nothing-here", "prepare=null", "pretrain=null", f"{absent}=null")
    code, stdout, stderr = rlhf(capsys, command, "demo.yaml", *settings)
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"{absent}: no such section, which ") and stderr.count("\n") == 1


def test_check_says_what_the_rollout_correction_resolves_to_and_why(
    chain: Chain, capsys: pytest.CaptureFixture[str]
):
    def said(*overrides: str) -> str:
        code, stdout, _ = rlhf(capsys, "check", "demo.yaml", *overrides)
        assert code == 0
        (line,) = re.findall(r"^note: ppo\.rollout_correction: (.*)$", stdout, re.M)
        return line

    assert said() == "off (auto: rollouts are fp32 and synchronous)"
    assert said("ppo.precision=bf16") == "token_truncate, max 2 (auto: ppo.precision is bf16)"
    assert said("ppo.rollout_correction.type=token_mask") == "token_mask, min 0.5, max 5"


def test_schema_is_json(capsys: pytest.CaptureFixture[str]):
    _, stdout, _ = rlhf(capsys, "schema")
    assert "ppo" in json.loads(stdout)["properties"]


def processes_of(driver: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(driver.pid).children(recursive=True)


def any_runs(processes: list[psutil.Process]) -> bool:
    return any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


@pytest.mark.process
@pytest.mark.parametrize(("where", "number"), [("inline", signal.SIGTERM), ("ray", signal.SIGHUP)])
def test_a_signal_lets_the_stage_save_its_state_and_ends_with_code_75(chain: Chain, where: str, number: int):
    chain.order("sft", sleep_s=100)
    process = chain.start("run", "demo.yaml", f"pipeline.executor={where}")
    wait_for(chain.control / "sft.sleeping")
    children = processes_of(process)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does: every process of the run gets it
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (75, "sft: stopped after step 2; run the same command to go on\n")
    assert "stopping at the next step; again: at once\n" in stdout and "sft: stopped\n" in stdout
    assert not any_runs(children)
    assert list(chain.summary()) == ["prepare", "pretrain"]
    assert not list((chain.outputs / "runs/demo").glob("stop*"))

    chain.order("sft")
    chain.calls()
    code, _, stderr = chain.cli("run", "demo.yaml", "--until", "sft")
    assert (code, stderr, chain.calls()) == (0, "", ["sft"])
    assert chain.summary()["sft"]["metrics"]["first_step"] == 3


@pytest.mark.process
@pytest.mark.parametrize("where", ["inline", "ray"])
def test_a_second_signal_ends_the_run_at_once_with_code_75(chain: Chain, where: str):
    chain.order("sft", sleep_s=100, stubborn=True)
    process = chain.start("run", "demo.yaml", f"pipeline.executor={where}")
    wait_for(chain.control / "sft.sleeping")
    children = processes_of(process)
    process.send_signal(signal.SIGTERM)
    wait_for(chain.outputs / f"runs/demo/stop-{socket.gethostname()}-{process.pid}")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (75, "interrupted; run the same command to go on\n")
    assert not any_runs(children)
    assert not list((chain.outputs / "runs/demo").glob("stop*"))
    chain.order("sft")
    assert chain.cli("run", "demo.yaml", "--until", "sft")[0] == 0


@pytest.mark.process
def test_a_stage_that_does_not_stop_in_time_is_ended(chain: Chain):
    chain.order("sft", sleep_s=100, stubborn=True)
    process = chain.start("run", "demo.yaml", "pipeline.stop_timeout_s=0.5")
    wait_for(chain.control / "sft.sleeping")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (75, "interrupted; run the same command to go on\n")


@pytest.mark.process
@pytest.mark.parametrize("where", ["inline", "ray"])
def test_after_a_signal_a_stage_may_end_and_no_other_one_starts(chain: Chain, where: str):
    (chain.outputs / "runs/demo").mkdir(parents=True)
    (
        chain.outputs / "runs/demo/stop-elsewhere-7"
    ).touch()  # of another command of that name: it stops nothing here
    chain.order("pretrain", sleep_s=2, stubborn=True)
    process = chain.start("run", "demo.yaml", f"pipeline.executor={where}")
    wait_for(chain.control / "pretrain.sleeping")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert stderr == "sft: not started, because the run was asked to stop; run the same command to go on\n"
    assert list(chain.summary()) == chain.calls() == ["prepare", "pretrain"]


def test_doctor_writes_and_reads_back_and_recognises_a_cuda_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from pipeline import doctor

    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor, "_imports", lambda name: doctor.Finding(ok=True, subject=name, text="1.0"))
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = rlhf(capsys, "doctor")
    assert code == 4
    assert re.search(r"^FAIL torchvision .*pip uninstall -y torchvision", stdout, re.M)
    assert re.search(r"^ok +outputs .*written and read back", stdout, re.M)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "stream"),
    [(["check", "demo.yaml"], 0), (["generate", "nowhere", "hello"], 1), (["schema"], None)],
)
def test_what_the_environment_sets_is_unset_and_said_where_it_disturbs_nothing(
    chain: Chain, capsys, monkeypatch, arguments: list[str], stream: int | None
):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    _, *streams = rlhf(capsys, *arguments)
    line = (
        "note: environment: RAY_ADDRESS, VLLM_CPU_KVCACHE_SPACE: unset, because the config decides: "
        "resources.address, rollout.kv_cache_mib\n"
    )
    assert [index for index, text in enumerate(streams) if line in text] == (
        [] if stream is None else [stream]
    )
    assert not {"VLLM_CPU_KVCACHE_SPACE", "RAY_ADDRESS"} & os.environ.keys()
