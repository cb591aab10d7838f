"""What becomes of two workers when one of them fails: one line, and nobody waits for the other."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from inline import runtime_in

from rollout.ground.errors import EnvironmentProblem
from stages.errors import TrainingStopped
from stages.training.distributed import Worker, launched

pytestmark = pytest.mark.ray


def test_a_worker_that_is_killed_ends_the_stage_although_its_peer_fails_too(ray_cluster, tmp_path):
    def train(worker: Worker) -> None:  # local: it travels by value
        dist.all_reduce(torch.ones(1))
        if worker.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))

    runtime = runtime_in(tmp_path, "sft", num_workers=2)
    with launched(train, runtime) as call, pytest.raises(EnvironmentProblem, match="a training worker died"):
        call()


def test_an_error_for_the_user_of_one_worker_is_the_one_that_is_raised(ray_cluster, tmp_path):
    def train(worker: Worker) -> None:
        dist.all_reduce(torch.ones(1))
        if worker.rank == 1:
            raise TrainingStopped("sft step 7: a gate was not met")
        dist.all_reduce(torch.ones(1))

    runtime = runtime_in(tmp_path, "sft", num_workers=2)
    with (
        launched(train, runtime) as call,
        pytest.raises(TrainingStopped, match=r"^sft step 7: a gate"),
    ):
        call()
