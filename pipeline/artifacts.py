"""Artifacts: where results live, and how a stage's directory becomes one.

    work/<stage>-<fp>/out/ --manifest last--> rename --> artifacts/<stage>-<fp>/ <--link-- runs/<name>/<stage>

Owns: the layout of `outputs/`, publishing, verification, locks, what a given directory counts as. Does not
own: the record of an artifact (manifest), what a fingerprint covers (dag), when a stage runs (executor), what
may be loaded (model_files).
An interrupted stage leaves `work/` and nothing else: what is under `artifacts/` is whole or it is an error.
"""

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
from blake3 import blake3

from pipeline.digest_cache import DigestCache
from pipeline.errors import CorruptArtifact, MissingStage
from pipeline.identity import SCHEMA_VERSION, Node, directory_name
from pipeline.manifest import MANIFEST, Exactness, Manifest, manifest_text, read_manifest
from pipeline.model_files import check_configs, check_model_directory
from pipeline.model_path import MODEL_FILES
from pipeline.provenance import git_commit, machine, package_versions
from pipeline.stage_table import STAGES
from rollout.ground.disk import disk_problems
from rollout.ground.durable import sync, write_whole
from rollout.ground.errors import EnvironmentProblem
from rollout.ground.whole import NotWhole, check_directory, files_below, measure

METRICS = "metrics.jsonl"
FORCED = "forced"
"""In a work directory: it was begun by `--force`, from nothing."""


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
            try:
                check_directory(directory, manifest.files, record=MANIFEST, digest_of=digest_of)
            except NotWhole as error:
                raise CorruptArtifact(f"{directory}/{error}; {hint}") from error
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
            files = files_below(out)
            for path in files.values():
                sync(path)
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
                files={name: measure(path) for name, path in files.items()},
            )
            write_whole(out / MANIFEST, manifest_text(manifest).encode())
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

    def _digests(self) -> DigestCache:
        return DigestCache(self.root / "work" / f"digests-{socket.gethostname()}.json")


def _holder(lock: Path) -> str:
    with contextlib.suppress(OSError):
        if text := lock.read_text().strip():
            return text
    return "another process"
