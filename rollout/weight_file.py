"""The shared file of a weight update: written by the trainer, mapped and verified by every engine.

    trainer: WeightFileWriter.add(name, tensor) ... finish(version) -> WeightUpdate   (its manifest)
    engine:  load_verified(update, layout) -> {name: view of the mapped file, or of what gloo brought}

Owns: the byte layout, the manifest and its checks. Does not own: which tensors (weight_source), bringing the
bytes from another host (weight_gloo), loading them (engines). No vLLM import: both sides and both engines use
it.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
from blake3 import blake3

from rollout import weight_gloo
from rollout.api import TensorSpec, WeightUpdate
from rollout.errors import WeightSyncError
from rollout.ground.errors import EnvironmentProblem
from rollout.safetensors_header import BadHeader, read_header

ALIGNMENT = 64
"""Bytes; a view of any dtype can start at a multiple of it."""

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""The two precisions of this project, by the name they have in records and configs."""

MAX_NAMED = 5
"""How many tensors an error names before it only counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a whole update of one engine must hold: the tensors of the model directory it was started from.

    Example: Layout(dtype="float32", shapes={"lm_head.weight": (512, 64), "model.norm.weight": (64,)})
    """

    dtype: str
    shapes: dict[str, tuple[int, ...]]


def checkpoint_layout(model_dir: Path, *, dtype: str) -> Layout:
    """The layout of a `save_pretrained` directory, from its safetensors headers alone.

    Rotary frequencies, which old checkpoints carry and no model loads, are left out.
    """
    paths = sorted(model_dir.glob("*.safetensors"))
    if not paths:
        raise EnvironmentProblem(f"{model_dir}: no *.safetensors file; save the model with save_pretrained")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            header = read_header(path)
        except BadHeader as error:
            raise EnvironmentProblem(f"{path}: not a whole safetensors file ({error})") from error
        shapes |= {
            name: entry.shape for name, entry in header.items() if not name.endswith("rotary_emb.inv_freq")
        }
    return Layout(dtype=dtype, shapes=shapes)


class WeightFileWriter:
    """Writes one version's tensors into `path`, from the start, over whatever stood there.

    Through write(2), not a map: a full /dev/shm is then an error here and not a SIGBUS. Use it as a context
    manager.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self._problem(error) from error
        self._file: IO[bytes] = os.fdopen(descriptor, "r+b", buffering=0)
        self._specs: dict[str, TensorSpec] = {}
        self._offset = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor (any device). Raises EnvironmentProblem when the file system is full."""
        assert name not in self._specs, name
        data = _bytes_of(tensor.detach().cpu().contiguous())
        self._specs[name] = TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            offset=self._offset,
            digest=_digest(data),
        )
        self._write(data)
        self._offset += -(-data.nbytes // ALIGNMENT) * ALIGNMENT

    def add_alias(self, name: str, of: str) -> None:
        """A tied name: the same bytes as `of`, which was added before."""
        spec = self._specs[of]
        self._specs[name] = TensorSpec(
            name=name, dtype=spec.dtype, shape=spec.shape, offset=spec.offset, digest=spec.digest
        )

    def finish(self, version: int) -> WeightUpdate:
        """Cut what an earlier, longer version left behind, and return the manifest."""
        os.ftruncate(self._file.fileno(), self._offset)
        return WeightUpdate(version=version, location=str(self._path), tensors=tuple(self._specs.values()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, data: memoryview) -> None:
        written = 0
        try:
            while written < data.nbytes:  # one write(2) moves at most 2 GiB
                written += os.pwrite(self._file.fileno(), data[written:], self._offset + written)
        except OSError as error:
            raise self._problem(error) from error

    def _problem(self, error: OSError) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"{self._path}: cannot write the weights ({error.strerror}); make room in {self._path.parent}"
        )


def check_manifest(update: WeightUpdate, layout: Layout) -> None:
    """Raises WeightSyncError unless names, shapes and dtypes of `update` are those of a whole model."""
    if problems := _manifest_problems(update, layout):
        raise WeightSyncError(f"weight version {update.version} refused: {in_short(problems)}")


def load_verified(update: WeightUpdate, layout: Layout, *, timeout_s: float) -> dict[str, torch.Tensor]:
    """Read-only-by-convention views of the update's bytes, every check passed.

    Raises WeightSyncError, before anything is loaded, when a tensor of `layout` is missing or has another
    shape or dtype, when there is one that `layout` does not know (tied names excepted: they share another
    tensor's bytes), when the bytes are not there within `timeout_s` or too few, or when they have another
    digest than the bytes that were sent.
    """
    check_manifest(update, layout)
    return fetch_tensors(update, timeout_s=timeout_s)


def fetch_tensors(update: WeightUpdate, *, timeout_s: float) -> dict[str, torch.Tensor]:
    """The tensors of `update`, their bytes those that were sent. Writing to one never reaches the sender.
    Raises WeightSyncError.
    """
    is_file = not update.location.startswith(f"{weight_gloo.SCHEME}:")
    size = update_bytes(update)
    data = (
        _mapped(update, size) if is_file else weight_gloo.receive(update.location, size, timeout_s=timeout_s)
    )
    tensors = {
        spec.name: data[spec.offset : spec.offset + num_bytes(spec)].view(DTYPES[spec.dtype]).view(spec.shape)
        for spec in update.tensors
    }
    problems = [
        f"{spec.name}: the bytes that arrived are not the bytes that were sent"
        for spec in update.tensors
        if _digest(_bytes_of(tensors[spec.name])) != spec.digest
    ]
    if problems:
        raise WeightSyncError(f"weight version {update.version} refused: {in_short(problems)}")
    return tensors


def nccl_location(world_size: int, meeting_id: str) -> str:
    """Where an update comes from that is broadcast in a group of its own (see `vllm_sender`)."""
    return f"nccl:{world_size}:{meeting_id}"


def nccl_meeting(location: str) -> tuple[int, str]:
    """World size and id of that group."""
    scheme, world_size, meeting_id = location.split(":")
    assert scheme == "nccl", location
    return int(world_size), meeting_id


def update_bytes(update: WeightUpdate) -> int:
    """Bytes that have to reach an engine. Tied names share theirs."""
    return max(spec.offset + num_bytes(spec) for spec in update.tensors)


def num_bytes(spec: TensorSpec) -> int:
    """Bytes of one tensor in the file."""
    return math.prod(spec.shape) * DTYPES[spec.dtype].itemsize


def in_short(items: Iterable[str]) -> str:
    """The first few of `items` and a count of the others, for one line of an error."""
    listed = list(items)
    more = f" and {len(listed) - MAX_NAMED} more" if len(listed) > MAX_NAMED else ""
    return "; ".join(listed[:MAX_NAMED]) + more


def _manifest_problems(update: WeightUpdate, layout: Layout) -> list[str]:
    specs = {spec.name: spec for spec in update.tensors}
    known_offsets = {spec.offset for spec in update.tensors if spec.name in layout.shapes}
    problems = [f"{name}: missing" for name in layout.shapes if name not in specs]
    if len(specs) != len(update.tensors):
        problems.append("a name is there twice")
    for spec in update.tensors:
        if spec.dtype != layout.dtype:
            problems.append(f"{spec.name}: {spec.dtype} where the engine has {layout.dtype}")
        if spec.name not in layout.shapes and spec.offset not in known_offsets:
            problems.append(f"{spec.name}: not a tensor of the engine's model")
        elif spec.name in layout.shapes and spec.shape != layout.shapes[spec.name]:
            problems.append(
                f"{spec.name}: {list(spec.shape)} where the engine has {list(layout.shapes[spec.name])}"
            )
    return problems


def _mapped(update: WeightUpdate, size: int) -> torch.Tensor:
    """A private map of the update's file."""
    if not os.path.isfile(update.location) or os.path.getsize(update.location) < size:
        raise WeightSyncError(
            f"weight version {update.version} refused: {update.location} holds less than {size} bytes"
        )
    return torch.from_file(update.location, shared=False, size=size, dtype=torch.uint8)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(data: memoryview) -> str:
    return blake3(data, max_threads=blake3.AUTO).hexdigest()
