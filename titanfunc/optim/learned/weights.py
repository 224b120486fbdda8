"""Weights of learned optimizers in files: published ones, and our own.

Read are safetensors, torch's .pt, .pth and .bin (tensors alone; nothing else is unpickled) and numpy's .npz. What a
file is, is known by its tensors' names; weights are [in, out] here and in google/learned_optimization's files, and
[out, in] in PyLO's.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from titanfunc import tree
from titanfunc.optim.learned import watcher
from titanfunc.optim.learned.network import LAYERS, Network, decay_shapes, initial_decays, layer_shapes
from titanfunc.optim.learned.small_fc import FEATURES as SMALL_FC_FEATURES
from titanfunc.optim.learned.small_fc import OUTPUTS as SMALL_FC_OUTPUTS
from titanfunc.optim.learned.velo import FEATURES as VELO_FEATURES
from titanfunc.optim.learned.velo import OUTPUTS as VELO_OUTPUTS

OUTSIDE = ("state_dict.", "torch_params.", "nn.", "~.", "network.")
"""What may stand before a layout's own names, in this order."""
PYLO_OFFSETS = {
    "momentum": (0.15216392, 0.14245212, 0.06812963),
    "second": (0.01079706,),
    "factored": (0.18621896, -0.10864615, -0.06185547),
}
"""What PyLO adds to the decays, as they are learned, beside every small_fc file that brings none of its own."""


class Layout(NamedTuple):
    """How a file names its tensors.

    mark: the tensor that tells it. names: our name -> the file's; swapped: whether weights are [out, in] there.
    unused: further tensors that such a file has. kind: "small_fc", "velo_mlp", "bank", "watcher" or "velo".
    """

    mark: str
    names: Mapping[str, str]
    swapped: bool
    kind: str
    unused: tuple[str, ...] = ()


def _layers(pattern: str, layers: tuple[str, ...], weight: str, bias: str) -> dict[str, str]:
    """Our names of three layers -> their names, by a pattern with {layer} and {part}."""
    return {
        f"{ours}.{part}": pattern.format(layer=theirs, part=name)
        for ours, theirs in zip(LAYERS, layers, strict=True)
        for part, name in (("weight", weight), ("bias", bias))
    }


def _decays(pattern: str) -> dict[str, str]:
    theirs = {"momentum": "momentum_decays", "second": "rms_decays", "factored": "adafactor_decays"}
    return {f"decays.{ours}": pattern.format(name) for ours, name in theirs.items()}


_ONE = {
    "input.weight": "input_weights", "input.bias": "input_bias",
    "hidden.weight": "hidden_weights.0", "hidden.bias": "hidden_bias.0",
    "output.weight": "output_weights", "output.bias": "output_bias",
}  # fmt: skip
_BANK = {
    "bank.input.weight": "input_weights_", "bank.input.bias": "input_bias_",
    "bank.hidden.weight": "hidden_weights_.0", "bank.hidden.bias": "hidden_bias_.0",
    "bank.output.weight": "output_weights_", "bank.output.bias": "output_bias_",
}  # fmt: skip
_WATCHER = {
    f"{ours}.{part}": f"{theirs}.{part}"
    for ours, theirs in {
        "mix": "mix_layer2", "merge": "final_mix_layer", "lstm": "lstm.linear", "controls": "rnn_to_controls",
        "rate": "step_size",
    }.items()
    for part in ("weight", "bias")
} | {"start.hidden": "lstm_init_state.0", "start.cell": "lstm_init_state.1"}  # fmt: skip
_OWN_DECAYS = {name: name for name in decay_shapes()}
_OWN_LAYERS = _layers("{layer}.{part}", LAYERS, "weight", "bias")
_OWN_VELO = {name: name for name in (*(f"bank.{name}" for name in _OWN_LAYERS), *watcher.watcher_shapes(1, 1))}

LAYOUTS = {
    "PyLO's MetaMLP": Layout(
        "linear_0.weight",
        {**_layers("{layer}.{part}", ("input", "linear_0", "output"), "weight", "bias"), **_decays("decays.{}")},
        True,
        "small_fc",
    ),
    "google's adafac_mlp_lopt": Layout(
        "w0", {**_layers("{part}{layer}", ("0", "1", "2"), "w", "b"), **_decays("{}")}, False, "small_fc"
    ),
    "PyLO's VeLOMLP, its bank": Layout("input_weights_", _BANK, True, "bank", tuple(_ONE.values())),
    "PyLO's VeLOMLP, one network": Layout("input_weights", _ONE, True, "velo_mlp"),
    # The first of the three layers is computed and thrown away in VeLO itself.
    "PyLO's VeLORNN": Layout("mix_layer2.weight", _WATCHER, True, "watcher", ("mix_layer1.weight", "mix_layer1.bias")),
    "velo": Layout("bank.input.weight", {**_OWN_VELO, **_OWN_DECAYS}, False, "velo"),
    "small_fc_lopt or velo_mlp": Layout("input.weight", {**_OWN_LAYERS, **_OWN_DECAYS}, False, "small_fc"),
}


def load_weights(path: str | Path) -> Network:
    """The network in a local file: nested dicts of float32 tensors, of the shapes that its kind's ``init_*`` gives.

    Known are our own files, PyLO's MetaMLP (small_fc_lopt), VeLOMLP and VeLORNN (the two halves of ``velo``), and
    google/learned_optimization's ``adafac_mlp_lopt`` as arrays by name. Decays that a file does not bring are those
    that its publisher uses with it.
    Raises ValueError, in one line that names the file, for one that is missing, cannot be read or is of no known
    layout, and for a tensor that is missing, too many, or of another shape than the others ask for.
    """
    path = Path(path)
    content = _read(path)
    full = {_inner(name): name for name in content}
    tensors = {inner: content[name] for inner, name in full.items()}
    title = next((title for title, layout in LAYOUTS.items() if layout.mark in tensors), None)
    if title is None:
        raise ValueError(f"{path}: wanted the tensors of a known learned optimizer, got {', '.join(content) or 'none'}")
    layout = LAYOUTS[title]
    found = {ours: tensors.pop(theirs) for ours, theirs in layout.names.items() if theirs in tensors}
    left = [name for name in tensors if name not in layout.unused]
    if left:
        raise ValueError(f"{path}: {full[left[0]]}: wanted no such tensor in a file of {title}")
    if layout.swapped:
        found = {ours: tensor.mT if _turned(ours, tensor.ndim) else tensor for ours, tensor in found.items()}
    _check(path, layout, found, full)
    network = {ours: tensor.to(torch.float32).contiguous() for ours, tensor in found.items()}
    if layout.kind != "watcher":
        network = {**_usual_decays(title), **network}
    if "momentum_decays" in layout.names.get("decays.momentum", "") and "decays.momentum" in found:
        plain = {f"decays.{name}": value for name, value in initial_decays().items()}
        network |= {name: network[name] + plain[name] for name in plain}  # theirs are offsets
    return _nested(network)


def save_weights(network: Network, path: str | Path) -> Path:
    """Write a network (leaves of any shapes) under our own names, as safetensors; returns the path."""
    save_file({name: leaf.detach().cpu().contiguous() for name, leaf in tree.named_leaves(network).items()}, path)
    return Path(path)


def _read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its path in it, joined by dots."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name.replace("/", "."): torch.from_numpy(arrays[name]) for name in arrays.files}
        if path.suffix in (".pt", ".pth", ".bin"):
            return _flat(torch.load(path, map_location="cpu", weights_only=True), "")
    except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as a file of tensors ({reason})") from None
    raise ValueError(f"{path}: wanted a name that ends in .safetensors, .pt, .pth, .bin or .npz")


def _flat(content: Any, at: str) -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        return {at: content}
    if isinstance(content, list | tuple):
        content = {str(number): part for number, part in enumerate(content)}
    if not isinstance(content, Mapping):
        raise ValueError(f"{at or 'the content'} is no tensor but of type {type(content).__name__}")
    parts = [_flat(part, f"{at}.{key}" if at else str(key)) for key, part in content.items()]
    return {name: tensor for part in parts for name, tensor in part.items()}


def _inner(name: str) -> str:
    for outside in OUTSIDE:
        name = name.removeprefix(outside)
    return name


def _turned(ours: str, ndim: int) -> bool:
    return ours.endswith("weight") and ndim >= 2


def _usual_decays(title: str) -> dict[str, Tensor]:
    """By our names: what a publisher uses with a file that brings no decays."""
    offsets = PYLO_OFFSETS if title == "PyLO's MetaMLP" else {}
    return {
        f"decays.{name}": value + torch.tensor(offsets.get(name, (0.0,) * len(value)))
        for name, value in initial_decays().items()
    }


def _check(path: Path, layout: Layout, found: Mapping[str, Tensor], full: Mapping[str, str]) -> None:
    """Raise ValueError for the first tensor that is missing or of another shape, as the file has it."""
    optional = () if any(name in found for name in _OWN_DECAYS) else tuple(_OWN_DECAYS)
    for ours, shape in _shapes(layout.kind, found).items():
        if ours not in layout.names or (ours in optional and ours not in found):
            continue
        theirs = full.get(layout.names[ours], layout.names[ours])
        if ours not in found:
            raise ValueError(f"{path}: {theirs}: wanted {_as_there(layout, ours, shape)}, got nothing")
        got = tuple(found[ours].shape)
        if got != shape:
            there = (_as_there(layout, ours, each) for each in (shape, got))
            raise ValueError("{}: {}: wanted {}, got {}".format(path, theirs, *there))


def _as_there(layout: Layout, ours: str, shape: tuple[int, ...]) -> list[int]:
    turned = layout.swapped and _turned(ours, len(shape))
    return [*shape[:-2], shape[-1], shape[-2]] if turned else list(shape)


def _shapes(kind: str, found: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """What every tensor's shape has to be, given the sizes that some of them tell."""
    shapes: dict[str, tuple[int, ...]] = {}
    units, bank = _sizes(found.get("controls.weight"), (512, 256))
    if kind in ("watcher", "velo"):
        shapes |= watcher.watcher_shapes(bank, units)
    if kind in ("bank", "velo"):
        first = found.get("bank.input.weight")
        if kind == "bank" and first is not None and first.ndim:
            bank = len(first)
        _, hidden = _sizes(first, (VELO_FEATURES, 4))
        inner = layer_shapes(VELO_FEATURES, hidden, VELO_OUTPUTS, (bank,))
        shapes |= {f"bank.{name}": shape for name, shape in inner.items()}
    if kind in ("small_fc", "velo_mlp"):
        features, hidden = _sizes(found.get("input.weight"), (0, 32))
        of_velo = kind == "velo_mlp" or features == VELO_FEATURES
        features, outputs = (VELO_FEATURES, VELO_OUTPUTS) if of_velo else (SMALL_FC_FEATURES, SMALL_FC_OUTPUTS)
        shapes |= layer_shapes(features, hidden, outputs)
    return shapes | decay_shapes()


def _sizes(weight: Tensor | None, usual: tuple[int, int]) -> tuple[int, int]:
    return (int(weight.shape[-2]), int(weight.shape[-1])) if weight is not None and weight.ndim >= 2 else usual


def _nested(flat: Mapping[str, Tensor]) -> Network:
    network: Network = {}
    for name, tensor in flat.items():
        part, _, leaf = name.rpartition(".")
        place = network
        for key in part.split("."):
            place = place.setdefault(key, {})
        place[leaf] = tensor
    return network
