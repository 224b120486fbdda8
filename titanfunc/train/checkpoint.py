"""Checkpoints: every tensor of the training state in one safetensors file, and json that says what it is.

A checkpoint is written beside its place and then renamed, so a crash at any moment leaves either all of it or
nothing that loads. What can be told without torch (which is the newest, of which model) is in
``titanfunc.config.runs``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import optree
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import titanfunc
from titanfunc.config import ModelConfig, runs

State = TypeVar("State")


def save(run_dir: str | Path, step: int, state: Any, model: ModelConfig, *, keep: int = 0, **configs: Any) -> Path:
    """Write a checkpoint into a run's folder and return its place; then drop all but the newest ``keep``.

    step: optimizer steps done. state: any pytree of tensors, of any shapes and devices. configs: further
    dataclasses to be kept in the json by name. keep: 0 keeps all. Raises ValueError if the run already has a
    checkpoint of this step.
    """
    place = runs.checkpoint_dir(Path(run_dir), step)
    if place.exists():
        raise ValueError(f"step: wanted one that has no checkpoint yet, got {step} ({place} is there)")
    for left_over in place.parent.glob(".writing_*"):  # of a run that was killed while it wrote
        shutil.rmtree(left_over)
    aside = place.with_name(f".writing_{place.name}")
    aside.mkdir(parents=True)
    metadata = {
        "format": runs.FORMAT,
        "step": step,
        "titanfunc": titanfunc.__version__,
        "torch": torch.__version__,
        "model": dataclasses.asdict(model),
        **{name: dataclasses.asdict(config) for name, config in configs.items()},
    }
    tensors = {name: leaf.detach().contiguous() for name, leaf in _named_leaves(state).items()}
    _write(aside / runs.TENSORS, lambda path: save_file(tensors, path))
    text = json.dumps(metadata, indent=2) + "\n"
    _write(aside / runs.METADATA, lambda path: path.write_text(text, encoding="utf-8"))
    os.rename(aside, place)
    _sync(place.parent)
    if keep:
        for old in runs.checkpoints(Path(run_dir))[:-keep]:
            shutil.rmtree(old)
    return place


def load(checkpoint: str | Path, like: State, model: ModelConfig | None = None) -> State:
    """Copy a checkpoint's tensors into those of ``like``, in place and on their devices, and return it.

    Raises ValueError, naming the first difference, if a leaf's name, shape or dtype is not the same, if the
    checkpoint is of another model than ``model``, or if it is damaged. ``like`` is then untouched.
    """
    return _load(checkpoint, like, model, "")


def load_params(checkpoint: str | Path, like: State, model: ModelConfig | None = None) -> State:
    """``load`` for the parameters alone, into the leaves of ``like`` of any shapes; the optimizer's are not read."""
    return _load(checkpoint, like, model, "params.")


def _load(checkpoint: str | Path, like: State, model: ModelConfig | None, prefix: str) -> State:
    place = Path(checkpoint)
    metadata = runs.read_metadata(place)
    if model is not None:
        runs.refuse_other_model(metadata, model, place)
    try:
        with safe_open(place / runs.TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{place}: not a checkpoint that can be read ({error})") from None
    leaves = {prefix + name: leaf for name, leaf in _named_leaves(like).items()}
    for name in [*leaves, *(name for name in tensors if name not in leaves)]:
        wanted, got = _describe(leaves.get(name)), _describe(tensors.get(name))
        if wanted != got:
            raise ValueError(f"{place}: {name}: wanted {wanted}, got {got}")
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(tensors[name])
    return like


def _named_leaves(tree: Any) -> dict[str, Tensor]:
    """``{"params.blocks.0.norm.scale": leaf, ...}``; the fields of a NamedTuple by name, not by number."""
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    return {
        ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor): leaf
        for accessor, leaf in zip(accessors, leaves, strict=True)
    }


def _describe(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    write(path)
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
