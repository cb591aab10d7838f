"""A stage's place in the cluster: all of it within the deadline, or one line that says what there was no room
for.
"""

from dataclasses import replace

import pytest
from inline import runtime_in

from rollout.config import EngineConfig
from rollout.ground.errors import EnvironmentProblem
from stages.runtime import Runtime, StageResources
from stages.training.distributed import placed


def on_ray(tmp_path, **resources) -> Runtime:
    runtime = runtime_in(tmp_path, "sft")
    return replace(runtime, executor="ray", placement_timeout_s=1.0, resources=StageResources(**resources))


@pytest.mark.ray
def test_a_stage_whose_place_is_taken_waits_until_its_deadline_and_says_what_it_wanted(ray_cluster, tmp_path):
    with (
        placed(on_ray(tmp_path / "first", num_cpus=2)),
        pytest.raises(
            EnvironmentProblem, match=r"sft: 1 x \{CPU: 1\}: no place within 1 s; .* free.*sft or add"
        ),
        placed(on_ray(tmp_path / "second")),
    ):
        pass
    with placed(on_ray(tmp_path / "second")) as in_place:
        assert in_place.group is not None, "what was taken is given back"


@pytest.mark.ray
def test_a_stage_that_no_node_can_hold_says_so(ray_cluster, tmp_path):
    with (
        pytest.raises(
            EnvironmentProblem, match=r"no place within 1 s; the cluster has 0 GPUs on 1 node; missing"
        ),
        placed(on_ray(tmp_path, num_gpus=1)),
    ):
        pass


@pytest.mark.ray
def test_engines_are_placed_with_their_stage_and_a_place_within_is_the_same(ray_cluster, tmp_path):
    runtime = on_ray(tmp_path, num_cpus_per_engine=0.5)
    with placed(runtime, EngineConfig(sync="gloo", num_engines=2)) as in_place:
        assert in_place.group.bundle_specs == [{"CPU": 1}, {"CPU": 0.5}, {"CPU": 0.5}]
        with placed(in_place) as within:
            assert within is in_place
    with placed(runtime, EngineConfig(sync="shm", num_engines=2)) as in_place:
        assert in_place.group.bundle_specs == [{"CPU": 2}]


def test_inline_needs_no_place(tmp_path):
    runtime = runtime_in(tmp_path, "sft")
    with placed(runtime, EngineConfig()) as in_place:
        assert in_place is runtime
