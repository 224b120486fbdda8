"""A whole checkpoint without a model: written by hand, for tests that need no torch."""

import json
from pathlib import Path
from typing import Any

from titanfunc.config import checkpoints

NO_TENSORS = (2).to_bytes(8, "little") + b"{}"


def put_checkpoint(run_dir: Path, step: int, **metadata: Any) -> Path:
    place = checkpoints.checkpoint_dir(run_dir, step)
    place.mkdir(parents=True)
    return rewrite(place, {"format": checkpoints.FORMAT, "step": step, **metadata})


def rewrite(place: Path, metadata: Any) -> Path:
    """Other json in a checkpoint, or raw text, with a manifest that fits."""
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    (place / checkpoints.METADATA).write_text(text)
    if not (place / checkpoints.TENSORS).exists():
        (place / checkpoints.TENSORS).write_bytes(NO_TENSORS)
    return sign(place)


def sign(place: Path) -> Path:
    """A manifest of what lies in a checkpoint."""
    names = (checkpoints.METADATA, checkpoints.TENSORS)
    sums = {name: checkpoints.sum_of(place / name) for name in names}
    (place / checkpoints.MANIFEST).write_text(checkpoints.manifest_text(sums))
    return place
