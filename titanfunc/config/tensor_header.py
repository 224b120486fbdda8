"""The header of a safetensors file, checked before anything believes what it says. No torch.

A file is 8 bytes (the header's length, little-endian), the header in json, and the tensors one after another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from titanfunc.config.strict_json import parse_json, require_plain

MOST_BYTES = 64 * 2**20
MOST_DIMENSIONS, MOST_LONG = 16, 2**48
"""A shape that has more of them, or a longer one, is no tensor's: their product alone could take hours."""
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
"""What safetensors calls a dtype: torch's name for it, and the bytes of an element."""


class Entry(NamedTuple):
    """A tensor as the header tells of it. begin, end: its bytes, counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, in their order. Reads the header alone.

    Raises ValueError for anything but a safetensors file whose tensors fill it exactly, OSError if it cannot be read.
    """
    require_plain(path)
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(total - 8, MOST_BYTES):
            raise ValueError(f"{path.name}: no safetensors file (a header of {length:,} bytes in {total:,})")
        header = parse_json(file.read(length), path.name)
    if not isinstance(header, dict):
        raise ValueError(f"{path.name}: no safetensors file (its header is no mapping)")
    header.pop("__metadata__", None)
    found = {name: _entry(name, entry, path.name) for name, entry in header.items()}
    _require_filled(found, total - 8 - length, path.name)
    return found


def read_whole(path: Path, entry: Entry) -> int | None:
    """The value of a tensor that is one whole number, int64 of shape []; None for any other. Raises OSError."""
    if (entry.dtype, entry.shape) != ("int64", ()):
        return None
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little") + entry.begin)
        return int.from_bytes(file.read(8), "little", signed=True)


def _entry(name: str, entry: Any, file: str) -> Entry:
    kind = DTYPES.get(entry["dtype"]) if isinstance(entry, dict) and isinstance(entry.get("dtype"), str) else None
    if kind is None or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{file}: {name[:80]!r}: wanted a dtype that is known, a shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_wholes(shape) and _wholes(offsets) and len(offsets) == 2):
        raise ValueError(f"{file}: {name[:80]!r}: wanted whole numbers of at least 0 for its shape and data_offsets")
    if len(shape) > MOST_DIMENSIONS or max(shape, default=0) >= MOST_LONG:
        raise ValueError(f"{file}: {name[:80]!r}: wanted at most {MOST_DIMENSIONS} dimensions, each below 2**48")
    if offsets[1] - offsets[0] != math.prod(shape) * kind[1]:
        raise ValueError(f"{file}: {name[:80]!r}: its bytes are not as many as its shape says")
    return Entry(kind[0], tuple(shape), *offsets)


def _require_filled(found: Mapping[str, Entry], wanted: int, file: str) -> None:
    end = 0
    for entry in sorted(found.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            raise ValueError(f"{file}: its tensors overlap or leave gaps")
        end = entry.end
    if end != wanted:
        raise ValueError(f"{file}: its tensors are {end:,} bytes, but it holds {wanted:,}")


def _wholes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
