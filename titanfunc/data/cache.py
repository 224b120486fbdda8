"""A corpus's tokens on disk, made once by all cores and then read from there.

The folder <cache_dir>/tokens-<fingerprint> holds shards (``shards``) and, once all are there, manifest.json. The
fingerprint is of the source's files and when large ones were written, the tokenizer and the column; which documents are
held out, and in which order windows come, is not in it. A lock lets one process at a time make a cache: others wait,
and then open it.

Opening looks at the files' sizes and at where documents end; checksums and ids are verified there for a small cache
(``VERIFIED_BYTES``), and checksums of any by ``verify``. A batch is seen to hold nothing but tokens (``source``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from titanfunc.config.data import DataConfig
from titanfunc.config.failures import Damaged, NotWritten
from titanfunc.config.files import expanded
from titanfunc.data import corpora, parts
from titanfunc.data.making import make_shards
from titanfunc.data.shards import ENDINGS, clear_unfinished, open_shard, shard_name, verify_shard, write_file
from titanfunc.data.stored import damaged
from titanfunc.data.tokenizers import Tokenizer
from titanfunc.data.tokens import Shard, token_dtype

FORMAT = 2
VERIFIED_BYTES = 64 << 20
MANIFEST = "manifest.json"
_MANIFEST_BYTES = 256 << 20
_logger = logging.getLogger(__name__)


def open_cache(config: DataConfig, tokenizer: Tokenizer, listing: corpora.Listing) -> list[Shard]:
    """The corpus's tokens (ids [N] a shard) from ``config.cache_dir``, after making what is not there yet.

    Raises, naming the file, Damaged for a shard that is, NotWritten for a full disk, and what ``make_shards`` does.
    """
    digest = parts.identify(listing.files, listing.root, times=True)
    told = [FORMAT, digest, config.corpus, config.column, tokenizer.fingerprint, parts.PART_BYTES]
    fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    folder = expanded(config.cache_dir) / f"tokens-{fingerprint}"
    if not _complete(folder):
        with locked(folder / "lock"):
            if not _complete(folder):
                make(folder, config, tokenizer, listing)
    return open_folder(folder, tokenizer.vocab_size)


def make(folder: Path, config: DataConfig, tokenizer: Tokenizer, listing: corpora.Listing) -> None:
    """Tokenize the parts that have no shard yet, then write the manifest; the caller holds the lock.

    Raises as ``open_cache``; finished shards are kept then.
    """
    clear_unfinished(folder)
    entries = make_shards(folder, corpora.cut(config, listing), tokenizer)
    source = {name: getattr(config, name) for name in ("corpus", "path", "subset", "revision", "column")}
    source["commit"] = listing.commit
    about = {
        "format": FORMAT,
        "source": source,
        "tokenizer": {"name": tokenizer.name, "size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokens": sum(entry["tokens"] for entry in entries),
        "documents": sum(entry["documents"] for entry in entries),
        "shards": entries,
    }
    write_file(folder / MANIFEST, json.dumps(about).encode())


def open_folder(folder: Path, vocab_size: int) -> list[Shard]:
    """The shards of a finished cache (ids [N] each, below ``vocab_size``), in order, to be read as they are asked for.

    Raises Damaged, naming the file, for a manifest that is not one, or a damaged shard.
    """
    about = read_manifest(folder)
    dtype = np.dtype(about["dtype"])
    if np.iinfo(dtype).max < vocab_size - 1:
        raise Damaged(f"{folder / MANIFEST}: wanted ids of {token_dtype(vocab_size)}, got {about['dtype']}; delete it")
    shards = [open_shard(folder, entry, dtype) for entry in about["shards"]]
    small = sum(sum(entry["bytes"].values()) for entry in about["shards"]) <= VERIFIED_BYTES
    if small:
        verify(folder)
    for entry, shard in zip(about["shards"], shards, strict=True):
        _check_index(folder / f"{entry['name']}.documents", shard)
        if small and np.iinfo(dtype).max >= vocab_size:
            _check_ids(folder / f"{entry['name']}.tokens", shard, vocab_size)
    return shards


def _check_index(path: Path, shard: Shard) -> None:
    """Every document has a separator at least, and together they are all of the tokens."""
    ascend = bool((np.diff(shard.ends, prepend=0) > 0).all() and (shard.sizes >= 0).all())
    if not ascend or (int(shard.ends[-1]) if len(shard.ends) else 0) != len(shard.tokens):
        raise damaged(path, f"wanted ends of documents that ascend to {len(shard.tokens):,} tokens")


def _check_ids(path: Path, shard: Shard, vocab_size: int) -> None:
    most = int(np.asarray(shard.tokens).max(initial=0))
    if most >= vocab_size:
        raise damaged(path, f"wanted ids below {vocab_size}, which the tokenizer has, got {most}")


def verify(folder: Path) -> None:
    """Read all of a finished cache and raise Damaged, naming the file, if a checksum differs."""
    for entry in read_manifest(folder)["shards"]:
        verify_shard(folder, entry)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a finished cache holds, its shards under "shards". Raises Damaged for what ``make`` would not write."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MANIFEST_BYTES:
            raise ValueError(f"it is longer than {_MANIFEST_BYTES >> 20} MiB")
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"wanted format {FORMAT}, got {about['format']!r}")
        if about["dtype"] not in ("uint8", "uint16", "uint32"):
            raise ValueError(f"wanted ids of uint8, uint16 or uint32, got {about['dtype']!r}")
        for number, entry in enumerate(about["shards"]):
            _check_entry(entry, number)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200] if not isinstance(error, KeyError) else f"no {error}"
        raise Damaged(f"{path}: not a manifest of tokens ({why}); delete it, and the next run writes it") from None
    found: dict[str, Any] = about
    return found


def _check_entry(entry: Mapping[str, Any], number: int) -> None:
    if entry["name"] != shard_name(number):  # no other file is ever opened
        raise ValueError(f"wanted the shard {shard_name(number)}, got {entry['name']!r}")
    told = [entry["tokens"], entry["documents"], *(entry[of][end] for of in ("bytes", "crc32") for end in ENDINGS)]
    if not all(type(value) is int and 0 <= value < 2**53 for value in told):
        raise ValueError(f"{entry['name']}: wanted whole numbers of at least 0, got {told}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; the system gives it back when a process ends, however it does."""
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise NotWritten(f"data.cache_dir: cannot write {path} ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.warning("%s: another process is making it; waiting", path.parent)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile would hold it on
        os.close(handle)


def _complete(folder: Path) -> bool:
    """Whether every shard of the manifest is there; a damaged manifest is not looked past."""
    if not (folder / MANIFEST).is_file():
        return False
    entries = read_manifest(folder)["shards"]
    return all((folder / f"{entry['name']}.{ending}").is_file() for entry in entries for ending in ENDINGS)
