"""Runs on a real Ray cluster of two nodes, joined through `resources.address`."""

import json
import time
from pathlib import Path

import pytest
from cli_runs import CONFIG
from two_nodes import CPUS_PER_NODE, TwoNodes, another_raylet

pytestmark = pytest.mark.ray

LOCAL_CONFIG = CONFIG.replace("rollout: {", "rollout: {engine: hf, ")


@pytest.fixture
def directory(cluster: TwoNodes, tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(f"{LOCAL_CONFIG}\nresources: {{address: '{cluster.address}'}}\n")
    return tmp_path


def refused(result) -> str:
    """The one line of a command that ended with code 4."""
    assert result.returncode == 4, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    line = result.stderr.strip()
    return line


def test_a_cluster_is_not_joined_without_its_token_in_the_environment(cluster: TwoNodes, directory: Path):
    started = time.monotonic()
    line = refused(cluster.rlhf(directory, "run", "tiny.yaml", "--until", "prepare", token=""))
    assert cluster.address in line and "RAY_AUTH_TOKEN" in line
    assert time.monotonic() - started < 60


def test_a_dead_address_is_one_line_at_once(cluster: TwoNodes, directory: Path):
    override = f"resources.address={cluster.hosts[0]}:1"
    line = refused(cluster.rlhf(directory, "run", "tiny.yaml", override, "--until", "prepare"))
    assert f"{cluster.hosts[0]}:1: no answer (Connection refused)" in line


def test_bundles_that_can_never_be_placed_are_named_before_any_stage_starts(
    cluster: TwoNodes, directory: Path
):
    override = "resources.sft.num_cpus=3"
    line = refused(cluster.rlhf(directory, "run", "tiny.yaml", override, "--until", "sft"))
    assert line.startswith("sft: 1 x {CPU: 3}: a bundle is never split over nodes")
    line = refused(cluster.rlhf(directory, "run", "tiny.yaml", "resources.ppo.num_gpus=1", "--until", "ppo"))
    assert "the cluster has 0 GPUs on 2 nodes; missing 1 GPU" in line
    assert not list(directory.glob("outputs/artifacts/*"))


def test_doctor_asks_every_node_also_where_two_have_one_address(cluster: TwoNodes, directory: Path):
    with another_raylet(cluster):
        result = cluster.rlhf(directory, "doctor", "--address", cluster.address)
    nodes = [line for line in result.stdout.splitlines() if line.split()[1] == "node"]
    assert len(nodes) == 3 and all(line.startswith("ok") for line in nodes), result.stdout
    assert [sum(host in line for line in nodes) for host in cluster.hosts] == [2, 1]


def test_a_node_that_does_not_see_the_outputs_is_named(cluster: TwoNodes, directory: Path, tmp_path: Path):
    if cluster.hidden is None:  # mounting is not permitted here: the same line from what a node would say
        from pipeline.cluster import nonce_in, problems, report

        with nonce_in(tmp_path) as (file, nonce):
            ((node, line),) = problems([(cluster.hosts[1], report(tmp_path / "other"))], file, nonce)
        assert node == cluster.hosts[1] and "does not see" in line
        return
    override = f"outputs={cluster.hidden}"
    line = refused(cluster.rlhf(directory, "run", "tiny.yaml", override, "--until", "prepare"))
    assert f"node {cluster.hosts[1]} does not see {cluster.hidden}" in line


def test_stages_run_on_a_joined_cluster(cluster: TwoNodes, directory: Path):
    result = cluster.rlhf(directory, "run", "tiny.yaml", "--until", "pretrain")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((directory / "outputs/runs/tiny/summary.json").read_text())
    assert list(summary) == ["prepare", "pretrain"]


@pytest.mark.slow
def test_a_wrong_token_is_one_line(cluster: TwoNodes, directory: Path):
    """Ray tries for 20 s."""
    line = refused(cluster.rlhf(directory, "run", "tiny.yaml", "--until", "prepare", token="0" * 64))
    assert f"resources.address {cluster.address}: not joined" in line and "token" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "sync", "ppo_resources"),
    [
        # an engine that takes a node: the trainer is on the other
        ("hf", "gloo", [f"num_cpus_per_engine={CPUS_PER_NODE}"]),
        ("vllm", "gloo", [f"num_cpus_per_engine={CPUS_PER_NODE}"]),
        # two trainers that take a node each: the engine maps the file of the first
        ("hf", "shm", ["num_workers=2", f"num_cpus={CPUS_PER_NODE}"]),
    ],
    ids=["hf-gloo", "vllm-gloo", "hf-shm"],
)
def test_the_whole_chain_runs_on_two_nodes(
    cluster: TwoNodes, directory: Path, engine: str, sync: str, ppo_resources: list[str]
):
    """The two trainers of sft are on different hosts in every case."""
    overrides = [
        "resources.sft.num_workers=2",
        f"resources.sft.num_cpus={CPUS_PER_NODE}",
        f"rollout.engine={engine}",
        f"rollout.sync={sync}",
        *(f"resources.ppo.{setting}" for setting in ppo_resources),
    ]
    result = cluster.rlhf(directory, "run", "tiny.yaml", *overrides, timeout_s=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((directory / "outputs/runs/tiny/summary.json").read_text())
    assert summary["ppo"]["metrics"]["version_final"] == 2
    assert summary["ppo"]["metrics"]["parity_max_abs_diff"] <= 1e-4
