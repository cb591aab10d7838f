"""Two workers of a stage on one machine talk through its loopback: their rendezvous asks for no token."""

import ipaddress
import json
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from inline import runtime_in

from stages.training.distributed import Worker, launched
from stages.training.ranks import barrier

pytestmark = pytest.mark.ray


def test_workers_on_one_machine_listen_on_its_loopback_alone(ray_cluster: None, tmp_path: Path):
    def note_sockets(worker: Worker) -> float:  # local: it travels by value
        total = torch.tensor([float(worker.rank + 1)])
        dist.all_reduce(total)
        connections = psutil.Process().net_connections(kind="inet")
        addresses = [item.laddr.ip for item in connections if item.status == psutil.CONN_LISTEN]
        (worker.runtime.work_dir / f"sockets-{worker.rank}.json").write_text(json.dumps(addresses))
        barrier()
        return total.item()

    with launched(note_sockets, runtime_in(tmp_path, "sft", num_workers=2)) as call:
        assert call() == 3.0
    for rank in (0, 1):
        addresses = json.loads((tmp_path / f"work/sockets-{rank}.json").read_text())
        seen_elsewhere = [item for item in addresses if not ipaddress.ip_address(item).is_loopback]
        assert len(seen_elsewhere) == 1, f"rank {rank}: more than Ray's own: {addresses}"
