"""Checkpoints as far as names, json and checksums go: which there are, whether they are whole, what they are of.

RUN/checkpoints/
    latest                     the name of the newest, moved last
    step_00000200/
        checkpoint.json        what it is: format, step, validation loss, configurations, versions
        state.safetensors      every tensor of the training state
        manifest.json          bytes and crc32 of these two

No torch and no code from the files: what a checkpoint says is compared, never built by name.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from titanfunc.config._check import STEPS, is_number, is_whole
from titanfunc.config.strict_json import MOST_BYTES, parse_json, read_json, require_plain
from titanfunc.config.tensor_header import read_header, read_whole

CHECKPOINTS = "checkpoints"
LATEST = "latest"
METADATA = "checkpoint.json"
TENSORS = "state.safetensors"
MANIFEST = "manifest.json"
SUMS = "unfinished"
"""In METADATA: sums of the metrics that are in no row yet, of a run that was stopped."""
FORMAT = 2
WITHOUT_MANIFEST = 1
"""The format before FORMAT, which has no manifest, and can be read all the same."""
CHUNK = 16 * 2**20


class Sum(NamedTuple):
    """What a manifest says of a file. crc32, as zlib has it, is nearly three times as fast as sha256, and is to find
    damage, not forgery."""

    size: int
    crc32: int


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step (optimizer steps done)."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's folder is named by, or None."""
    match = re.fullmatch(r"step_(\d{1,18})", checkpoint.name)
    return int(match[1]) if match else None


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that lack no file, by step, oldest first; empty if there are none."""
    return [path for path in _folders(run_dir) if (path / METADATA).is_file() and (path / TENSORS).is_file()]


def _folders(run_dir: Path) -> list[Path]:
    found = [(step, path) for path in (run_dir / CHECKPOINTS).glob("step_*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found) if path.is_dir() and not path.is_symlink()]


def newest_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that ``check`` finds whole, or None; and what is wrong with newer ones,
    which are damaged or gone. Where there is a whole one nevertheless, a line on stderr says so."""
    faults = []
    lost = _lost(run_dir)
    if lost:
        faults.append(f"{lost}: gone, though {LATEST} names it")
    for path in reversed(_folders(run_dir)):
        try:
            check(path)
        except ValueError as error:
            faults.append(str(error))
            continue
        if faults:
            print(f"warning: {'; '.join(faults)}; {path} is taken instead", file=sys.stderr)
        return path, faults
    return None, faults


def last_written(run_dir: Path) -> int | None:
    """When a run last wrote a checkpoint, in ns, whatever has become of it since; None if it has never written one."""
    there = _folders(run_dir)
    lost = [] if there else [_lost(run_dir)]
    written = [there[-1] / METADATA, there[-1]] if there else [run_dir / CHECKPOINTS / LATEST for path in lost if path]
    for path in written:
        with contextlib.suppress(OSError):
            return path.stat().st_mtime_ns
    return None


def _lost(run_dir: Path) -> Path | None:
    """The checkpoint that a run's ``latest`` names, if that is newer than any there is."""
    try:
        name = (run_dir / CHECKPOINTS / LATEST).read_bytes()[:80].decode("ascii").strip()
    except (OSError, ValueError):
        return None
    path, there = run_dir / CHECKPOINTS / name, _folders(run_dir)
    step = step_of(path) if "/" not in name else None
    newer = step is not None and (not there or step > (step_of(there[-1]) or 0))
    return path if newer else None


def check(checkpoint: Path) -> dict[str, Any]:
    """Read all of a checkpoint, and return its json (``read_metadata``).

    Raises ValueError, in one line, unless every file is there, is a file of its own and is what the manifest says, the
    tensors' header is in order, and all are of one step. Format 1 has no manifest: its tensors are not read.
    """
    metadata = read_metadata(checkpoint)
    try:
        if (checkpoint / MANIFEST).exists() or metadata["format"] != WITHOUT_MANIFEST:
            for name, wanted in _read_manifest(checkpoint / MANIFEST).items():
                _require_sum(checkpoint / name, wanted)
        entry = read_header(checkpoint / TENSORS).get("step")
        if step_of(checkpoint) not in (None, metadata["step"]):
            raise ValueError(f"{METADATA} is of step {metadata['step']}")
        step = read_whole(checkpoint / TENSORS, entry) if entry else None
        if step not in (None, metadata["step"]):
            raise ValueError(f"{TENSORS} is of step {step}, but {METADATA} of {metadata['step']}")
    except (OSError, ValueError) as error:
        raise _unreadable(checkpoint, error) from None
    return metadata


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """The json of a checkpoint. Raises ValueError if it is missing, damaged or of another format."""
    try:
        metadata = read_json(checkpoint / METADATA)
    except (OSError, ValueError) as error:
        raise _unreadable(checkpoint, error) from None
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if type(version) is not int or version not in (WITHOUT_MANIFEST, FORMAT):
        raise ValueError(f"{checkpoint}: wanted a checkpoint of format {FORMAT}, got {version}")
    if not is_whole(metadata.get("step"), most=STEPS):
        raise _unreadable(checkpoint, f"{METADATA} has no whole number 'step'")
    if metadata.get("validation_loss") is not None and not is_number(metadata["validation_loss"]):
        raise _unreadable(checkpoint, f"{METADATA}: wanted a number for 'validation_loss'")
    if not isinstance(metadata.get("model"), dict):
        raise _unreadable(checkpoint, f"{METADATA} has no 'model'")
    for name in ("data", "optim", "train"):
        if not isinstance(metadata.get(name, {}), dict):
            raise _unreadable(checkpoint, f"{METADATA}: wanted a mapping for {name!r}")
    sums = metadata.get(SUMS, {})
    if not (isinstance(sums, dict) and all(map(_is_sum, sums.values()))):
        raise _unreadable(checkpoint, f"{METADATA}: wanted a sum, a count and a newest value a metric in {SUMS!r}")
    return metadata


def _is_sum(value: Any) -> bool:
    """Whether json is what ``titanfunc.train.metrics.Accumulator`` tells of a metric."""
    if not (isinstance(value, list) and len(value) == 3):
        return False
    total, count, last = value
    return type(total) is float and type(count) is int and 0 <= count < 2**53 and isinstance(last, float | None)


def warn_unless_verified(checkpoint: Path, metadata: Mapping[str, Any]) -> None:
    """Say on stderr, in one line, that a checkpoint has no checksums."""
    if metadata["format"] == WITHOUT_MANIFEST and not (checkpoint / MANIFEST).exists():
        print(f"warning: {checkpoint} is of format 1, which has no checksums: it is not verified", file=sys.stderr)


def validation_loss(checkpoint: Path) -> float | None:
    """The validation loss that a checkpoint was saved with, or None."""
    try:
        value = read_metadata(checkpoint).get("validation_loss")
    except ValueError:
        return None
    return None if value is None else float(value)


def manifest_text(sums: Mapping[str, Sum]) -> str:
    """The one text of a manifest that says these sums, by file name."""
    files = {name: {"bytes": each.size, "crc32": f"{each.crc32:08x}"} for name, each in sorted(sums.items())}
    return json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n"


def sum_of(path: Path) -> Sum:
    """Size and checksum of a file, which is read whole."""
    size = crc = 0
    for chunk in _chunks(path):
        size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return Sum(size, crc)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _read_manifest(path: Path) -> dict[str, Sum]:
    """The sums of METADATA and TENSORS. Raises ValueError unless the text is, byte for byte, what says them."""
    require_plain(path)
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES)
    said = parse_json(raw, path.name)
    try:
        sums = {name: Sum(said["files"][name]["bytes"], int(said["files"][name]["crc32"], 16)) for name in _SUMMED}
        same = manifest_text(sums).encode() == raw
    except (TypeError, KeyError, ValueError):
        same = False
    if not same:
        raise ValueError(f"{path.name}: wanted bytes and crc32 of {' and '.join(_SUMMED)}, and nothing else")
    return sums


_SUMMED = (METADATA, TENSORS)


def _require_sum(path: Path, wanted: Sum) -> None:
    require_plain(path)
    size = path.stat().st_size
    if size != wanted.size:
        raise ValueError(f"{path.name}: wanted {wanted.size:,} bytes, got {size:,}")
    if sum_of(path) != wanted:
        raise ValueError(f"{path.name}: its checksum is not the manifest's")


def _unreadable(checkpoint: Path, error: object) -> ValueError:
    return ValueError(f"{checkpoint}: not a checkpoint that can be read ({error})")
