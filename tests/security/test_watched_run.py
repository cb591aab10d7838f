"""What a real run shows to others: its sockets, and the secrets of its environment."""

import ipaddress
import os
from collections import Counter

import pytest
from watched_run import WatchedRun

pytestmark = pytest.mark.ray

RAYS_SERVERS = ("gcs_server", "raylet", "ray::RuntimeEnvAgent")


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def test_every_listening_socket_is_rays_or_stays_on_this_machine(watched_run: WatchedRun):
    driver = next(
        item for item in watched_run.listeners if "pipeline.cli" in item.owner or item.owner == "rlhf"
    )
    for listener in watched_run.listeners:
        known = listener.owner.startswith((*RAYS_SERVERS, "ray::")) or listener.pid == driver.pid
        assert known or is_loopback(listener.address), listener
    assert {"gcs_server", "raylet"} <= {listener.owner for listener in watched_run.listeners}


def test_the_sockets_of_vllm_are_on_the_loopback(watched_run: WatchedRun):
    of_vllm = [listener for listener in watched_run.listeners if listener.owner.startswith("VLLM")]
    assert of_vllm and all(is_loopback(listener.address) for listener in of_vllm)


def test_a_worker_has_one_open_socket_rays_own(watched_run: WatchedRun):
    """Whatever torch and vLLM open beside it in a stage, in a trainer or an engine stays on the machine."""
    sockets = {
        (item.pid, item.port)
        for item in watched_run.listeners
        if not item.owner.startswith(RAYS_SERVERS) and not is_loopback(item.address)
    }
    assert set(Counter(pid for pid, _ in sockets).values()) == {1}


def test_rays_processes_run_with_one_token_that_is_this_runs_own(watched_run: WatchedRun):
    for listener in watched_run.listeners:
        if listener.owner in ("gcs_server", "raylet"):
            assert listener.auth_mode == "token", listener
    (token,) = watched_run.tokens
    assert len(token) == 64 and token != os.environ["RAY_AUTH_TOKEN"]
    assert not (watched_run.directory / "home/.ray").exists()


def test_the_cluster_answers_nobody_without_the_token(watched_run: WatchedRun):
    assert watched_run.to_cluster == {"": "refused", "f" * 64: "refused", "the run's": "nodes: 1"}
    assert watched_run.to_agent == 401


def test_no_secret_of_the_environment_reaches_a_file_the_terminal_or_a_command_line(watched_run: WatchedRun):
    secrets = [*watched_run.secrets.values(), *watched_run.tokens]
    assert len(secrets) > 20
    files = [path for path in watched_run.directory.rglob("*") if path.is_file()]
    assert {"out", "err", "summary.json", "report.html", "raylet.out", "ppo.log"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
    assert not [line for line in watched_run.command_lines for secret in secrets if secret in line]
