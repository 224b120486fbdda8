"""Documents as one array of tokens, and its copy on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titanfunc.data.tokenizers import IntArray, Tokenizer

_FORMAT = 1
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}
_logger = logging.getLogger(__name__)


class TokenArray(NamedTuple):
    """Documents one after another, N tokens and D documents in all.

    tokens: ids [N], in the smallest unsigned type that holds the vocabulary; each document's last is the
    separator. ends: int64 [D], ascending; ``ends[i]`` is the offset in tokens just past document i.
    """

    tokens: IntArray
    ends: IntArray


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type for ids below ``vocab_size``. Raises ValueError above 2**32.

    >>> token_dtype(256), token_dtype(50257)
    (dtype('uint8'), dtype('uint16'))
    """
    for dtype in (np.uint8, np.uint16, np.uint32):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"vocab_size: wanted at most 2**32, got {vocab_size}")


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> TokenArray:
    """Encode every text and end it with the separator: tokens [N], ends [D].

    Raises ValueError if there is no text.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.separator], dtype=dtype)
    pieces, lengths = [], []
    for text in texts:
        ids = tokenizer.encode(text).astype(dtype, copy=False)
        pieces += [ids, separator]
        lengths.append(len(ids) + 1)
    if not pieces:
        raise ValueError("texts: wanted at least one document, got none")
    return TokenArray(np.concatenate(pieces), np.cumsum(lengths, dtype=np.int64))


def cache_key(texts: Iterable[str], **settings: str | int | float) -> str:
    """The name, 32 hex digits, under which the tokens of these texts in this order are kept.

    settings: all else that the tokens depend on (tokenizer, split).
    """
    digest = hashlib.sha256(json.dumps({"format": _FORMAT, **settings}, sort_keys=True).encode())
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def write_cache(folder: str | Path, key: str, splits: dict[str, TokenArray]) -> None:
    """Keep each split's tokens [N] and ends [D] under ``key``, in a safetensors file with a checksum.

    It is written aside and then renamed, so it is there whole or not at all. Raises ValueError if the
    folder cannot be written.
    """
    from safetensors.numpy import save_file

    arrays = {f"{split}.{part}": array for split, t in splits.items() for part, array in t._asdict().items()}
    metadata = {"key": key, "crc32": str(_checksum(arrays))}
    path = _cache_path(folder, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as aside:
            written = Path(aside) / path.name
            save_file(arrays, written, metadata)
            os.replace(written, path)
    except OSError as error:
        raise ValueError(f"data.cache_dir: cannot write {path} ({error.strerror or error})") from error


def read_cache(folder: str | Path, key: str) -> dict[str, TokenArray] | None:
    """The splits kept under ``key``, memory-mapped (tokens [N], ends [D]), or None if there are none.

    A file that is cut short, changed or of another key is reported through ``logging`` and not used.
    """
    path = _cache_path(folder, key)
    if not path.is_file():
        return None
    try:
        arrays, metadata = _map_safetensors(path)
        if metadata != {"key": key, "crc32": str(_checksum(arrays))}:
            raise ValueError("the checksum differs")
        names = {name.split(".")[0] for name in arrays}
        return {name: TokenArray(arrays[f"{name}.tokens"], arrays[f"{name}.ends"]) for name in names}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        _logger.warning("%s is damaged (%s): tokenizing again", path, error)
        return None


def _cache_path(folder: str | Path, key: str) -> Path:
    return Path(folder).expanduser() / f"tokens-{key}.safetensors"


def _checksum(arrays: dict[str, IntArray]) -> int:
    crc = 0
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, crc)
    return crc


def _map_safetensors(path: Path) -> tuple[dict[str, IntArray], dict[str, str]]:
    """The file's arrays as views of the mapped file (safetensors' own reader copies), and its metadata."""
    file = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(file[:8].tobytes(), "little")
    header = json.loads(file[8:start].tobytes())
    metadata = header.pop("__metadata__")
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = file[start + begin : start + end].view(_DTYPES[entry["dtype"]])
    return arrays, metadata
