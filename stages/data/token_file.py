"""Examples as token ids in one file: the stage task writes it once, every worker maps it.

    rows --read, rendered--> Columns --prepared--> tokens.safetensors + tokens.json --MappedTokens--> example

Owns: the file, its record, and that a resumed stage takes it as it is. Does not own: what the columns mean
(the recipes), rows and templates (reading, chat). Without torch.

A column is ragged (token ids of each example, 4 bytes a token, or a mask, 1 byte) or flat (one number of
each example). The file lies
in the stage's work directory. So it belongs to one fingerprint: settings, contents of files, tokenizer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from rollout.ground.disk import disk_problems
from rollout.ground.errors import EnvironmentProblem
from rollout.ground.whole import file_digest, whole_record, write_record
from rollout.safetensors_header import read_header

SCHEMA_VERSION = 2
TOKENS_FILE, RECORD_FILE = "tokens.safetensors", "tokens.json"
_ENDS = ".ends"
_DTYPES = {"I64": np.int64, "I32": np.int32, "U8": np.uint8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What is written of some examples, in their order."""

    ragged: Mapping[str, Sequence[Sequence[int]]]  # token ids
    masks: Mapping[str, Sequence[Sequence[int]]]  # one 0 or 1 for each token; ragged too
    flat: Mapping[str, Sequence[int]]
    facts: Mapping[str, Any]  # JSON: what is known of all of them together, metrics for example


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the stage task hands to its workers."""

    path: Path
    digest: str  # blake3 of the file
    facts: Mapping[str, Any]


def prepared(work_dir: Path, make: Callable[[], Columns]) -> Prepared:
    """The file that an earlier execution of this stage left whole; else `make()` is written.

    Raises what `make` raises, before anything is written; EnvironmentProblem when the disk refuses.
    """
    path, record = work_dir / TOKENS_FILE, work_dir / RECORD_FILE
    content = whole_record(record)
    if content is None or content["schema_version"] != SCHEMA_VERSION:
        columns = make()
        with disk_problems(path):
            _write(path, columns)
            content = write_record(record, [path], {"schema_version": SCHEMA_VERSION, "facts": columns.facts})
    return Prepared(path=path, digest=content["files"][TOKENS_FILE]["blake3"], facts=content["facts"])


def _write(path: Path, columns: Columns) -> None:
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {
        name: np.asarray(values, dtype=np.int32) for name, values in columns.flat.items()
    }
    for ragged, dtype in ((columns.ragged, np.int32), (columns.masks, np.uint8)):
        for name, rows in ragged.items():
            arrays[name] = np.fromiter(chain.from_iterable(rows), dtype=dtype)
            arrays[name + _ENDS] = np.fromiter(accumulate(map(len, rows)), dtype=np.int64)
    save_file(arrays, path)


class MappedTokens:
    """A file of tokens on one worker: mapped, not read. What is not asked for stays on the disk."""

    def __init__(self, file: Prepared) -> None:
        """Raises EnvironmentProblem where this node does not see the file that the stage task wrote."""
        try:
            digest = file_digest(file.path)
        except FileNotFoundError as error:
            raise EnvironmentProblem(
                f"{file.path}: written by the stage, and not there on this node; outputs must be one file "
                "system for all workers"
            ) from error
        if digest != file.digest:
            raise EnvironmentProblem(
                f"{file.path}: not the bytes that the stage wrote; outputs must be one file system for all "
                "workers, and the disk sound"
            )
        self._arrays = dict(_mapped(file.path))

    def num_examples(self, column: str) -> int:
        """Rows of a ragged column."""
        return len(self._arrays[column + _ENDS])

    def lengths(self, column: str) -> list[int]:
        """Of a ragged column, the number of tokens of each example. Reads none of them."""
        lengths: list[int] = np.diff(self._arrays[column + _ENDS], prepend=0).tolist()
        return lengths

    def row(self, column: str, index: int) -> tuple[int, ...]:
        """Of a ragged column, the tokens of one example."""
        ends = self._arrays[column + _ENDS]
        start = int(ends[index - 1]) if index else 0
        return tuple(self._arrays[column][start : int(ends[index])].tolist())

    def flat(self, column: str) -> np.ndarray:
        """The numbers of a flat column."""
        return self._arrays[column]


def _mapped(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    for name, entry in read_header(path).items():
        dtype = _DTYPES[entry.dtype]
        if entry.begin == entry.end:  # nothing to map
            yield name, np.empty(entry.shape, dtype)
        else:
            yield name, np.memmap(path, dtype, mode="r", offset=start + entry.begin, shape=entry.shape)
