"""The record of a checkpoint: what it is, whose it is, and every byte of it.

    directory --own_record--> Record (files not compared) --verified--> Record (every file as it was written)

Owns: `checkpoint.json`, the name of a checkpoint's directory, what makes it ours. Does not own: which
checkpoints are kept and loaded (checkpoint), how bytes are compared (rollout.ground.whole). Without torch.
"""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from rollout.ground.whole import (
    Measured,
    NotWhole,
    bad_sectors_as_damage,
    check_directory,
    files_below,
    json_object,
    record_content,
    record_text,
)

SCHEMA_VERSION = 3
RECORD_FILE = "checkpoint.json"
DIRECTORY_NAME = re.compile(r"step-(\d{6,})")


class OtherSchema(Exception):
    """A checkpoint of another version of this code."""

    def __init__(self, version: int) -> None:
        super().__init__(f"checkpoint of schema version {version}, this code reads {SCHEMA_VERSION}")
        self.version = version


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """`checkpoint.json`: what a checkpoint is, and the digest of every file in it."""

    schema_version: int
    owner: str  # name of the work directory, <stage>-<fingerprint>: a checkpoint of another stage is not ours
    step: int  # optimizer steps taken; the directory is named by it
    score: float | None  # higher is better
    regular: bool  # saved by the schedule, and not only because the run was to stop there
    extra: dict[str, Any]
    world_size: int
    torch_version: str
    files: dict[str, Measured]  # path below the checkpoint -> its bytes; the record is not among them

    def text(self) -> str:
        """What `read` reads."""
        return record_text(asdict(self))

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The record of `directory`, its files not compared. Raises NotWhole, OtherSchema."""
        try:
            return cls._of(_record_of(directory))
        except NotWhole as error:
            raise NotWhole(f"{RECORD_FILE}: {error}") from error

    @classmethod
    def _of(cls, text: str) -> Self:
        version = json_object(text).get("schema_version")
        if type(version) is int and version != SCHEMA_VERSION:
            raise OtherSchema(version)
        content = record_content(text)
        if content.keys() != {field.name for field in fields(cls)}:
            raise NotWhole("not a record")
        content["files"] = {name: Measured(**measured) for name, measured in content["files"].items()}
        return cls(**content)


def own_record(directory: Path, *, owner: str) -> Record:
    """The record of a checkpoint of `owner` under its own name, its files not compared. Raises NotWhole,
    OtherSchema.
    """
    if directory.is_symlink() or not directory.is_dir():
        raise NotWhole("not a directory")
    record = Record.read(directory)
    if name_of(record.step) != directory.name:
        raise NotWhole(f"{RECORD_FILE}: of step {record.step}")
    if record.owner != owner:
        raise NotWhole(f"{RECORD_FILE}: of {record.owner}, not of {owner}")
    return record


def verified(directory: Path, *, owner: str) -> Record:
    """The record of a checkpoint whose every file is as it was written. Raises NotWhole, OtherSchema."""
    record = own_record(directory, owner=owner)
    for name, path in files_below(directory).items():
        if path.is_symlink():
            raise NotWhole(f"{name}: a link")
    with bad_sectors_as_damage():
        check_directory(directory, record.files, record=RECORD_FILE)
    return record


def _record_of(directory: Path) -> str:
    try:
        with bad_sectors_as_damage():
            return (directory / RECORD_FILE).read_bytes().decode()
    except FileNotFoundError as error:
        raise NotWhole("missing") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise NotWhole("not a record") from error


def name_of(step: int) -> str:
    """The name of the directory of the checkpoint after `step` steps."""
    return f"step-{step:06d}"
