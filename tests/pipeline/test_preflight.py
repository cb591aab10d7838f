"""What is asked of the machine before the first stage, and how a container's limits are read."""

from pathlib import Path

import pytest
from fake_chain import Chain

from pipeline import cli, machine, planning
from pipeline.machine import MachineMemory
from pipeline.preflight import check_machine
from rollout.ground.errors import EnvironmentProblem

MIB, GIB = 2**20, 2**30
LARGE = (
    "model.hidden_size=1024",
    "model.layers=24",
    "model.num_heads=16",
    "model.num_kv_heads=16",
    "model.intermediate_size=4096",
)
SMALL_QUEUE = "160 MiB required, 64 MiB free; give the container more, e.g. docker run --shm-size=8g"


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has enough of everything."""
    monkeypatch.setattr(machine, "shared_memory_free", lambda: 100 * GIB)
    monkeypatch.setattr(machine, "memory", lambda: MachineMemory(total=100 * GIB, free=100 * GIB))
    monkeypatch.setattr(machine, "core_quota", lambda: None)
    monkeypatch.setattr(machine, "open_files", lambda: 8192)
    monkeypatch.setattr(machine, "raise_open_files", lambda wanted: None)


def remarks(chain: Chain, *overrides: str) -> list[str]:
    return check_machine(planning.plan_run(chain.config(*overrides)))


def test_a_machine_with_enough_of_everything_is_not_remarked_on(chain: Chain):
    assert remarks(chain) == remarks(chain, "pipeline.executor=ray") == []


@pytest.mark.parametrize(
    ("overrides", "free", "line"),
    [
        ((), 64 * MIB, f"reward: the queue of an engine's processes: /dev/shm: {SMALL_QUEUE}"),
        (("rollout.engine=hf",), 64 * MIB, None),
        (("rollout.engine=hf", *LARGE), 64 * MIB, "ppo: the weights of a sync: /dev/shm: 1"),
        (LARGE, 200 * MIB, "ppo: the weights of a sync: /dev/shm: 1"),
        ((), 200 * MIB, None),
    ],
)
def test_shared_memory_is_compared_with_what_engines_and_syncs_take(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], free: int, line: str | None
):
    monkeypatch.setattr(machine, "shared_memory_free", lambda: free)
    if line is None:
        assert remarks(chain, *overrides) == []
        return
    with pytest.raises(EnvironmentProblem) as raised:
        remarks(chain, *overrides)
    assert str(raised.value).startswith(line)


def test_it_is_asked_before_any_stage_and_costs_one_line(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(machine, "shared_memory_free", lambda: 64 * MIB)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "demo.yaml"])
    assert (ended.value.code, capsys.readouterr().err.count("\n"), chain.calls()) == (4, 1, [])
    with pytest.raises(SystemExit) as ended:  # no engine, no need
        cli.main(["run", "demo.yaml", "--until", "sft"])
    assert ended.value.code == 0


def test_missing_packages_are_found_before_the_stage_that_needs_them(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rollout.engines.importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"vllm is not installed; .*rollout\.engine: hf"):
        remarks(chain)
    assert remarks(chain, "rollout.engine=hf") == []


def test_weights_and_moments_beyond_all_memory_end_it_and_a_peak_beyond_the_free_is_said(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "memory", lambda: MachineMemory(total=100 * GIB, free=GIB))
    said = remarks(chain, *LARGE)
    assert any(
        line.startswith("pretrain: about ") and "GiB at its peak, and 1 GiB are free" in line for line in said
    )
    monkeypatch.setattr(machine, "memory", lambda: MachineMemory(total=2 * GIB, free=GIB))
    with pytest.raises(
        EnvironmentProblem, match=r"pretrain: holds 6.* GiB \(Adam .*\), .*this machine has 2 GiB with"
    ):
        remarks(chain, *LARGE)
    with pytest.raises(EnvironmentProblem, match=r"keys and values .*; lower rollout\.kv_cache_mib"):
        remarks(chain, "rollout.kv_cache_mib=9000")


def test_few_open_files_are_said_to_a_run_on_ray(chain: Chain, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "open_files", lambda: 64)
    (remark,) = remarks(chain, "pipeline.executor=ray")
    assert remark.startswith(
        "open files: a process may have 64 open at once; Ray asks for 8192: ulimit -n 8192"
    )
    assert remarks(chain) == []


def test_a_process_raises_its_own_limit_of_open_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # of what is roomy
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(machine.resource, "setrlimit", lambda _, limits: raised.append(limits))
    machine.raise_open_files(8192)
    machine.raise_open_files(100)
    assert raised == [(4096, 4096)]


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the files of a control group; "" is the root as a container sees it."""

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(text)

    monkeypatch.undo()  # of what is roomy
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "fs")
    return write


V2 = {
    "memory.max": f"{GIB}\n",
    "memory.current": f"{GIB // 2}\n",
    "memory.stat": f"anon 5\ninactive_file {64 * MIB}\n",
}
V1 = {
    "memory/memory.limit_in_bytes": f"{GIB}\n",
    "memory/memory.usage_in_bytes": f"{GIB // 2}\n",
    "memory/memory.stat": f"inactive_file {64 * MIB}\n",
}


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", V2),
        (
            "0::/user.slice/app\n",
            {"user.slice/app/memory.max": "max\n", **{f"user.slice/{k}": v for k, v in V2.items()}},
        ),
        ("11:memory:/docker/7\n", V1),  # whose group is at the root, inside
    ],
)
def test_the_memory_of_a_container_is_that_of_its_narrowest_group(container, own: str, files: dict[str, str]):
    container(own, files)
    memory = machine.memory()
    assert memory.total == GIB and memory.free <= GIB // 2 + 64 * MIB


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        (
            "4:cpu,cpuacct:/x\n",
            {"cpu/cpu.cfs_quota_us": "25000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            0.25,
        ),
        ("4:cpu,cpuacct:/x\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)
def test_the_quota_of_a_container_is_read(container, own: str, files: dict[str, str], quota: float | None):
    container(own, files)
    assert machine.core_quota() == quota
