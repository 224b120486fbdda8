"""Which optimizer trains a model, its schedule and its knobs. Frozen dataclasses, checked when made; no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from titanfunc.config._check import (
    STEPS,
    is_number,
    is_whole,
    require,
    require_choice,
    require_positive,
    require_whole,
)
from titanfunc.config.model import KERNELS, WIDEST

OPTIMIZERS = ("adamw", "muon", "nested", "small_fc_lopt", "velo")
BASES = ("adamw", "muon")
LEARNED = ("small_fc_lopt", "velo")
WITH_KERNELS = ("muon", "small_fc_lopt")
SCHEDULES = ("cosine", "stable")
MODES = ("simple", "explicit", "implicit")
UNROLLS = ("online", "first_order", "exact")
MOST_TERMS = 2**10
"""Layers, or terms of a series, that are written out one after the other in a step's graph."""
MOMENTA = ("none", "l2_regression", "direct_update", "deep_momentum")


@dataclass(frozen=True)
class MuonConfig:
    """Muon's own knobs. adam_ratio: AdamW's learning rate, for what is no hidden matrix, as a share of ``optim.lr``.

    momentum, after a warm-up from ``momentum_start`` over ``momentum_steps`` (0: none). method: of the
    orthogonalisation, "newton_schulz" or "polar_express", in ``steps`` steps. scale: "spectral" or "adam".
    """

    adam_ratio: float = 0.2
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_steps: int = 0
    nesterov: bool = True
    method: str = "newton_schulz"
    steps: int = 5
    scale: str = "spectral"

    def __post_init__(self) -> None:
        place = "optim.muon."
        _above_zero(self, ("adam_ratio",), place)
        for name in ("momentum", "momentum_start"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value < 1, place + name, "a number in [0, 1)", value)
        require_whole(self, ("momentum_steps",), place, STEPS)
        require_positive(self, ("steps",), place, MOST_TERMS)
        require_choice(self.method, place + "method", ("newton_schulz", "polar_express"))
        require_choice(self.scale, place + "scale", ("spectral", "adam"))
        _default_unless(self.momentum_steps > 0, self, ("momentum_start",), place, "momentum_steps")


@dataclass(frozen=True)
class NestedConfig:
    """The nested optimizer's knobs; ``tf.optim.nested`` says what each does. base: one of BASES, with its own knobs."""

    base: str = "muon"
    meta_lr: float = 3e-2
    mode: str = "explicit"
    unroll: str = "online"
    k_unroll: int = 1
    meta_update_freq: int = 1
    meta_start: int = 30
    controller_hidden_dim: int = 32
    controller_num_layers: int = 2
    controller_update_freq: int = 1
    min_lr_mult: float = 0.1
    max_lr_mult: float = 10.0
    relative: bool = True
    normalize: bool = False
    anneal: bool = False
    shrinkage: float = 0.0
    momentum: str = "none"
    momentum_hidden_dim: int = 16
    momentum_num_layers: int = 2
    use_preprocessing: bool = True
    use_cms_updates: bool = False
    cms_frequencies: tuple[int, ...] = (1, 10, 100)
    neumann_terms: int = 8

    def __post_init__(self) -> None:
        place = "optim.nested."
        require_choice(self.base, place + "base", BASES)
        require_choice(self.mode, place + "mode", MODES)
        require_choice(self.unroll, place + "unroll", UNROLLS)
        require_choice(self.momentum, place + "momentum", MOMENTA)
        _zero_or_more(self, ("meta_lr", "shrinkage"), place)
        require_whole(self, ("meta_start",), place, STEPS)
        require_positive(self, ("meta_update_freq", "controller_update_freq"), place, STEPS)
        counts = ("k_unroll", "controller_num_layers", "momentum_num_layers", "neumann_terms")
        require_positive(self, counts, place, MOST_TERMS)
        require_positive(self, ("controller_hidden_dim", "momentum_hidden_dim"), place, WIDEST)
        least, most = self.min_lr_mult, self.max_lr_mult
        require(is_number(least) and 0 < least <= 1, place + "min_lr_mult", "a number in (0, 1]", least)
        require(is_number(most) and most >= 1, place + "max_lr_mult", "a number of at least 1", most)
        periods = list(self.cms_frequencies)
        ok = bool(periods) and all(is_whole(period, 1, STEPS) for period in periods)
        require(ok, place + "cms_frequencies", f"a list of steps from 1 to {STEPS}", periods)
        online = self.mode == "explicit" and self.unroll == "online"
        ok = self.k_unroll == 1 or not online
        require(ok, place + "k_unroll", "1 with unroll=online, which judges each step by the next", self.k_unroll)
        for name in ("relative", "normalize", "anneal", "use_preprocessing", "use_cms_updates"):
            value = getattr(self, name)
            require(isinstance(value, bool), place + name, "true or false", value)
        explicit, networks = self.mode == "explicit", self.momentum not in ("none", "deep_momentum")
        for used, names, without in (
            (explicit, ("unroll", "k_unroll"), "mode=explicit"),
            (online, ("normalize",), "unroll=online"),
            (self.meta_lr > 0, ("anneal",), "meta_lr above 0"),
            (self.mode == "implicit", ("neumann_terms",), "mode=implicit"),
            (self.momentum != "none", ("momentum_hidden_dim",), "a momentum network"),
            (networks, ("momentum_num_layers",), "momentum=l2_regression or direct_update"),
            (self.momentum == "direct_update", ("use_preprocessing",), "momentum=direct_update"),
            (self.use_cms_updates, ("cms_frequencies",), "use_cms_updates"),
        ):
            _default_unless(used, self, names, place, without)

    @property
    def held_out(self) -> int:
        """Batches that a meta-step learns on, every ``meta_update_freq`` steps; 0 where it needs none."""
        if self.meta_lr == 0 or self.mode == "simple" or (self.mode == "explicit" and self.unroll == "online"):
            return 0
        return 2 if self.mode == "implicit" else self.k_unroll


@dataclass(frozen=True)
class LearnedConfig:
    """A learned optimizer's weights. weights: files, published or from scripts/meta_train.py; several make one network,
    as VeLO's two halves do (none: as it is drawn)."""

    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ok = isinstance(self.weights, tuple) and all(isinstance(file, str) and file for file in self.weights)
        require(ok, "optim.learned.weights", "a list of files", self.weights)


@dataclass(frozen=True)
class RoleRates:
    """What the learning rate is multiplied by for each role of a parameter (``titanfunc.models.roles``)."""

    embedding: float = 1.0
    head: float = 1.0
    attention: float = 1.0
    feed_forward: float = 1.0
    memory: float = 1.0
    memory_initial: float = 1.0
    convolution: float = 1.0
    gate: float = 1.0
    persistent: float = 1.0
    norm: float = 1.0

    def __post_init__(self) -> None:
        _zero_or_more(self, [each.name for each in dataclasses.fields(self)], "optim.role_rates.")

    @property
    def changed(self) -> dict[str, float]:
        """The roles whose rate is not 1."""
        return {name: rate for name, rate in dataclasses.asdict(self).items() if rate != 1}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    name: one of OPTIMIZERS. lr: the peak learning rate. betas, eps: decay of AdamW's two moments, and their floor.
    weight_decay: decoupled, a fraction of lr per step. schedule: "cosine", or "stable" (a plain, then a line down over
    the last ``decay_steps``). warmup_steps: steps of linear rise to lr. min_lr_ratio: what is left of lr at the end.
    clip_norm: largest gradient norm (0: no clip). kernels: "reference" (plain torch) or "triton", on a GPU: Muon's
    symmetric products, also as the base of nested, or small_fc_lopt's network, by hand-written kernels; refused for
    the others, which have none. muon, nested, learned: what these optimizers add. role_rates: factors of lr by role.
    """

    name: str = "adamw"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup_steps: int = 30
    decay_steps: int = 100
    min_lr_ratio: float = 0.1
    clip_norm: float = 1.0
    kernels: str = "reference"
    muon: MuonConfig = field(default_factory=MuonConfig)
    nested: NestedConfig = field(default_factory=NestedConfig)
    learned: LearnedConfig = field(default_factory=LearnedConfig)
    role_rates: RoleRates = field(default_factory=RoleRates)

    def __post_init__(self) -> None:
        require_choice(self.name, "optim.name", OPTIMIZERS)
        require(is_number(self.lr) and self.lr > 0, "optim.lr", "a positive number", self.lr)
        pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        ok = pair and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        require(ok, "optim.betas", "two numbers in [0, 1)", self.betas)
        require(is_number(self.eps) and self.eps > 0, "optim.eps", "a positive number", self.eps)
        _zero_or_more(self, ("weight_decay", "clip_norm"), "optim.")
        require_choice(self.schedule, "optim.schedule", SCHEDULES)
        for name in ("warmup_steps", "decay_steps"):
            value = getattr(self, name)
            require(is_whole(value, 0, STEPS), f"optim.{name}", f"from 0 to {STEPS} steps", value)
        moved_by = self.nested.base if self.name == "nested" else self.name
        require_choice(self.kernels, "optim.kernels", KERNELS)
        ok = self.kernels == "reference" or moved_by in WITH_KERNELS
        require(ok, "optim.kernels", f"reference ({self._called} has no kernels)", self.kernels)
        for part, plain, used in (
            ("muon", MuonConfig(), moved_by == "muon"),
            ("nested", NestedConfig(), self.name == "nested"),
            ("learned", LearnedConfig(), self.name in LEARNED),
        ):
            given = {name: value for name, value in vars(getattr(self, part)).items() if value != getattr(plain, name)}
            for name, value in given.items():
                require(used, f"optim.{part}.{name}", f"its default: {self._called} has no use for another", value)
        _default_unless(self.schedule == "stable", self, ("decay_steps",), "optim.", "schedule=stable")
        learned = ("weight_decay", "betas", "eps")
        _default_unless(self.name not in LEARNED, self, learned, "optim.", "AdamW or Muon")
        ok = is_number(self.min_lr_ratio) and 0 <= self.min_lr_ratio <= 1
        require(ok, "optim.min_lr_ratio", "a number in [0, 1]", self.min_lr_ratio)

    @property
    def _called(self) -> str:
        return f"nested over {self.nested.base}" if self.name == "nested" else f"optim.name={self.name}"

    @property
    def second_derivatives(self) -> bool:
        """Whether the optimizer takes the loss's second derivatives."""
        return self.name == "nested" and (self.nested.mode == "implicit" or self.nested.unroll == "exact")

    @property
    def held_out(self) -> int:
        """Batches that the optimizer wants beside a step's own, at some steps."""
        return self.nested.held_out if self.name == "nested" else 0


def _default_unless(used: bool, owner: Any, names: tuple[str, ...], place: str, without: str) -> None:
    """Refuse values that would do nothing."""
    defaults = {each.name: each.default for each in dataclasses.fields(owner)}
    for name in () if used else names:
        value = getattr(owner, name)
        require(value == defaults[name], place + name, f"its default: without {without} it does nothing", value)


def _above_zero(owner: object, names: tuple[str, ...], place: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(is_number(value) and value > 0, place + name, "a positive number", value)


def _zero_or_more(owner: object, names: tuple[str, ...] | list[str], place: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(is_number(value) and value >= 0, place + name, "0 or a positive number", value)
