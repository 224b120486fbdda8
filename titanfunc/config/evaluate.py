"""What an evaluation measures, checked, and the look at the runs' folders that follows. No torch, no hydra."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from titanfunc.config import runs as folders
from titanfunc.config._check import SEED, SIZE, is_whole, require, require_choice, require_positive, require_whole
from titanfunc.config.checkpoints import CHECKPOINTS, check, newest_whole, read_metadata, warn_unless_verified
from titanfunc.config.data import DataConfig
from titanfunc.config.experiment import from_metadata
from titanfunc.config.files import expanded, require_folder, require_path
from titanfunc.config.model import KERNELS, ModelConfig
from titanfunc.config.presets import override
from titanfunc.config.recall import LEVELS, TESTS, WITHOUT_TEXT, least_test_length
from titanfunc.config.train import COMPILERS, require_device

MEMORY = ("both", "on", "off")
TEXT_TESTS = ("passkey", "number", "uuid", "word")
"""The tests of a run that was trained on plain text, unless others are asked for."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The tests and the runs that take them.

    run: "latest", or the folder of a run (its newest checkpoint) or of a checkpoint. runs: several of them instead,
    compared in one table. tasks: some of TESTS (none: those that the first run was trained on).
    lengths: tokens that a row predicts (none: the first run's training length, and 2 and 4 times it).
    depths: where the needle or the evidence stands, from 0 (a row's start) to 1 (right before the question).
    pairs: of mqar, in the place of depths. samples: rows for each length and depth.
    memory: "on", "off" (nothing is written into it, the same weights otherwise), or "both".
    text_rows: rows of held-out text for the loss by position, at the greatest length (0: none).
    batch_size: rows read at once. piece: tokens that a model with a state reads at a time.
    seed: of the rows. text: a folder of .txt files for the rows' text ("": the first run's corpus).
    out: a folder for the results ("": evaluation/ in the run's; a new one under runs/ for several).
    device: "auto", "cpu", "cuda" or "cuda:N". compile: one of COMPILERS ("auto": inductor on a GPU, else none).
    kernels: "reference" or "triton" (on a GPU), whichever a run was trained with.
    """

    run: str = "latest"
    runs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    samples: int = 20
    memory: str = "both"
    text_rows: int = 8
    batch_size: int = 8
    piece: int = 4096
    seed: int = 0
    text: str = ""
    out: str = ""
    device: str = "auto"
    compile: str = "auto"
    kernels: str = "reference"

    def __post_init__(self) -> None:
        for name in ("run", "text", "out"):
            require_path(getattr(self, name), name)
        require(self.run != "", "run", "latest, or the folder of a run or a checkpoint", self.run)
        ok = all(isinstance(run, str) and run for run in self.runs)
        require(ok, "runs", "a list of folders", list(self.runs))
        for run in self.runs:
            require_path(run, "runs")
        for task in self.tasks:
            require_choice(task, "tasks", TESTS)
        for name in ("lengths", "pairs"):
            values = list(getattr(self, name))
            ok = all(is_whole(value, 1) for value in values)
            require(ok, name, f"a list of whole numbers from 1 to {SIZE}", values)
        ok = all(isinstance(depth, int | float) and 0 <= depth <= 1 for depth in self.depths)
        require(ok, "depths", "a list of numbers from 0 to 1", list(self.depths))
        for name in ("depths", "pairs"):
            require(len(getattr(self, name)) > 0, name, "at least one", [])
        for name in ("runs", "tasks", "lengths", "depths", "pairs"):
            values = list(getattr(self, name))
            require(len(set(values)) == len(values), name, "each one once", values)
        require_positive(self, ("samples", "batch_size", "piece"))
        require_whole(self, ("text_rows",))
        require_whole(self, ("seed",), most=SEED)
        require_choice(self.memory, "memory", MEMORY)
        require_device(self.device, "device")
        require_choice(self.compile, "compile", COMPILERS)
        require_choice(self.kernels, "kernels", KERNELS)


class Subject(NamedTuple):
    """A run that takes the tests. name: what it is called in tables. step: optimizer steps that it was trained for."""

    name: str
    checkpoint: Path
    step: int
    model: ModelConfig


class Plan(NamedTuple):
    """An evaluation, all of it known to be possible. data: whose text and settings the rows are drawn with."""

    config: EvaluateConfig
    subjects: tuple[Subject, ...]
    data: DataConfig
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    out: Path

    @property
    def text_rows(self) -> int:
        """Rows of plain text that are read; none where the run was trained without text and no other is named."""
        return self.config.text_rows if self.data.reads_text or self.config.text else 0

    @property
    def trained_on_text(self) -> bool:
        """Whether the first run was trained to predict text, and not the answers of a recall task alone."""
        return not self.data.task or (self.data.reads_text and self.data.recall.text_weight > 0)

    @property
    def reads_text(self) -> bool:
        """Whether held-out text is needed, for rows of a task or as it is."""
        return self.text_rows > 0 or any(TESTS[task] not in WITHOUT_TEXT for task in self.tasks)

    def levels(self, task: str) -> tuple[float, ...]:
        """What a task varies besides the length: depths, numbers of pairs, or nothing (0 alone)."""
        return {"depth": self.config.depths, "pairs": self.config.pairs, "": (0,)}[LEVELS[TESTS[task]]]


def from_mapping(tree: Mapping[str, Any]) -> EvaluateConfig:
    """Check a flat mapping and build the dataclass; lists become tuples. Raises ValueError, beginning with the key."""
    defaults, given = EvaluateConfig(), {}
    for key, value in tree.items():
        if not hasattr(defaults, key):
            raise ValueError(unknown_key(key))
        if isinstance(getattr(defaults, key), tuple):
            require(isinstance(value, list | tuple), key, "a list in brackets, as [a,b]", value)
            value = tuple(value)
        given[key] = value
    return override(defaults, given)


def unknown_key(key: str) -> str:
    """One line on a setting that does not exist: the nearest ones that do, or all.

    >>> unknown_key("length")
    'length: no such setting; did you mean lengths?'
    """
    names = [field.name for field in dataclasses.fields(EvaluateConfig)]
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.75)
    if near:
        return f"{key}: no such setting; did you mean {' or '.join(near)}?"
    return f"{key}: no such setting; there are {', '.join(names)}"


def prepare(config: EvaluateConfig, root: Path = folders.RUNS) -> Plan:
    """Find the runs and see that each can take the tests; makes nothing.

    Raises ValueError, in one line, for a run or a text that is missing, models of other vocabularies than bytes, a
    length too small for its task, or an ``out`` that is a file.
    """
    places = [_find(name, "runs", root) for name in config.runs] or [_find(config.run, "run", root)]
    subjects, data = [], DataConfig()
    for number, (name, place) in enumerate(zip(_names(places), places, strict=True)):
        metadata = read_metadata(place)
        warn_unless_verified(place, metadata)
        try:
            model, trained_on = from_metadata(metadata)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if model.vocab_size != 256:
            raise ValueError(f"{place}: wanted a model of bytes (256 tokens), got one of {model.vocab_size}")
        try:
            model = dataclasses.replace(model, kernels=config.kernels)
        except ValueError as error:
            raise ValueError(f"kernels: {place}: {error}") from None
        subjects.append(Subject(name, place, metadata["step"], model))
        if number == 0:
            commit = folders.commit_of(_run_folder(place), trained_on)  # text that it held out, and not what came later
            data = dataclasses.replace(trained_on, revision=trained_on.revision or commit)
    if config.text:
        data = data.with_texts(config.text)
    out = expanded(config.out) if config.out else _own_folder(places, config.runs, root)
    require_folder(out, "out")
    tasks = config.tasks or _trained_on(data)
    lengths = config.lengths or tuple(data.seq_len * times for times in (1, 2, 4))
    plan = Plan(config, tuple(subjects), data, tasks, lengths, out)
    for task in tasks:
        pairs = max(config.pairs) if task == "mqar" else 0
        least = least_test_length(task, data.recall, pairs)
        wanted = f"at least {least} for {task}" + (f" of {pairs} pairs (lower pairs)" if pairs else "")
        require(min(lengths) >= least, "lengths", wanted, min(lengths))
    if plan.reads_text:
        _check_text(config, data)
    return plan


def _check_text(config: EvaluateConfig, data: DataConfig) -> None:
    try:
        data = dataclasses.replace(data, task="")
        data.check_sources()
        data.check_hub()
    except ValueError as error:
        if config.text:
            raise ValueError(str(error).replace("data.path", "text", 1)) from None
        raise ValueError(f"{error} (as the run was trained; text=FOLDER names another)") from None


def _find(name: str, key: str, root: Path) -> Path:
    """The checkpoint that a name means: the newest whole one under ``root`` or of a run, or itself if it is whole."""
    if name == "latest":
        newest = folders.newest_of_all(key, root)
        if newest is None:
            raise ValueError(f"{key}: no run under {root.resolve()} has a checkpoint; train one, or name a folder")
        return newest
    path = expanded(name)
    if folders.is_checkpoint(path):
        check(path)
        return path
    require(os.path.isdir(path), key, "latest, or the folder of a run or a checkpoint", name)
    found, faults = newest_whole(path)
    if found is None:
        why = f" ({'; '.join(faults)})" if faults else ""
        raise ValueError(f"{key}: wanted a folder that holds a checkpoint, got {name!r}{why}")
    return found


def _run_folder(place: Path) -> Path:
    """The run's folder of a checkpoint that lies in one, else the checkpoint's."""
    return place.parent.parent if place.parent.name == CHECKPOINTS else place


def _names(places: list[Path]) -> list[str]:
    """What to call checkpoints: by the run's folder, with as much of the path as tells them apart."""
    for parts in (lambda p: (_run_folder(p).resolve().name,), lambda p: (_run_folder(p).resolve().name, p.name)):
        names = ["/".join(parts(place)) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _own_folder(places: list[Path], several: tuple[str, ...], root: Path) -> Path:
    if several:
        return root / f"evaluation_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return _run_folder(places[0]) / "evaluation"


def _trained_on(data: DataConfig) -> tuple[str, ...]:
    kinds = {"needle": data.recall.needle.kinds, "world": data.recall.world.kinds}
    return kinds.get(data.task, (data.task,)) if data.task else TEXT_TESTS
