"""The header of a safetensors file, read with suspicion: what a file says of itself is checked first.

    8 bytes: length N --> N bytes of JSON {name: {dtype, shape, data_offsets}} --> the tensors, no gap

Owns: reading and checking the header. Does not own: the tensors. Light import: a directory is judged before
anything that could load it is.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit (safetensors, "header too large")."""
METADATA = "__metadata__"
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class BadHeader(Exception):
    """Why a file is not a safetensors file, in a few words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name -> entry of every tensor. Raises BadHeader, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise BadHeader(f"{size} bytes are too few for a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise BadHeader(f"a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadHeader("its header is not JSON") from error
    if not isinstance(header, dict):
        raise BadHeader("its header is not a JSON object")
    entries = {name: _entry(name, value) for name, value in header.items() if name != METADATA}
    _check_layout(entries, size - 8 - length)
    return entries


def _entry(name: str, value: Any) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            numbers = (*shape, begin, end)
            if dtype in DTYPE_BITS and all(type(number) is int and number >= 0 for number in numbers):
                entry = TensorEntry(dtype=dtype, shape=tuple(shape), begin=begin, end=end)
                if (end - begin) * 8 == math.prod(shape) * DTYPE_BITS[dtype]:
                    return entry
                raise BadHeader(f"{name!r}: {end - begin} bytes do not hold {dtype} {list(shape)}")
    raise BadHeader(f"{name!r}: not a dtype, a shape and offsets")


def _check_layout(entries: Mapping[str, TensorEntry], num_bytes: int) -> None:
    """The tensors fill the file, one behind the other: no overlap, no gap, nothing hidden at its end."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise BadHeader(f"{name!r}: starts at byte {entry.begin}, where {at} was expected")
        at = entry.end
    if at != num_bytes:
        raise BadHeader(f"its tensors take {at} bytes, and it has {num_bytes}")
