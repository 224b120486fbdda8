"""Which optimizers are compared, under which budget, checked before anything runs. No torch, no hydra."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from titanfunc.config import experiment as experiments
from titanfunc.config import runs as folders
from titanfunc.config._check import SEED, is_number, is_whole, require, require_whole
from titanfunc.config.experiment import Experiment
from titanfunc.config.files import expanded, require_folder, require_path
from titanfunc.config.optim import OptimConfig
from titanfunc.config.presets import override

SETTINGS = "comparison.yaml"
SECTIONS = ("model", "data", "train")
TRAIN = ("steps", "accumulate", "log_every", "max_skipped", "eval_every", "eval_batches", "device", "compile")
"""What a comparison sets of ``TrainConfig``; the rest is its own affair, or makes files that it does not need."""
Read = Callable[[str], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The optimizers, their tuning and the seeds.

    optims: names of files with an optimizer's settings. entries: in their place, mappings with ``optim``, such a
    name, and any of ``name`` (in tables), ``lrs``, and ``settings`` that differ from the file's.
    seeds: of the reported runs, their initial weights and the order of their batches. tune_seed: another one, on which
    the learning rate is chosen.
    lrs: peak rates that each optimizer tries, unless its entry has its own; a single one is taken as tuned.
    lr_factors: where there are none, times the rate in the optimizer's file.
    out: the folder for the results ("": a new one under runs/); one of before is gone on with.
    """

    optims: tuple[str, ...] = ("adamw",)
    entries: tuple[Mapping[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    tune_seed: int = 100
    lrs: tuple[float, ...] = ()
    lr_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    out: str = ""

    def __post_init__(self) -> None:
        ok = all(isinstance(name, str) and name for name in self.optims)
        require(ok, "optims", "a list of names, as [adamw,muon]", list(self.optims))
        require(bool(self.optims or self.entries), "optims", "at least one", [])
        ok = len(self.seeds) > 0 and all(is_whole(seed, 0, SEED) for seed in self.seeds)
        require(ok, "seeds", f"a list of whole numbers from 0 to {SEED}", list(self.seeds))
        require_whole(self, ("tune_seed",), most=SEED)
        other = f"a seed that is not among seeds = {list(self.seeds)}"
        require(self.tune_seed not in self.seeds, "tune_seed", other, self.tune_seed)
        require(len(self.lr_factors) > 0, "lr_factors", "at least one", [])
        for name in ("lrs", "lr_factors"):
            _require_rates(getattr(self, name), name)
        for name in ("optims", "seeds"):
            values = list(getattr(self, name))
            require(len(set(values)) == len(values), name, "each one once", values)
        require_path(self.out, "out")


class Entry(NamedTuple):
    """An optimizer in the comparison: its name there, its settings, and the peak learning rates that it tries."""

    name: str
    optim: OptimConfig
    lrs: tuple[float, ...]


class Plan(NamedTuple):
    """A comparison, all of it known to be possible. budget: model, data and training of every run; of its ``optim``
    and seed nothing is used. before: the optimizers (name -> settings) of earlier starts in the folder ``out``."""

    config: CompareConfig
    budget: Experiment
    entries: tuple[Entry, ...]
    out: Path
    before: Mapping[str, Any] = {}

    @property
    def tunes(self) -> bool:
        """Whether learning rates are chosen here; every optimizer tries as many."""
        return len(self.entries[0].lrs) > 1

    def experiment(self, entry: Entry) -> Experiment:
        """A run's settings with an optimizer of the comparison."""
        return dataclasses.replace(self.budget, optim=entry.optim)


def prepare(tree: Mapping[str, Any], read: Read, root: Path = folders.RUNS) -> Plan:
    """Check a nested mapping and look at the folders it names; makes nothing.

    read: the settings in an optimizer's file. Raises ValueError, in one line that begins with the key, for what
    ``experiment.from_mapping`` and ``CompareConfig`` refuse, entries of one name or with unequal numbers of learning
    rates, and a folder that holds anything but the same comparison.
    """
    own, sections = {}, {}
    for key, value in tree.items():
        if key in SECTIONS:
            sections[key] = value
            continue
        if not hasattr(CompareConfig, key):
            raise ValueError(unknown_key(key))
        if isinstance(getattr(CompareConfig, key), tuple):
            require(isinstance(value, list | tuple), key, "a list in brackets, as [a,b]", value)
            value = tuple(value)
        own[key] = value
    for key in sections.get("train") or {}:
        if key not in TRAIN:
            raise ValueError(unknown_key(f"train.{key}"))
    config = override(CompareConfig(), own)
    once = {"checkpoint_every": 0, "sample_tokens": 0}  # nothing is saved and nothing written but the results
    budget = experiments.from_mapping({**sections, "train": {**(sections.get("train") or {}), **once}})
    entries = tuple(
        _entry(given, config, sections, read) for given in config.entries or [{"optim": name} for name in config.optims]
    )
    names = [entry.name for entry in entries]
    require(len(set(names)) == len(names), "entries", "names that differ", names)
    most = max(entries, key=lambda entry: len(entry.lrs))
    for entry in entries:
        if len(entry.lrs) != len(most.lrs):
            raise ValueError(
                f"entries: wanted as many lrs for each, got {len(entry.lrs)} for {entry.name} and {len(most.lrs)} for "
                f"{most.name}"
            )
    budget.data.check_memory()
    budget.data.check_sources()
    budget.data.check_hub()
    out = expanded(config.out) if config.out else root / f"comparison_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return Plan(config, budget, entries, out, _before(out, budget, entries))


def to_mapping(plan: Plan) -> dict[str, Any]:
    """What the folder's ``comparison.yaml`` says: the budget, the seeds, and every optimizer that ever ran in it."""
    sections = experiments.to_mapping(plan.budget)
    mine = {entry.name: experiments.to_mapping(plan.experiment(entry))["optim"] for entry in plan.entries}
    return {
        **{name: sections[name] for name in SECTIONS},
        "seeds": list(plan.config.seeds),
        "tune_seed": plan.config.tune_seed,
        "lrs": {entry.name: list(entry.lrs) for entry in plan.entries},
        "optimizers": {**plan.before, **mine},
    }


def unknown_key(key: str) -> str:
    """One line on a setting that does not exist: the nearest ones that do, or all.

    >>> unknown_key("seed")
    'seed: no such setting; did you mean seeds?'
    """
    section = key.partition(".")[0]
    if section in ("model", "data"):
        return experiments.unknown_key(key)
    own = [field.name for field in dataclasses.fields(CompareConfig)]
    names = [f"train.{name}" for name in TRAIN]
    near = difflib.get_close_matches(key, [*own, *SECTIONS, *names], n=3, cutoff=0.75)
    if near:
        return f"{key}: no such setting; did you mean {' or '.join(near)}?"
    if section == "train":
        return f"{key}: no such setting; train has {', '.join(TRAIN)} here"
    return f"{key}: no such setting; there are {', '.join([*own, *(f'{name}.' for name in SECTIONS)])}"


def _entry(given: Any, config: CompareConfig, sections: Mapping[str, Any], read: Read) -> Entry:
    fields = ("name", "optim", "lrs", "settings")
    form = "{optim: adamw}, and any of name, lrs, settings"
    require(isinstance(given, Mapping) and isinstance(given.get("optim"), str), "entries", form, given)
    for key in given:
        require(key in fields, "entries", f"some of {', '.join(fields)}", key)
    name, settings, lrs = given.get("name", given["optim"]), given.get("settings") or {}, given.get("lrs") or ()
    require(isinstance(name, str) and name != "", "entries", "a name, as text", name)
    require(isinstance(settings, Mapping), f"entries: {name}: settings", "a group of settings", settings)
    require(isinstance(lrs, list | tuple), f"entries: {name}: lrs", "a list in brackets, as [a,b]", lrs)
    _require_rates(lrs, f"entries: {name}: lrs")
    optim = _merged(read(given["optim"]), settings)
    try:
        built = experiments.from_mapping({**sections, "train": {}, "optim": optim}).optim
    except ValueError as error:
        raise ValueError(f"entries: {name}: {error}") from None
    lrs = lrs or config.lrs or [built.lr * factor for factor in config.lr_factors]
    return Entry(name, built, tuple(float(rate) for rate in lrs))


def _before(out: Path, budget: Experiment, entries: tuple[Entry, ...]) -> Mapping[str, Any]:
    """The optimizers of earlier starts in a folder, which must have had the same budget and settings."""
    require_folder(out, "out")
    place = out / SETTINGS
    if not place.is_file():
        empty = not out.exists() or not any(out.iterdir())
        require(empty, "out", "a folder of this comparison, or an empty one", str(out))
        return {}
    try:
        there = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        there = None
    whole = isinstance(there, Mapping) and all(
        isinstance(there.get(name), Mapping) for name in ("optimizers", *SECTIONS)
    )
    require(whole, "out", f"a folder whose {SETTINGS} can be read, or an empty one", str(out))
    optimizers: Mapping[str, Any] = there["optimizers"]
    pairs = [(name, there[name], getattr(budget, name)) for name in SECTIONS]
    pairs += [(entry.name, optimizers.get(entry.name), entry.optim) for entry in entries]
    for section, old, new in pairs:
        for name, was, is_now in folders.differences(old, new) if old else ():
            if name not in ("preset", "lr"):  # the one stands beside the model, the other is what lrs are for
                raise ValueError(
                    f"out: {out} holds runs with {section}.{name} = {was!r}, which is now {is_now!r}; name another "
                    f"folder, or ask for the same"
                )
    return optimizers


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _require_rates(values: Any, field: str) -> None:
    ok = all(is_number(value) and value > 0 for value in values)
    require(ok, field, "a list of positive numbers", list(values))
    require(len(set(values)) == len(values), field, "each one once", list(values))
