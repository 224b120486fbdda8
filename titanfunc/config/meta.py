"""How an optimizer is learned: the tasks, the unrolls, and what the weights move by. No torch, no hydra."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from titanfunc.config import runs as folders
from titanfunc.config._check import require, require_choice, require_number, require_positive, require_whole
from titanfunc.config.files import expanded, require_folder, require_path
from titanfunc.config.presets import override
from titanfunc.config.train import COMPILERS, require_device

OPTIMIZERS = ("small_fc_lopt", "velo_mlp")
TASKS = ("quadratic", "regression", "classification")
WEIGHTS, METRICS, PICTURE, SETTINGS = "weights.safetensors", "metrics.jsonl", "meta_loss.png", "config.yaml"
LONGEST = 100_000


@dataclasses.dataclass(frozen=True)
class MetaConfig:
    """A meta-training: of an optimizer, on small tasks.

    optimizer: one of OPTIMIZERS. start: a file of weights to go on from ("": untrained ones, drawn by the seed).
    step_mult: the optimizer's (0: its own). tasks: some of TASKS. tasks_at_once: of each family, in each meta-step.
    steps: meta-steps. unroll: a task's steps that a meta-gradient goes through.
    horizon: a task's steps from its start to its end; held-out ones are trained for as long.
    lr: the meta-optimizer's peak learning rate. clip_norm: largest norm of one task's meta-gradient.
    eval_every: meta-steps between looks at held-out tasks (0: only before and after). held_out: how many a family.
    seed: of the weights and of the tasks; held-out tasks are the same for all.
    out: the run's folder ("": a new one under runs/).
    device: "auto", "cpu", "cuda" or "cuda:N". compile: one of COMPILERS ("auto": inductor on a GPU, else none).
    """

    optimizer: str = "small_fc_lopt"
    start: str = ""
    step_mult: float = 0.0
    tasks: tuple[str, ...] = TASKS
    tasks_at_once: int = 8
    steps: int = 200
    unroll: int = 10
    horizon: int = 100
    lr: float = 3e-3
    clip_norm: float = 1.0
    eval_every: int = 50
    held_out: int = 16
    seed: int = 0
    out: str = ""
    device: str = "auto"
    compile: str = "auto"

    def __post_init__(self) -> None:
        require_choice(self.optimizer, "optimizer", OPTIMIZERS)
        for name in ("start", "out"):
            require_path(getattr(self, name), name)
        require(len(self.tasks) > 0, "tasks", "at least one", [])
        for task in self.tasks:
            require_choice(task, "tasks", TASKS)
        require(len(set(self.tasks)) == len(self.tasks), "tasks", "each one once", list(self.tasks))
        require_positive(self, ("tasks_at_once", "steps", "unroll", "horizon", "held_out"))
        require_whole(self, ("eval_every", "seed"))
        require(self.seed < 1 << 20, "seed", f"a whole number below {1 << 20:,}", self.seed)
        require(self.horizon <= LONGEST, "horizon", f"at most {LONGEST:,} steps", self.horizon)
        require(self.unroll <= self.horizon, "unroll", f"at most horizon = {self.horizon} steps", self.unroll)
        for name in ("step_mult", "lr", "clip_norm"):
            require_number(getattr(self, name), name)
        require(0 <= self.step_mult < float("inf"), "step_mult", "0 or a positive number", self.step_mult)
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            require(0 < value < float("inf"), name, "a positive number", value)
        require_device(self.device, "device")
        require_choice(self.compile, "compile", COMPILERS)


class MetaPlan(NamedTuple):
    """A meta-training, all of it known to be possible but what only torch can tell. out: its folder, not made yet."""

    config: MetaConfig
    out: Path


def from_mapping(tree: Mapping[str, Any]) -> MetaConfig:
    """Check a flat mapping and build the dataclass; lists become tuples. Raises ValueError, beginning with the key."""
    given = {}
    for key, value in tree.items():
        if key not in _names():
            raise ValueError(unknown_key(key))
        if key == "tasks":
            require(isinstance(value, list | tuple), key, "a list in brackets, as [a,b]", value)
            value = tuple(value)
        given[key] = value
    return override(MetaConfig(), given)


def unknown_key(key: str) -> str:
    """One line on a setting that does not exist: the nearest ones that do, or all.

    >>> unknown_key("task")
    'task: no such setting; did you mean tasks?'
    """
    near = difflib.get_close_matches(key, _names(), n=3, cutoff=0.75)
    if near:
        return f"{key}: no such setting; did you mean {' or '.join(near)}?"
    return f"{key}: no such setting; there are {', '.join(_names())}"


def prepare(config: MetaConfig, root: Path = folders.RUNS) -> MetaPlan:
    """Look for the weights and for a free folder; makes nothing.

    Raises ValueError, in one line, for a file that is not there and for a folder that holds something.
    """
    require(not config.start or os.path.isfile(expanded(config.start)), "start", "a file of weights", config.start)
    config = dataclasses.replace(config, start=str(expanded(config.start)) if config.start else "")
    out = expanded(config.out) if config.out else root / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{config.optimizer}"
    require_folder(out, "out")
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(free, "out", "a folder that is new or empty", str(out))
    return MetaPlan(config, out)


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(MetaConfig)]
