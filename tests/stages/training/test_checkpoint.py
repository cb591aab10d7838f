"""Checkpoints: bit for bit on any number of workers, not believed when damaged, untouched by a full disk."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sharded_checkpoints
import torch
import torch.distributed.checkpoint as dcp
from forks import RANKS
from sharded_checkpoints import make_optimizer, numbers_of, take_steps

from rollout.ground.errors import EnvironmentProblem
from stages.training import checkpoint as checkpoint_module
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_record import RECORD_FILE

ROOT = Path(__file__).parents[3]


def save(work_dir: Path, *steps: int, score: float | None = None, regular: bool = True) -> None:
    """Checkpoints of a training that took `steps` steps each; every step's state is its own."""
    for step in steps:
        optimizer = make_optimizer()
        take_steps(optimizer, step)
        extra = {"loss": step / 7}
        Checkpoints(work_dir).save(step, {"model": optimizer.state()}, extra, score=score, regular=regular)


def restored(work_dir: Path) -> tuple[int, dict]:
    """What restore says; the state it loaded is that of the step it says."""
    optimizer = make_optimizer()
    step, extra = Checkpoints(work_dir).restore({"model": optimizer.state()})
    expected = make_optimizer()
    take_steps(expected, step)
    if step:
        assert_same(numbers_of(optimizer), numbers_of(expected))
    return step, extra


def assert_same(numbers: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(numbers) == list(expected)
    for name, tensor in numbers.items():
        assert torch.equal(tensor, expected[name]), name


def checkpoint(work_dir: Path, step: int) -> Path:
    return work_dir / "checkpoints" / f"step-{step:06d}"


def data_file(directory: Path) -> Path:
    return next(directory.glob("*.distcp"))


def lines_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What our own code said; DCP's writes about every call."""
    return [record.getMessage() for record in caplog.records if record.name == checkpoint_module.__name__]


def names_in(work_dir: Path) -> list[str]:
    return sorted(path.name for path in (work_dir / "checkpoints").iterdir())


# --- what a checkpoint holds


def test_weights_moments_step_counts_and_parameter_order_come_back_bit_for_bit(tmp_path: Path):
    save(tmp_path, 3)
    assert restored(tmp_path) == (3, {"loss": 3 / 7})


def test_training_goes_on_in_the_same_bits(tmp_path: Path):
    save(tmp_path, 3)
    resumed, whole = make_optimizer(), make_optimizer()
    Checkpoints(tmp_path).restore({"model": resumed.state()})
    take_steps(resumed, 4, first=3)
    take_steps(whole, 7)
    assert_same(numbers_of(resumed), numbers_of(whole))


def test_torchs_own_generator_is_part_of_a_checkpoint(tmp_path: Path):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        save(tmp_path, 1)
        torch.manual_seed(5)
        make_optimizer()
        drawn = torch.rand(3)
        torch.manual_seed(6)
        restored(tmp_path)
        Checkpoints(tmp_path).restore({"model": make_optimizer().state()})
        assert torch.equal(torch.rand(3), drawn)


def test_extras_come_back_as_they_were_also_where_they_are_no_numbers(tmp_path: Path):
    extra = {"a": 0.1 + 0.2, "b": [float("inf"), -0.0], "c": {"d": None, "é": "ü"}}
    Checkpoints(tmp_path).save(1, {"model": make_optimizer().state()}, extra)
    assert repr(Checkpoints(tmp_path).restore({"model": make_optimizer().state()})) == repr((1, extra))


def test_the_record_names_every_file_with_its_size_and_digest(tmp_path: Path):
    save(tmp_path, 1)
    directory = checkpoint(tmp_path, 1)
    record = json.loads((directory / RECORD_FILE).read_text())
    assert {name: one["size"] for name, one in record["files"].items()} == {
        path.name: path.stat().st_size for path in directory.iterdir() if path.name != RECORD_FILE
    }
    assert ".metadata" in record["files"]
    assert (record["step"], record["world_size"], record["owner"]) == (1, 1, tmp_path.name)
    assert record["torch_version"] == torch.__version__


def test_all_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path: Path, monkeypatch):
    synced, rename, fsync = [], Path.rename, os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def checked(path: Path, target: Path) -> Path:
        if target == checkpoint(tmp_path, 1):
            assert {path, *path.rglob("*")} <= set(synced)
            synced.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "rename", checked)
    save(tmp_path, 1)
    assert synced == [tmp_path / "checkpoints"]


# --- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def bad_sector(path: Path) -> None:
    """From now on reading `path` fails as it does on a broken disk: no memory lies at address 0."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def edit_record(directory: Path, **changes: object) -> None:
    path = directory / RECORD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, sort_keys=True) + "\n")


DAMAGE = {
    "a flipped bit": (lambda path: flip(data_file(path)), r"__0_0\.distcp: not the bytes"),
    "a flipped bit in the index": (lambda path: flip(path / ".metadata"), r"\.metadata: not the bytes"),
    "a longer file": (lambda path: data_file(path).open("ab").write(b"\0"), r"distcp: not the bytes"),
    "a cut file": (lambda path: os.truncate(data_file(path), 1000), r"distcp: not the bytes"),
    "an empty file": (lambda path: os.truncate(data_file(path), 0), r"distcp: not the bytes"),
    "a missing file": (lambda path: data_file(path).unlink(), r"distcp: missing"),
    "a file too many": (lambda path: (path / "__1_0.distcp").touch(), r"__1_0\.distcp: not listed in"),
    "no record": (lambda path: (path / RECORD_FILE).unlink(), r"checkpoint\.json: missing"),
    "a cut record": (lambda path: os.truncate(path / RECORD_FILE, 50), r"checkpoint\.json: not a record"),
    "an empty record": (lambda path: (path / RECORD_FILE).write_text("{}"), r"not a record"),
    "no json": (lambda path: (path / RECORD_FILE).write_bytes(b"\xff\0"), r"not a record"),
    "a record on a bad sector": (
        lambda path: bad_sector(path / RECORD_FILE),
        r"checkpoint\.json: Input/output error",
    ),
    "another extra": (lambda path: edit_record(path, extra={}), r"not the record that was written"),
    "another step": (lambda path: edit_record(path, step=5), r"not the record that was written"),
    "a field too many": (lambda path: edit_record(path, more=1), r"not the record that was written"),
    "a link": (
        lambda path: (
            data_file(path).rename(path.parent / "x"),
            (path / "__0_0.distcp").symlink_to(path.parent / "x"),
        ),
        r"__0_0\.distcp: a link",
    ),
    "a directory in a file's place": (
        lambda path: (data_file(path).rename(path / "x"), (path / "__0_0.distcp").mkdir()),
        r"distcp: missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_costs_one_line_and_the_one_before_it_is_taken(
    tmp_path: Path, caplog, kind: str
):
    damage, reason = DAMAGE[kind]
    save(tmp_path, 3, 6)
    damage(checkpoint(tmp_path, 6))
    assert restored(tmp_path) == (3, {"loss": 3 / 7})
    [line] = lines_in(caplog)
    assert line.startswith(f"{checkpoint(tmp_path, 6)}: damaged checkpoint: ")
    assert line.endswith("; taking the one before it")
    assert re.search(reason, line)


def test_a_checkpoint_under_another_step_or_stage_is_not_taken(tmp_path: Path, caplog):
    save(tmp_path / "sft-1", 3)
    save(tmp_path / "sft-2", 2)
    shutil.copytree(checkpoint(tmp_path / "sft-1", 3), checkpoint(tmp_path / "sft-1", 4))
    assert restored(tmp_path / "sft-1")[0] == 3
    shutil.copytree(checkpoint(tmp_path / "sft-1", 3), checkpoint(tmp_path / "sft-2", 3))
    assert restored(tmp_path / "sft-2")[0] == 2
    assert "of step 3" in lines_in(caplog)[0] and "of sft-1, not of sft-2" in lines_in(caplog)[1]


def test_with_no_sound_checkpoint_training_starts_again_and_says_so(tmp_path: Path, caplog):
    save(tmp_path, 3, 6)
    for step in (3, 6):
        flip(data_file(checkpoint(tmp_path, step)))
    assert restored(tmp_path) == (0, {})
    assert lines_in(caplog)[-1].endswith("checkpoints: none of 2 can be loaded; starting from step 0")


def test_without_checkpoints_nothing_is_said(tmp_path: Path, caplog):
    assert restored(tmp_path) == (0, {})
    assert not lines_in(caplog)


def test_checkpoints_of_older_schemas_are_named_in_one_line_and_go_with_the_next_of_ours(
    tmp_path: Path, caplog
):
    save(tmp_path, 3, 6)
    edit_record(checkpoint(tmp_path, 3), schema_version=1)
    edit_record(checkpoint(tmp_path, 6), schema_version=2, new_field=1)
    for _ in range(2):
        caplog.clear()
        assert restored(tmp_path) == (0, {})
        [line, nothing_left] = lines_in(caplog)
        assert "checkpoints of schema version 1, 2 are not loaded, this code reads 3; older ones" in line
        assert nothing_left.endswith("none of 2 can be loaded; starting from step 0")
    save(tmp_path, 6)
    assert names_in(tmp_path) == ["step-000006"]
    caplog.clear()
    assert restored(tmp_path)[0] == 6 and not lines_in(caplog)


def test_a_newer_schema_version_is_named_beside_ours_and_never_deleted(tmp_path: Path, caplog):
    save(tmp_path, 3, 6)
    edit_record(checkpoint(tmp_path, 6), schema_version=4, new_field=1)
    content = {path.name: path.read_bytes() for path in checkpoint(tmp_path, 6).iterdir()}
    assert restored(tmp_path)[0] == 3
    [line] = lines_in(caplog)
    assert "schema version 4 are not loaded, this code reads 3" in line
    save(tmp_path, 4, 5, 6, 7)
    kept = checkpoint(tmp_path, 6).with_name("step-000006.other")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == content
    assert names_in(tmp_path) == ["step-000006", "step-000006.other", "step-000007"]


def test_a_damaged_checkpoint_does_not_push_a_sound_one_out(tmp_path: Path):
    save(tmp_path, 3, 6)
    flip(data_file(checkpoint(tmp_path, 6)))
    assert restored(tmp_path)[0] == 3
    save(tmp_path, 5)
    assert names_in(tmp_path) == ["step-000003", "step-000005", "step-000006.damaged"]
    save(tmp_path, 6)
    assert names_in(tmp_path) == ["step-000005", "step-000006", "step-000006.damaged"]
    assert restored(tmp_path)[0] == 6


def test_a_checkpoint_under_another_step_does_not_push_a_sound_one_out(tmp_path: Path):
    save(tmp_path, 3, 4)
    for step in (8, 9):
        shutil.copytree(checkpoint(tmp_path, 3), checkpoint(tmp_path, step))
    save(tmp_path, 5)
    assert names_in(tmp_path) == [f"step-00000{step}" for step in (4, 5, 8, 9)]
    assert restored(tmp_path)[0] == 5


def test_another_torch_version_is_mentioned(tmp_path: Path, caplog, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "1.0")
        save(tmp_path, 3)
    assert restored(tmp_path)[0] == 3
    assert "written by torch 1.0" in caplog.text


def test_no_pickle_is_opened_before_its_digest_was_compared(tmp_path: Path):
    save(tmp_path, 3, 6)
    ran = tmp_path / "ran"
    metadata = checkpoint(tmp_path, 6) / ".metadata"
    metadata.write_bytes(b"cos\nmkdir\n(S'" + os.fsencode(ran) + b"'\ntR.")
    assert restored(tmp_path)[0] == 3
    assert not ran.exists()
    with pytest.raises(BaseException, match="metadata"):
        dcp.load(
            {"x": torch.zeros(1)}, checkpoint_id=tmp_path / "checkpoints/step-000006.damaged", no_dist=True
        )
    assert ran.exists(), "the planted pickle does run where nothing is compared"


# --- which are kept


def test_the_last_two_and_the_best_are_kept(tmp_path: Path):
    for step, score in ((1, -4.0), (2, -1.0), (3, -3.0), (4, float("nan")), (5, -2.0), (6, float("inf"))):
        save(tmp_path, step, score=score)
    assert names_in(tmp_path) == ["step-000002", "step-000005", "step-000006"]
    best = Checkpoints(tmp_path).best()
    assert best is not None
    assert (best.step, best.score, best.directory) == (2, -1.0, checkpoint(tmp_path, 2))
    save(tmp_path, 7, score=-1.0)
    assert names_in(tmp_path) == ["step-000006", "step-000007"], "of equals, the newest is best"


def test_without_scores_there_is_no_best(tmp_path: Path):
    save(tmp_path, 1, 2, 3)
    assert names_in(tmp_path) == ["step-000002", "step-000003"]
    assert Checkpoints(tmp_path).best() is None


def test_a_damaged_best_gives_way_to_the_next(tmp_path: Path, caplog):
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0)):
        save(tmp_path, step, score=score)
    flip(data_file(checkpoint(tmp_path, 1)))
    best = Checkpoints(tmp_path).best()
    assert best is not None and best.step == 3
    assert "step-000001: damaged checkpoint" in caplog.text


def test_steps_count_as_numbers_and_not_as_text(tmp_path: Path):
    save(tmp_path, 3)
    for step in (999_999, 1_000_000):
        Checkpoints(tmp_path).save(step, {"model": make_optimizer().state()}, {})
    assert names_in(tmp_path) == ["step-1000000", "step-999999"]
    assert Checkpoints(tmp_path).restore({"model": make_optimizer().state()})[0] == 1_000_000


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path: Path):
    save(tmp_path, 3)
    Checkpoints(tmp_path).save(3, {"model": make_optimizer().state()}, {"again": True})
    assert Checkpoints(tmp_path).restore({"model": make_optimizer().state()}) == (3, {"again": True})
    assert names_in(tmp_path) == ["step-000003"]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing is cleaned up."""


def dies_at_operation(count: int, patched: pytest.MonkeyPatch, save_once: Callable[[], None]) -> bool:
    """Call `save_once` and kill it before its disk operation `count`, from 1; False once it has no such
    operation any more.
    """
    left = [count]

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            return operation(*arguments, **options)

        return run

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "write_text"), (shutil, "rmtree")):
        patched.setattr(owner, name, counted(getattr(owner, name)))
    try:
        save_once()
    except Killed:
        return True
    return False


@pytest.mark.parametrize("saved_before", [(1, 2), (1, 2, 3)])
def test_a_kill_at_any_moment_of_a_save_leaves_a_sound_checkpoint(
    tmp_path: Path, monkeypatch, caplog, saved_before: tuple[int, ...]
):
    """Also where step 3 is saved again."""
    found = []
    for count in itertools.count(1):
        work_dir = tmp_path / str(count) / "sft"
        save(work_dir, *saved_before)
        with monkeypatch.context() as patched:
            died = dies_at_operation(count, patched, partial(save, work_dir, 3))
        found.append(restored(work_dir)[0])
        save(work_dir, 4)
        assert restored(work_dir)[0] == 4
        if not died:
            break
    assert len(found) > 8
    assert found == sorted(found)
    assert set(found) == {saved_before[-1], 3}
    assert not lines_in(caplog)


def test_what_killed_saves_left_is_removed_at_the_start(tmp_path: Path):
    save(tmp_path, 3)
    shutil.copytree(checkpoint(tmp_path, 3), checkpoint(tmp_path, 6).with_suffix(".tmp"))
    (tmp_path / "checkpoints" / "a-file.tmp").touch()
    Checkpoints(tmp_path)
    assert names_in(tmp_path) == ["step-000003"]


# --- going back


def rolled_back(work_dir: Path) -> tuple[int, dict]:
    return Checkpoints(work_dir).roll_back({"model": make_optimizer().state()})


def test_what_a_stop_left_is_resumed_from_and_gives_way_to_the_next_without_pushing_a_regular_one_out(
    tmp_path: Path,
):
    save(tmp_path, 1, 2, 3)
    save(tmp_path, 4, score=9.0, regular=False)
    assert names_in(tmp_path) == ["step-000002", "step-000003", "step-000004"]
    assert restored(tmp_path)[0] == 4
    assert Checkpoints(tmp_path).best() is None
    save(tmp_path, 5, regular=False)
    assert names_in(tmp_path) == ["step-000002", "step-000003", "step-000005"]
    save(tmp_path, 6)
    assert names_in(tmp_path) == ["step-000003", "step-000006"]


def test_training_goes_back_to_the_newest_regular_checkpoint_and_those_behind_it_are_gone(
    tmp_path: Path, caplog
):
    save(tmp_path, 2, 3)
    save(tmp_path, 4, regular=False)
    assert rolled_back(tmp_path) == (3, {"loss": 3 / 7})
    assert names_in(tmp_path) == ["step-000002", "step-000003"]
    assert not lines_in(caplog)


def test_without_a_regular_checkpoint_there_is_no_going_back_and_the_others_stay(tmp_path: Path, caplog):
    save(tmp_path, 4, regular=False)
    assert rolled_back(tmp_path) == (0, {})
    assert names_in(tmp_path) == ["step-000004"]
    assert not lines_in(caplog)


def test_a_damaged_place_to_go_back_to_gives_way_to_the_one_before_it(tmp_path: Path, caplog):
    save(tmp_path, 2, 3)
    save(tmp_path, 4, regular=False)
    flip(data_file(checkpoint(tmp_path, 3)))
    assert rolled_back(tmp_path)[0] == 2
    assert names_in(tmp_path) == ["step-000002", "step-000003.damaged"]
    assert "step-000003: damaged checkpoint" in caplog.text


def test_a_kill_at_any_moment_of_going_back_leaves_what_was_or_the_place_gone_back_to(
    tmp_path: Path, monkeypatch, caplog
):
    """Never less than the regular checkpoint; a later execution goes back again where it has to."""
    found = []
    for count in itertools.count(1):
        work_dir = tmp_path / str(count) / "sft"
        save(work_dir, 3)
        save(work_dir, 5, regular=False)
        with monkeypatch.context() as patched:
            died = dies_at_operation(count, patched, partial(rolled_back, work_dir))
        found.append(restored(work_dir)[0])
        assert rolled_back(work_dir)[0] == restored(work_dir)[0] == 3
        if not died:
            break
    assert found == sorted(found, reverse=True) and set(found) == {5, 3}
    assert not lines_in(caplog)


# --- disks that refuse


def test_without_room_nothing_is_touched_and_one_line_says_how_much_is_missing(tmp_path: Path, monkeypatch):
    save(tmp_path, 3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    usage = shutil.disk_usage(tmp_path)
    size = sum(path.stat().st_size for path in checkpoint(tmp_path, 3).iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
        with pytest.raises(EnvironmentProblem, match=r"step 4 needs .* MiB and .* MiB are free;") as caught:
            save(tmp_path, 4)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")} == before


def test_a_file_where_the_directory_should_be_is_one_line(tmp_path: Path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(EnvironmentProblem, match=r"checkpoints: File exists"):
        Checkpoints(tmp_path)


PRIVATE_MOUNT = ["unshare", "--mount", "--propagation", "private"]


def may_mount() -> bool:
    """Whether this process may mount a file system of its own."""
    try:
        probe = [*PRIVATE_MOUNT, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(probe, capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


@pytest.mark.process
@pytest.mark.parametrize("limit", ["file_size", *(["small_disk"] if may_mount() else [])])
def test_a_disk_that_refuses_in_the_middle_of_a_save_is_one_line_and_earlier_checkpoints_hold(
    tmp_path: Path, limit: str
):
    """In a process of its own: with a limit on file sizes, and where this may mount, on a full, then a
    read-only disk.
    """
    command = [sys.executable, sharded_checkpoints.__file__, limit, str(tmp_path)]
    answer = subprocess.run(
        [*PRIVATE_MOUNT, *command] if limit == "small_disk" else command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    refusals = json.loads(answer.stdout)
    assert all("\n" not in line and "run the same command to go on" in line for line in refusals.values())
    expected = {
        "file_size": {"in the middle": "File too large"},
        "small_disk": {
            "before": "MiB are free",
            "in the middle": "No space left on device",
            "read only": "Read-only file system",
        },
    }[limit]
    assert refusals.keys() == expected.keys()
    for when, reason in expected.items():
        assert reason in refusals[when]


# --- several workers


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What three real processes saw that saved and restored in groups of one, two and three."""
    with RANKS.forking():
        return sharded_checkpoints.run_ranks(tmp_path_factory.mktemp("sharded"))


@pytest.mark.process
@pytest.mark.parametrize("saved_on", [1, 2])
@pytest.mark.parametrize("restored_on", [1, 2, 3])
def test_a_checkpoint_loads_on_any_number_of_workers(
    sharded: dict[str, dict], saved_on: int, restored_on: int
):
    expected = sharded[f"saved on {saved_on}"]
    found = sharded[f"saved on {saved_on}, restored on {restored_on}"]
    assert found["step"] == 4 and found["extra"] == {"loss": 0.25}
    assert_same(found["numbers"], expected["numbers"])


@pytest.mark.process
def test_the_record_of_two_workers_says_so(sharded: dict[str, dict]):
    record = sharded["saved on 2"]["record"]
    assert record["world_size"] == 2
    assert {name for name in record["files"] if name.endswith(".distcp")} == {"__0_0.distcp", "__1_0.distcp"}


@pytest.mark.process
def test_all_workers_pass_over_a_damaged_checkpoint_together(sharded: dict[str, dict]):
    assert sharded["damaged"]["steps"] == [4, 4]


@pytest.mark.process
def test_all_workers_go_back_to_the_same_checkpoint_and_the_first_one_removes_those_behind_it(
    sharded: dict[str, dict],
):
    assert sharded["rolled back"]["steps"] == [3, 3]
    assert sharded["rolled back"]["left"] == ["step-000003"]


@pytest.mark.process
def test_all_workers_hear_of_a_disk_that_refuses_one_of_them(sharded: dict[str, dict]):
    lines = sharded["refused"]["lines"]
    assert len(lines) == 2 and all("No space left on device" in line for line in lines)
    assert sharded["refused"]["left"] == ["step-000004"]


@pytest.mark.process
def test_all_workers_hear_that_there_is_no_room(sharded: dict[str, dict]):
    lines = sharded["no room"]["lines"]
    assert len(lines) == 2 and lines[0] == lines[1] and "MiB are free" in lines[0]


@pytest.mark.process
def test_all_workers_go_on_with_the_first_ones_generator(sharded: dict[str, dict]):
    assert sharded["generators"]["drawn"] == [sharded["generators"]["expected"]] * 2
