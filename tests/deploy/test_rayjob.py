"""The Kubernetes manifest: valid, and able to hold what its config reserves."""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline import dag, placement
from pipeline.config import load
from stages.bundles import lacking

ROOT = Path(__file__).parents[2]
SCHEMA = yaml.safe_load((ROOT / "deploy/rayjob.schema.yaml").read_text())
JOB = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())
NAMESPACE, CLAIM = yaml.safe_load_all((ROOT / "deploy/storage.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
HEAD = CLUSTER["headGroupSpec"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
TEMPLATES = [HEAD["template"], WORKERS["template"], JOB["spec"]["submitterPodTemplate"]]
CONTAINERS = [template["spec"]["containers"][0] for template in TEMPLATES]


def config():
    words = JOB["spec"]["entrypoint"].split()
    assert words[:2] == ["rlhf", "run"]
    path = ROOT / Path(words[2]).relative_to("/opt/rlhf")
    return load(path, words[3:]).config


def test_the_manifest_is_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(JOB, SCHEMA)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (["spec"], "entrypont", "rlhf run x.yaml"),
        (["spec"], "backoffLimit", "2"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0], "maxReplicas", None),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"], "num-cpus", 0),
        (["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0], "volumeMount", []),
    ],
)
def test_a_mistake_in_the_manifest_is_found(place, key, value):
    broken = copy.deepcopy(JOB)
    target = broken
    for step in place:
        target = target[step]
    target[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_the_cluster_of_the_manifest_holds_every_stage_of_its_config():
    def resources(group):
        return {
            name: float(group["rayStartParams"][option])
            for name, option in (("CPU", "num-cpus"), ("GPU", "num-gpus"))
            if option in group["rayStartParams"]
        }

    nodes = {f"gpu-{index}": resources(WORKERS) for index in range(WORKERS["replicas"])}
    nodes["head"] = resources(HEAD)
    experiment = config()
    stages = placement.bundles_by_stage(experiment, dag.configured(experiment))
    assert str(stages["ppo"]) == "ppo: 8 x {CPU: 4, GPU: 1} + 4 engines x {GPU: 1}"
    for level in dag.levels(experiment, dag.configured(experiment)):
        assert lacking([stages[stage] for stage in level], nodes) is None
    fewer = {name: node for name, node in nodes.items() if name != "gpu-0"}
    assert "missing 4 GPU" in lacking([stages["ppo"]], fewer)


def test_the_job_trains_and_evaluates_on_all_rows_of_its_two_files():
    """The config's own parts are those of one file, for both."""
    experiment = config()
    assert experiment.sft and experiment.reward and experiment.ppo and experiment.evaluate
    trained = [*experiment.sft.data, *experiment.reward.data, *experiment.ppo.data]
    read = [(Path(source.path).name, source.part) for source in (*trained, *experiment.evaluate.prompts)]
    assert read == [("train.jsonl", "all")] * 3 + [("test.jsonl", "all")]


def test_what_kubernetes_grants_is_what_ray_is_told():
    limits = WORKERS["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert WORKERS["rayStartParams"] == {"num-cpus": limits["cpu"], "num-gpus": limits["nvidia.com/gpu"]}


def test_every_pod_has_the_token_from_the_secret_and_nobody_writes_it_down():
    for container in CONTAINERS:
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == CLUSTER["authOptions"]["mode"] == "token"
        assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "rlhf-ray-token"
    assert not re.search(r"hf_[A-Za-z0-9]{8,}", (ROOT / "deploy/rayjob.yaml").read_text())


def test_outputs_lie_on_the_claim_that_all_nodes_mount_and_shared_memory_is_memory():
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    assert NAMESPACE["metadata"]["name"] == CLAIM["metadata"]["namespace"] == JOB["metadata"]["namespace"]
    for template in (HEAD["template"], WORKERS["template"]):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {
            m["mountPath"]: volumes[m["name"]] for m in template["spec"]["containers"][0]["volumeMounts"]
        }
        claim = mounts["/mnt/rlhf"]["persistentVolumeClaim"]["claimName"]
        assert claim == CLAIM["metadata"]["name"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert str(config().outputs).startswith("/mnt/rlhf/")


def test_the_images_and_the_ray_version_are_the_projects_own():
    import ray

    assert len({container["image"] for container in CONTAINERS}) == 1
    assert CLUSTER["rayVersion"] == ray.__version__
