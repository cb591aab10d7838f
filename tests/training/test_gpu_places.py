"""Which GPUs each process of a stage sees, and through which network interface it talks: on a real local Ray
whose four GPUs are invented, and in the environment of workers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from inline import runtime_in

from stages.training import distributed
from stages.training.distributed import launch

SCRIPT = Path(__file__).parent / "invented_gpus.py"
IMPORTABLE = os.pathsep.join(str(Path(__file__).parents[index]) for index in (1, 2))


@pytest.fixture(scope="module")
def seen(tied_model_dir, tmp_path_factory) -> dict[str, Any]:
    """What every process of every case in `invented_gpus` saw."""
    scratch = tmp_path_factory.mktemp("gpus")
    environment = {name: value for name, value in os.environ.items() if name not in TOLD}
    answer = subprocess.run(
        [sys.executable, SCRIPT, tied_model_dir, scratch],
        env=environment | {"PYTHONPATH": IMPORTABLE},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


TOLD = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def test_an_engine_that_a_worker_without_a_gpu_opens_sees_its_own(seen):
    """reward and evaluate with `num_gpus_per_engine: 1` and the default `num_gpus: 0`."""
    worker = seen["cpu worker, gpu engine"]
    assert worker["engines"] == ["0"]
    assert (worker["CUDA_VISIBLE_DEVICES"], worker["device"], worker["torch"]) == ("", "cpu", 0)


def test_a_trainer_and_an_engine_that_share_a_gpu_see_the_same_one(seen):
    assert seen["shares"] == {"workers": ["0"], "engines": ["0"]}


def test_two_trainers_and_two_engines_see_a_gpu_each(seen):
    assert seen["two and two"] == {"workers": ["0", "1"], "engines": ["2", "3"]}


def test_an_engine_of_two_gpus_sees_both(seen):
    assert seen["engine of two"] == {"workers": ["0"], "engines": ["1,2"]}


def test_gloo_talks_through_loopback_on_one_host_and_nccl_never_does(seen):
    """The id of a weight sync's nccl group holds an address of the trainer, and engines may be elsewhere."""
    assert seen["two cpu workers"]["GLOO_SOCKET_IFNAME"] == "lo"
    for case in ("two cpu workers", "cpu worker, gpu engine"):
        assert seen[case]["NCCL_SOCKET_IFNAME"] != "lo"


@pytest.fixture
def two_interfaces(monkeypatch):
    """A machine with loopback and one network, and none of ours in its environment."""
    addresses = {
        "lo": [SimpleNamespace(address="127.0.0.1"), SimpleNamespace(address="::1")],
        "ib0": [SimpleNamespace(address="10.0.0.7")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what is set below ends with the test
        monkeypatch.delenv(name)


def test_nccl_talks_through_the_interface_that_other_nodes_know_this_one_by(two_interfaces):
    distributed._nccl_talks_through("10.0.0.7")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_nccl_is_left_alone_where_this_node_is_known_by_loopback_only(two_interfaces, address):
    distributed._nccl_talks_through(address)
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_an_interface_that_the_machines_owner_has_chosen_stays(two_interfaces, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=ib1")
    distributed._nccl_talks_through("10.0.0.7")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=ib1"


def test_a_group_of_one_in_bf16_leaves_nccl_alone(two_interfaces, monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "_init_process_group", lambda *_, **__: None)
    worker = distributed.Worker(
        rank=0, world_size=1, device=torch.device("cpu"), runtime=runtime_in(tmp_path, "sft")
    )
    distributed._ensure_process_group(worker)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo" and "NCCL_SOCKET_IFNAME" not in os.environ


def test_fp32_matrix_products_of_a_trainer_are_fp32_whatever_was_set_before(tmp_path):
    torch.set_float32_matmul_precision("medium")
    try:
        found = launch(lambda worker: torch.get_float32_matmul_precision(), runtime_in(tmp_path, "sft"))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found == "highest"
