"""The campaign itself: its plan, and a short one on real runs. `make chaos` is the long one."""

import re

import campaign
import pytest
from aims import ENGINE_VICTIMS, NUM_KILLS, engine_of, plan_of
from campaign import RESULTS, Campaign
from results import page

NUM_RUNS = 10


def test_a_plan_is_a_function_of_seed_and_run_and_follows_the_stages():
    assert plan_of(0, 3) == plan_of(0, 3) != plan_of(1, 3)
    order = list(NUM_KILLS)
    stages = [order.index(aim.stage) for aim in plan_of(0, 3)]
    assert stages == sorted(stages) and len(stages) == sum(NUM_KILLS.values())


def test_ten_runs_aim_a_hundred_times_at_everything_in_every_stage():
    plans = {run: plan_of(0, run) for run in range(NUM_RUNS)}
    aims = [aim for plan in plans.values() for aim in plan]
    assert len(aims) >= 100
    assert {aim.victim for aim in aims} == {
        "driver",
        "trainer",
        "stage task",
        "raylet",
        *ENGINE_VICTIMS["vllm"],
    }
    assert {aim.moment for aim in aims} == {"start", "step", "save", "journal", "sync", "engine", "end"}
    for run, plan in plans.items():
        engines = {aim.victim for aim in plan} & set(ENGINE_VICTIMS["vllm"])
        assert engines <= set(ENGINE_VICTIMS[engine_of(run)])


def test_the_page_says_when_and_of_which_code_it_was_measured_and_so_does_the_committed_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(campaign, "git_commit", lambda: 4 * "0123456789" + "-dirty")
    monkeypatch.setattr(campaign.time, "time", lambda: 1.0)
    (line,) = re.findall(r"^Measured on .*$", page(Campaign(tmp_path, seed=0))[0], re.MULTILINE)
    assert line.startswith("Measured on 1 January 1970 at commit 0123456-dirty; ")
    form = re.sub(r"on .* at", "on .* at", re.sub(r"commit [^;]*", "commit [0-9a-f]{7}", line))
    assert re.search(f"^{form}$", RESULTS.read_text(), re.MULTILINE)


@pytest.mark.slow
def test_six_kills_lose_nothing_leave_nothing_and_change_nothing(tmp_path):
    campaign = Campaign(tmp_path, seed=0)
    campaign.go_on(num_kills=6)
    text, sound = page(campaign)
    assert sound, text
    assert len(campaign.events("kill")) == 6
    campaign.go_on(num_kills=6)  # nothing is left to do
    assert "| kills | 6 |" in page(campaign)[0]
