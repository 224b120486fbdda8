"""One training run as plain nested mappings, and as checked dataclasses. No torch, no hydra.

The mapping has the sections ``model`` (a preset's name and the fields that differ from it), ``data``, ``optim``
and ``train``. A null of ``model`` stands for "as the preset says", and of ``data.seq_len`` for "as the model's".
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

from titanfunc.config._check import require, require_number
from titanfunc.config.data import DataConfig, vocab_size
from titanfunc.config.files import expanded
from titanfunc.config.model import ModelConfig
from titanfunc.config.optim import OptimConfig
from titanfunc.config.presets import PRESETS, override, wanted_names
from titanfunc.config.recall import require_room
from titanfunc.config.train import TrainConfig

SECTIONS = ("model", "data", "optim", "train")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run is made of. preset: the name that ``model`` was derived from."""

    preset: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig


def from_mapping(tree: Mapping[str, Any]) -> Experiment:
    """Check a nested mapping and build the dataclasses.

    ``data.seq_len`` null is the model's; ``model.vocab_size`` null is the tokenizer's. Raises ValueError, in one
    line that begins with the key (``model.heads: wanted ..., got ...``), for an unknown key, a value of the wrong
    type or out of range, a vocabulary that is not the tokenizer's, rows too short for their recall task, or a batch
    that accumulation does not divide.
    """
    for key in tree:
        if key not in SECTIONS:
            raise ValueError(unknown_key(str(key)))
    sections = {name: _group(tree.get(name) or {}, name) for name in SECTIONS}
    preset = sections["model"].pop("preset", None)
    require(preset in PRESETS, "model.preset", wanted_names(preset), preset)
    sections["model"] = _given(sections["model"], "model", PRESETS[preset])
    if sections["data"].get("seq_len", 0) is None:
        del sections["data"]["seq_len"]

    data = _build(DataConfig(), {"seq_len": PRESETS[preset].seq_len, **sections["data"]}, "data")
    tokens = vocab_size(data.tokenizer, data.bpe_size)
    model = _build(PRESETS[preset], {"vocab_size": tokens, **sections["model"]}, "model")
    if model.vocab_size != tokens:
        raise ValueError(
            f"model.vocab_size: wanted {tokens}, as data.tokenizer={data.tokenizer} has (or null, which takes it "
            f"from there), got {model.vocab_size}"
        )
    if "seq_len" not in sections["data"]:
        data = dataclasses.replace(data, seq_len=model.seq_len)
    if data.task:
        require_room(data.task, data.recall, data.seq_len)
    optim = _build(OptimConfig(), sections["optim"], "optim")
    train = _build(TrainConfig(), sections["train"], "train")
    divides = data.batch_size % train.accumulate == 0
    require(divides, "train.accumulate", f"a divisor of data.batch_size = {data.batch_size}", train.accumulate)
    ok = not (optim.held_out and data.task)
    wanted = "simple, or explicit with unroll=online, for a recall task: its rows are drawn for one step each"
    require(ok, "optim.nested.mode", wanted, optim.nested.mode)
    ok = not (optim.held_out and data.stream)
    nested = f"optim.nested: mode={optim.nested.mode}, unroll={optim.nested.unroll}"
    wanted = f"false ({nested} learns on batches of later steps, for which a stream would be read from its beginning)"
    require(ok, "data.stream", wanted + ", or mode=simple, or explicit with unroll=online", data.stream)
    if optim.second_derivatives and sections["model"].get("layer_code") is None:
        model = dataclasses.replace(model, layer_code="each")
    ok = not (optim.second_derivatives and model.layer_code == "shared")
    wanted = "each, for an optimizer that takes second derivatives (optim.nested: mode=implicit, unroll=exact)"
    require(ok, "model.layer_code", wanted, model.layer_code)
    weights = tuple(str(expanded(file)) for file in optim.learned.weights)
    for file in weights:
        require(os.path.isfile(file), "optim.learned.weights", "files that are there", file)
    optim = dataclasses.replace(optim, learned=dataclasses.replace(optim.learned, weights=weights))
    return Experiment(preset, model, data, optim, train)


def from_metadata(metadata: Mapping[str, Any]) -> tuple[ModelConfig, DataConfig]:
    """What a checkpoint's json says of its model and data; fields that came later have their defaults.

    Raises ValueError, beginning with the key, for what this version does not know.
    """
    model, data = (_group(metadata.get(name) or {}, name) for name in ("model", "data"))
    return _build(ModelConfig(), model, "model"), _build(DataConfig(), data, "data")


def to_mapping(experiment: Experiment) -> dict[str, Any]:
    """The nested mapping with every field filled in: ``from_mapping(to_mapping(e)) == e``."""
    model = {"preset": experiment.preset, **dataclasses.asdict(experiment.model)}
    rest = {name: dataclasses.asdict(getattr(experiment, name)) for name in SECTIONS[1:]}
    return _lists({"model": model, **rest})


def unknown_key(key: str) -> str:
    """One line on a dotted key that does not exist: the nearest ones that do, or all of its section.

    >>> unknown_key("model.layrs")
    'model.layrs: no such setting; did you mean model.layers?'
    """
    known = to_mapping(Experiment("", ModelConfig(), DataConfig(), OptimConfig(), TrainConfig()))
    names = [name for section in known for name in (section, *_names(known[section], section))]
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.75)
    if near:
        return f"{key}: no such setting; did you mean {' or '.join(near)}?"
    section = key.partition(".")[0]
    if section in known:
        return f"{key}: no such setting; {section} has {', '.join(known[section])}"
    return f"{key}: no such setting; they begin with {', '.join(f'{name}.' for name in SECTIONS)}"


def _lists(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with its tuples, at every depth, as lists: what yaml and json have."""
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        plain[key] = _lists(value) if isinstance(value, Mapping) else list(value) if type(value) is tuple else value
    return plain


def _names(tree: Mapping[str, Any], path: str) -> list[str]:
    names = []
    for key, value in tree.items():
        names += [f"{path}.{key}", *(_names(value, f"{path}.{key}") if isinstance(value, Mapping) else ())]
    return names


def _group(section: Any, name: str) -> dict[str, Any]:
    require(isinstance(section, Mapping), name, "a group of settings", section)
    return dict(section)


def _given(section: Any, name: str, defaults: Any) -> dict[str, Any]:
    """The entries of a section that are not null, at every depth; a group is not null."""
    given = {}
    for key, value in section.items():
        default = getattr(defaults, key, None)
        if dataclasses.is_dataclass(default):
            given[key] = _given(_group(value, f"{name}.{key}"), f"{name}.{key}", default)
        elif value is not None:
            given[key] = value
    return given


def _build(defaults: Any, changes: dict[str, Any], section: str) -> Any:
    changes = _typed(defaults, changes, section + ".")
    try:
        return override(defaults, changes)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(section + ".") else f"{section}.{text}") from None


def _typed(defaults: Any, changes: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The changes, each of the type that the default value has; a float may be written as a whole number."""
    typed: dict[str, Any] = {}
    fields = {field.name for field in dataclasses.fields(defaults)}
    for key, value in changes.items():
        name = path + key
        if key not in fields:
            raise ValueError(unknown_key(name))
        default = getattr(defaults, key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if dataclasses.is_dataclass(default):
            require(isinstance(value, Mapping), name, "a group of settings", value)
            value = _typed(default, value, name + ".")
        elif isinstance(default, bool):
            require(isinstance(value, bool), name, "true or false", value)
        elif isinstance(default, int):
            require(whole, name, "a whole number", value)
        elif isinstance(default, float):
            require_number(value, name)
            value = float(value)
        elif isinstance(default, str):
            require(isinstance(value, str), name, "text (in quotes, if it looks like a number)", value)
        elif isinstance(default, tuple):
            require(isinstance(value, list | tuple), name, f"a list, as {list(default) or '[a, b]'}", value)
            value = tuple(value)
        typed[key] = value
    return typed
