"""What is compiled and measured beside what, checked before anything runs. No torch, no hydra."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from titanfunc.config import experiment as experiments
from titanfunc.config import runs as folders
from titanfunc.config._check import (
    SEED,
    require,
    require_choice,
    require_number,
    require_positive,
    require_whole,
)
from titanfunc.config.files import require_folder
from titanfunc.config.model import KERNELS, ModelConfig
from titanfunc.config.optim import OptimConfig
from titanfunc.config.presets import PRESETS, override, wanted_names
from titanfunc.config.train import require_device

VARIANTS = ("eager", "aot_eager", "inductor", "inductor_cuda_graph", "compiled_autograd", "older_way")
SECTIONS = ("model", "optim")
SETTINGS, ROWS, PAGE = "config.yaml", "report.json", "report.html"


@dataclasses.dataclass(frozen=True)
class CompileReportConfig:
    """The variants, the batch, and how each is measured.

    variants: some of VARIANTS. kernels: some of KERNELS, each with every variant but the older way, which has none.
    batch_size: rows of random tokens a step. seq_len: tokens that a row predicts (0: the model's). accumulate: equal
    parts of the batch. seed: of weights and tokens.
    warm_up: steps before the clock, the first of which compiles. steps: steps that are timed.
    time_limit: seconds that a process of a variant may take. device: "auto", "cpu", "cuda" or "cuda:N".
    out: the report's folder ("": a new one under runs/). commit: written into the report ("": what git says of the
    checkout).
    """

    variants: tuple[str, ...] = VARIANTS
    kernels: tuple[str, ...] = KERNELS
    batch_size: int = 8
    seq_len: int = 0
    accumulate: int = 1
    seed: int = 0
    warm_up: int = 6
    steps: int = 20
    time_limit: float = 900.0
    device: str = "auto"
    out: str = ""
    commit: str = ""

    def __post_init__(self) -> None:
        for name, choices in (("variants", VARIANTS), ("kernels", KERNELS)):
            values = getattr(self, name)
            require(len(values) > 0, name, "at least one", [])
            for value in values:
                require_choice(value, name, choices)
            require(len(set(values)) == len(values), name, "each one once", list(values))
        require_positive(self, ("batch_size", "accumulate", "warm_up", "steps"))
        require_whole(self, ("seq_len",))
        require_whole(self, ("seed",), most=SEED)
        divides = self.batch_size % self.accumulate == 0
        require(divides, "accumulate", f"a divisor of batch_size = {self.batch_size}", self.accumulate)
        ok = self.warm_up >= 5 or "inductor_cuda_graph" not in self.variants
        require(
            ok, "warm_up", "at least 5 for inductor_cuda_graph, whose graph is recorded at the fourth", self.warm_up
        )
        require_number(self.time_limit, "time_limit")
        require(0 < self.time_limit < float("inf"), "time_limit", "a positive number of seconds", self.time_limit)
        require_device(self.device, "device")
        require(isinstance(self.out, str), "out", "a path, as text", self.out)
        require(isinstance(self.commit, str), "commit", "text, in quotes if it looks like a number", self.commit)


class ReportPlan(NamedTuple):
    """A report, all of it known to be possible but what only torch can tell. out: its folder, not made yet."""

    config: CompileReportConfig
    preset: str
    model: ModelConfig
    optim: OptimConfig
    out: Path

    @property
    def seq_len(self) -> int:
        """Tokens that a row predicts."""
        return self.config.seq_len or self.model.seq_len

    def pairs(self) -> list[tuple[str, str]]:
        """(variant, kernels) of every row, in the table's order; the older way has "" for kernels."""
        ours = [(v, k) for k in self.config.kernels for v in self.config.variants if v != "older_way"]
        return ours + [("older_way", "")] * ("older_way" in self.config.variants)


def prepare(tree: Mapping[str, Any], root: Path = folders.RUNS) -> ReportPlan:
    """Check a nested mapping (``model``, ``optim``, and the fields of CompileReportConfig); makes nothing.

    Raises ValueError, in one line that begins with the key, for an unknown key, a value of the wrong type or out of
    range, and a folder that holds something.
    """
    own: dict[str, Any] = {}
    for key, value in tree.items():
        if key in SECTIONS:
            continue
        if key not in _names():
            raise ValueError(unknown_key(key))
        if isinstance(getattr(CompileReportConfig, key), tuple):
            require(isinstance(value, list | tuple), key, "a list in brackets, as [a,b]", value)
            value = tuple(value)
        own[key] = value
    config = override(CompileReportConfig(), own)
    given = dict(tree.get("model") or {})
    preset = given.pop("preset", None)
    require(preset in PRESETS, "model.preset", wanted_names(preset), preset)
    base = dataclasses.asdict(PRESETS[preset])
    model, _ = experiments.from_metadata({"model": _over(base, given)})
    # Any model will do beside the optimizer, whose checks do not look at it.
    optim = experiments.from_mapping({"model": {"preset": "mac_tiny"}, "optim": tree.get("optim") or {}}).optim
    out = Path(config.out) if config.out else root / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_compile_{preset}"
    require_folder(out, "out")
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(free, "out", "a folder that is new or empty", str(out))
    return ReportPlan(config, preset, model, optim, out)


def to_mapping(plan: ReportPlan) -> dict[str, Any]:
    """Every setting filled in, as plain mappings and lists: ``prepare`` makes the same plan of it (``out`` apart)."""
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(plan.config).items()}
    sections = experiments.to_mapping(
        dataclasses.replace(
            experiments.from_mapping({"model": {"preset": "mac_tiny"}}),
            preset=plan.preset, model=plan.model, optim=plan.optim,
        )
    )  # fmt: skip
    return {**{name: sections[name] for name in SECTIONS}, **own}


def unknown_key(key: str) -> str:
    """One line on a setting that does not exist: the nearest ones that do, or all.

    >>> unknown_key("variant")
    'variant: no such setting; did you mean variants?'
    """
    if key.partition(".")[0] in SECTIONS:
        return experiments.unknown_key(key)
    near = difflib.get_close_matches(key, [*_names(), *SECTIONS], n=3, cutoff=0.75)
    if near:
        return f"{key}: no such setting; did you mean {' or '.join(near)}?"
    return f"{key}: no such setting; there are {', '.join([*_names(), *(f'{name}.' for name in SECTIONS)])}"


def _over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with what is not null in another put over it, at every depth."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _over(merged[key], value)
        elif value is not None:
            merged[key] = value
    return merged


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(CompileReportConfig)]
