"""Shards of tokens on disk: a part of a corpus each, whole or not there at all.

shard-00000.tokens     ids, raw
shard-00000.documents  int64 [2, D], raw: where documents end, and the bytes of their text
shard-00000.names      a line a document
shard-00000.json       how many, and a checksum of each file; written last
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titanfunc.config.failures import NotWritten
from titanfunc.data.stored import StoredTokens, damaged
from titanfunc.data.tokens import Shard

ENDINGS = ("tokens", "documents", "names")
WRITING = ".writing-"


def shard_name(number: int) -> str:
    """What the files of a shard begin with.

    >>> shard_name(7)
    'shard-00007'
    """
    return f"shard-{number:05d}"


def write_shard(
    folder: Path, number: int, shard: Shard, names: Sequence[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a shard (ids [N]) and then its json, which holds ``about`` too and is returned.

    Raises NotWritten for a folder that takes no more.
    """
    lines = "".join(" ".join(name.splitlines()) + "\n" for name in names)
    data = {
        "tokens": np.asarray(shard.tokens).tobytes(),
        "documents": np.stack([shard.ends, shard.sizes]).astype("<i8").tobytes(),
        "names": lines.encode("utf-8", "surrogateescape"),  # a file's name may be other bytes
    }
    entry = {
        "name": shard_name(number),
        "tokens": len(shard.tokens),
        "documents": len(shard.ends),
        "bytes": {ending: len(content) for ending, content in data.items()},
        "crc32": {ending: zlib.crc32(content) for ending, content in data.items()},
        **about,
    }
    for ending, content in data.items():
        write_file(folder / f"{shard_name(number)}.{ending}", content)
    write_file(folder / f"{shard_name(number)}.json", json.dumps(entry).encode())
    return entry


def finished(folder: Path, number: int, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The json of a shard that was written whole and is of the same part, or None; contents are not read."""
    try:
        entry = json.loads((folder / f"{shard_name(number)}.json").read_text(encoding="utf-8"))
        sizes = {ending: (folder / f"{shard_name(number)}.{ending}").stat().st_size for ending in ENDINGS}
    except (OSError, ValueError):
        return None
    same = isinstance(entry, dict) and entry.get("bytes") == sizes
    return entry if same and about.items() <= entry.items() else None


def open_shard(folder: Path, entry: Mapping[str, Any], dtype: np.dtype[Any]) -> Shard:
    """A shard's files, ids [N]; where documents end is read, of the ids and names only how long they are.

    Raises ValueError, naming the file, for one that cannot be read or is not as long as ``entry`` says.
    """
    tokens, documents = entry["tokens"], entry["documents"]
    wanted = {"tokens": tokens * dtype.itemsize, "documents": documents * 16, "names": entry["bytes"]["names"]}
    for ending, size in wanted.items():
        path = _path(folder, entry, ending)
        try:
            got = path.stat().st_size
        except OSError as error:
            raise damaged(path, f"cannot be read ({error.strerror})") from None
        if got != size:
            raise damaged(path, f"wanted {size:,} bytes, got {got:,}")
    path = _path(folder, entry, "documents")
    try:
        index = np.fromfile(path, dtype="<i8").reshape(2, documents)
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read ({error})") from None
    ids = StoredTokens(_path(folder, entry, "tokens"), dtype, tokens)
    return Shard(ids, index[0], index[1], functools.partial(_name, _path(folder, entry, "names")))


def verify_shard(folder: Path, entry: Mapping[str, Any]) -> None:
    """Read a shard's files and raise ValueError, naming the file, for one that is not what was written."""
    for ending in ENDINGS:
        path = _path(folder, entry, ending)
        crc = 0
        try:
            with path.open("rb") as file:
                while piece := file.read(1 << 24):
                    crc = zlib.crc32(piece, crc)
        except OSError as error:
            raise damaged(path, f"cannot be read ({error.strerror or error})") from None
        if crc != entry["crc32"][ending]:
            raise damaged(path, "its checksum differs")


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file aside, see that it is on the disk, and give it its name.

    Raises NotWritten if that cannot be done, such as on a full disk; nothing of it is left then.
    """
    aside = path.with_name(f"{WRITING}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except OSError as error:
        why = error.strerror or str(error)
        raise NotWritten(
            f"data.cache_dir: cannot write {path} ({why}); what is finished is kept, and the next run "
            "goes on from there"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def clear_unfinished(folder: Path) -> None:
    """Remove what processes that were killed had begun to write."""
    for aside in folder.glob(f"{WRITING}*"):
        with contextlib.suppress(OSError):
            aside.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _path(folder: Path, entry: Mapping[str, Any], ending: str) -> Path:
    return folder / f"{entry['name']}.{ending}"


def _name(path: Path, document: int) -> str:
    """The line of a document; only read for messages."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file):
            if number == document:
                return line.rstrip("\n")
    raise ValueError(f"{path}: wanted at least {document + 1} names")
