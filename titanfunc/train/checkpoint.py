"""Checkpoints: every tensor of the training state in one safetensors file, json that says what it is, and checksums.

A checkpoint is written beside its place, synced and then renamed, so that a crash at any moment leaves either all of
it or nothing that loads, and never harms the one before. What can be told without torch (which there are, whether they
are whole) is in ``titanfunc.config.checkpoints``; saving while training goes on, in ``titanfunc.train.saver``. A
compiled step draws no random numbers but by its step, so the seed in the configuration is all of a run's randomness.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import optree
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import titanfunc
from titanfunc.config import ModelConfig, checkpoints, runs
from titanfunc.config.tensor_header import Entry, read_header
from titanfunc.train.tensor_file import replace_text, sync, write_tensors, write_text

State = TypeVar("State")


def save(
    run_dir: str | Path,
    step: int,
    state: Any,
    model: ModelConfig,
    *,
    keep: int = 0,
    keep_best: int = 0,
    validation_loss: float | None = None,
    sums: Mapping[str, Any] | None = None,
    **configs: Any,
) -> Path:
    """Write a checkpoint into a run's folder and return its place; then drop the older ones that are not kept.

    step: optimizer steps done. state: any pytree of tensors, of any shapes and devices. sums: of the metrics that are
    in no row yet (``metrics.Accumulator``). configs: further dataclasses to be kept in the json by name. keep: the
    newest so many stay (0: all), and the ``keep_best`` of the lowest ``validation_loss`` too. Raises ValueError if the
    run already has a whole checkpoint of this step, or a leaf ``step`` of the state is another, OSError if it cannot be
    written: then all that was there is there still.
    """
    require_new(Path(run_dir), step)
    tensors = {name: leaf.detach().cpu().contiguous() for name, leaf in named_leaves(state).items()}
    if _kind(tensors.get("step")) == "int64 []" and int(tensors["step"]) != step:
        raise ValueError(f"step: wanted that of the state, {int(tensors['step'])}, got {step}")
    place = write(Path(run_dir), step, tensors, describe(step, model, validation_loss, configs, sums))
    drop_old(Path(run_dir), step, keep, keep_best)
    return place


def require_new(run_dir: Path, step: int) -> None:
    """Raise ValueError if a run has a checkpoint of this step that is whole."""
    place = checkpoints.checkpoint_dir(run_dir, step)
    if is_whole(place):
        raise ValueError(f"step: wanted one that has no checkpoint yet, got {step} ({place} is there)")


def describe(
    step: int,
    model: ModelConfig,
    validation_loss: float | None = None,
    configs: Mapping[str, Any] | None = None,
    sums: Mapping[str, Any] | None = None,
) -> str:
    """The json of a checkpoint."""
    metadata = {
        "format": checkpoints.FORMAT,
        "step": step,
        **({} if validation_loss is None else {"validation_loss": validation_loss}),
        **({checkpoints.SUMS: sums} if sums else {}),
        "titanfunc": titanfunc.__version__,
        "torch": torch.__version__,
        "model": dataclasses.asdict(model),
        **{name: dataclasses.asdict(config) for name, config in (configs or {}).items()},
    }
    return json.dumps(metadata, indent=2, allow_nan=False) + "\n"


def write(run_dir: Path, step: int, tensors: Mapping[str, Tensor], metadata: str) -> Path:
    """Write contiguous CPU tensors, of any shapes, and a json as the checkpoint of a step, and return its place."""
    place = checkpoints.checkpoint_dir(run_dir, step)
    folder = place.parent
    folder.mkdir(parents=True, exist_ok=True)
    sync(run_dir)
    for left_over in (*folder.glob(".writing_*"), *folder.glob(".removing_*")):  # of a run that was killed
        shutil.rmtree(left_over)
    aside = folder / f".writing_{place.name}"
    try:
        aside.mkdir()
        sums = {
            checkpoints.TENSORS: write_tensors(aside / checkpoints.TENSORS, tensors),
            checkpoints.METADATA: write_text(aside / checkpoints.METADATA, metadata),
        }
        write_text(aside / checkpoints.MANIFEST, checkpoints.manifest_text(sums))
        sync(aside)
        with contextlib.suppress(FileNotFoundError):
            sync(run_dir / runs.METRICS)  # its rows up to here, which no later run writes again
        _set_aside(place)
        os.rename(aside, place)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # its room may be what is wanting
        raise
    point_latest(place)
    return place


def point_latest(place: Path) -> None:
    """Make a checkpoint's name last, and name it as the newest."""
    sync(place.parent)
    replace_text(place.parent / checkpoints.LATEST, place.name + "\n")


def drop_old(run_dir: Path, step: int, keep: int, keep_best: int) -> None:
    """Delete the checkpoints of a run but the newest ``keep`` (0: all stay) and the ``keep_best`` of the lowest loss.

    Damaged ones of later steps than ``step``, which a run did not go on from, are set aside first.
    """
    for later in checkpoints.checkpoints(run_dir):
        if (checkpoints.step_of(later) or 0) > step and not is_whole(later):
            _set_aside(later)
    found = checkpoints.checkpoints(run_dir)
    if not keep:
        return
    losses = {path: loss for path in found if (loss := checkpoints.validation_loss(path)) is not None}
    best = sorted(losses, key=lambda path: (losses[path], path))[:keep_best]
    for path in found[:-keep]:
        if path not in best:
            removed = path.with_name(f".removing_{path.name}")
            os.rename(path, removed)  # so that half of it is never taken for a checkpoint
            shutil.rmtree(removed)


def is_whole(place: Path) -> bool:
    """Whether a folder is a checkpoint that ``checkpoints.check`` finds nothing wrong with."""
    try:
        checkpoints.check(place)
    except ValueError:
        return False
    return True


def _set_aside(place: Path) -> None:
    """Move what lies in a checkpoint's place, if anything, and is none."""
    if os.path.lexists(place):
        aside = place.with_name(f"damaged_{place.name}")
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        os.rename(place, aside)
        print(f"warning: {place} is damaged, and was moved to {aside.name}", file=sys.stderr)


def load(checkpoint: str | Path, like: State, model: ModelConfig | None = None, *, verify: bool = True) -> State:
    """Copy a checkpoint's tensors into those of ``like``, in place and on their devices, and return it.

    verify: read it whole first and compare checksums (``checkpoints.check``). Raises ValueError, naming the first
    difference, if a leaf's name, shape or dtype is not the same, if the checkpoint is of another model than ``model``,
    or if it is damaged. ``like`` is then untouched.
    """
    return _load(Path(checkpoint), like, model, "", verify)


def load_params(checkpoint: str | Path, like: State, model: ModelConfig | None = None, *, verify: bool = True) -> State:
    """``load`` for the parameters alone, into the leaves of ``like`` of any shapes; the optimizer's are not read."""
    return _load(Path(checkpoint), like, model, "params.", verify)


def require_params(checkpoint: str | Path, init: Callable[[], Any]) -> None:
    """Raise ValueError, naming the first difference, unless ``init`` makes the parameters that a checkpoint holds.

    init: () -> params, with leaves of any shapes. It is called without taking memory for them, so that settings that
    came with the checkpoint cannot ask for more than it holds.
    """
    with FakeTensorMode():
        leaves = {f"params.{name}": leaf for name, leaf in named_leaves(init()).items()}
    _require_same(Path(checkpoint), leaves, _entries(Path(checkpoint), "params."))


def _load(place: Path, like: State, model: ModelConfig | None, prefix: str, verify: bool) -> State:
    metadata = checkpoints.check(place) if verify else checkpoints.read_metadata(place)
    if model is not None:
        runs.refuse_other_model(metadata, model, place)
    leaves = {prefix + name: leaf for name, leaf in named_leaves(like).items()}
    _require_same(place, leaves, _entries(place, prefix))
    try:
        with safe_open(place / checkpoints.TENSORS, framework="pt") as file, torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{place}: not a checkpoint that can be read ({error})") from None
    return like


def _entries(place: Path, prefix: str) -> dict[str, Entry]:
    try:
        found = read_header(place / checkpoints.TENSORS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: not a checkpoint that can be read ({error})") from None
    return {name: entry for name, entry in found.items() if name.startswith(prefix)}


def _require_same(place: Path, leaves: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> None:
    for name in [*leaves, *(name for name in entries if name not in leaves)]:
        wanted, got = _kind(leaves.get(name)), _kind(entries.get(name))
        if wanted != got:
            raise ValueError(f"{place}: {name}: wanted {wanted}, got {got}")


def _kind(tensor: Tensor | Entry | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def named_leaves(tree: Any) -> dict[str, Tensor]:
    """``{"params.blocks.0.norm.scale": leaf, ...}``, of any shapes; fields of a NamedTuple by name, not by number."""
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    return {
        ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor): leaf
        for accessor, leaf in zip(accessors, leaves, strict=True)
    }
