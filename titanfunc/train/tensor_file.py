"""Writing a safetensors file, with its checksum in the same pass, and other files whole or not at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from titanfunc.config.checkpoints import CHUNK, Sum
from titanfunc.config.tensor_header import DTYPES

CODES = {getattr(torch, name): code for code, (name, _) in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Sum:
    """Write contiguous CPU tensors of any shapes as a new safetensors file; it is on the disk when this returns.

    Not by ``safetensors`` itself, which copies every tensor first and leaves the file to be read again for its
    checksum. Raises OSError as the system does (no room, ...), ValueError for a dtype that the format has not.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # each then lies aligned
    header, end = {}, 0
    for name in ordered:
        tensor = tensors[name]
        if tensor.dtype not in CODES:
            raise ValueError(f"{name}: wanted one of {', '.join(map(str, CODES))}, got {tensor.dtype}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, [len(text).to_bytes(8, "little"), text, *(_bytes_of(tensors[name]) for name in ordered)])


def write_text(path: Path, text: str) -> Sum:
    """Write a new file; it is on the disk when this returns. Raises OSError as the system does."""
    return _write(path, [text.encode()])


def replace_text(path: Path, text: str) -> None:
    """Put a file in the place of one that may be there, at once."""
    aside = path.with_name(path.name + ".writing")
    aside.unlink(missing_ok=True)
    write_text(aside, text)
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> Sum:
    size = crc = 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            for begin in range(0, len(part), CHUNK):
                chunk = memoryview(part)[begin : begin + CHUNK]
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
                while chunk:
                    chunk = chunk[os.write(handle, chunk) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return Sum(size, crc)
