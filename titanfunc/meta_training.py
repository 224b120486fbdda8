"""A meta-training from its settings to its files. What scripts/meta_train.py calls."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.config.meta import METRICS, PICTURE, SETTINGS, WEIGHTS, MetaConfig, MetaPlan
from titanfunc.device import resolve_backend, resolve_device
from titanfunc.fullgraph import compile_function
from titanfunc.optim.adamw import adamw
from titanfunc.optim.base import GradientTransformation
from titanfunc.optim.learned import (
    init_small_fc_lopt,
    init_velo_mlp,
    load_weights,
    save_weights,
    small_fc_lopt,
    velo_mlp,
)
from titanfunc.optim.learned.meta_training import Make, curves, init_meta, loss_left, make_meta_step
from titanfunc.optim.learned.network import Network
from titanfunc.optim.learned.tasks import TASKS
from titanfunc.optim.schedules import warmup_cosine
from titanfunc.report.style import COLOURS, INK, new_figure, style
from titanfunc.train.metrics import MetricsFile, read_rows

ADAM_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""What the learned optimizer is held against: Adam at the best of these for each family."""
SEEDS = 1 << 20
"""Tasks that a seed of a run may draw before they are another's."""
KINDS: dict[str, tuple[Callable[..., Network], Callable[..., GradientTransformation]]] = {
    "small_fc_lopt": (init_small_fc_lopt, small_fc_lopt),
    "velo_mlp": (init_velo_mlp, velo_mlp),
}
"""How each optimizer begins and is made, by the names of ``config.meta.OPTIMIZERS``."""


class Parts(NamedTuple):
    """All that a meta-training needs. network: where it starts, on the device. backend: of torch.compile."""

    plan: MetaPlan
    device: torch.device
    backend: str | None
    make: Make
    network: Network


def assemble(plan: MetaPlan) -> Parts:
    """Find the device, draw or read the weights, and make the plan's folder.

    Raises ValueError, in one line, for a device that is not there, for weights of another optimizer or that cannot be
    read, and for a folder that cannot be made.
    """
    config = plan.config
    device = resolve_device(config.device, "device")
    plain = config.compile == "auto" and device.type == "cpu"  # an unrolled step takes minutes to compile there
    backend = None if plain else resolve_backend(config.compile, device)
    init, kind = KINDS[config.optimizer]
    options = {"step_mult": config.step_mult} if config.step_mult else {}
    make = functools.partial(kind, **options)
    try:
        network = load_weights(config.start) if config.start else init(rng.generator(config.seed))
    except ValueError as error:
        raise ValueError(f"start: {error}") from None
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: wanted a folder that can be made, got {str(plan.out)!r} ({error.strerror})") from None
    try:
        make(network)
    except ValueError as error:
        raise ValueError(f"start: {config.start} is of no {config.optimizer} ({error})") from None
    return Parts(plan, device, backend, make, tree.map(lambda weight: weight.to(device), network))


def run(parts: Parts, console: Console | None = None) -> Network:
    """Meta-train, print a table, and write weights, metrics and a picture into the plan's folder; returns the network
    (leaves of its start's shapes).
    """
    (config, out), console = parts.plan, console or Console()
    (out / SETTINGS).write_text(yaml.safe_dump(_plain(config), sort_keys=False), encoding="utf-8")
    tasks = {name: TASKS[name] for name in config.tasks}
    console.print(
        f"device   {parts.device}, " + (f"compiled by {parts.backend}" if parts.backend else "uncompiled") + "\n"
        f"weights  {tree.size(parts.network):,} of {config.optimizer}",
        markup=False,
    )
    optimizer = adamw(
        warmup_cosine(config.lr, min(10, config.steps - 1), config.steps, 0.1 * config.lr), weight_decay=0
    )
    step = make_meta_step(parts.make, optimizer, tasks, config.unroll, config.horizon, config.clip_norm)
    compiled = compile_function(step, parts.backend)
    seeds = config.seed * SEEDS + torch.arange(config.tasks_at_once, device=parts.device)
    state = init_meta(parts.make, parts.network, optimizer, tasks, seeds, config.horizon)
    metrics = MetricsFile(out / METRICS)
    with console.status("Adam on the held-out tasks"):
        adam = {name: _best_adam(parts, name) for name in tasks}
    before = _look(parts, state.network)
    metrics.write(0, before | {f"{name}/adam": left for name, (left, _) in adam.items()})
    after, began = before, time.perf_counter()
    with console.status("meta-training") as status:
        for number in range(1, config.steps + 1):
            state, values = compiled(state)
            row = {name: value.item() for name, value in values.items()}
            if number == config.steps or (config.eval_every and number % config.eval_every == 0):
                after = _look(parts, state.network)
                row |= after
                save_weights(state.network, out / WEIGHTS)
            metrics.write(number, row)
            status.update(f"meta-step {number} of {config.steps}: {_mean(row, 'objective'):.2f}")
    metrics.close()
    _draw(out, config, {name: left for name, (left, _) in adam.items()})
    console.print(f"         {config.steps} meta-steps in {time.perf_counter() - began:.1f} s")
    console.print(_table(config, before, after, adam))
    console.print(f"written  {WEIGHTS}, {METRICS}, {PICTURE}, {SETTINGS} in {out}", markup=False, soft_wrap=True)
    return state.network


def _held_out(parts: Parts) -> Tensor:
    """Seeds below zero, which no training has."""
    return -1 - torch.arange(parts.plan.config.held_out, device=parts.device)


def _look(parts: Parts, network: Network) -> dict[str, float]:
    """What is left of the held-out tasks' losses."""
    config = parts.plan.config
    return {
        f"{name}/held_out": loss_left(
            curves(parts.make, network, TASKS[name], _held_out(parts), config.horizon, parts.backend)
        )
        for name in config.tasks
    }


def _best_adam(parts: Parts, name: str) -> tuple[float, float]:
    """(what is left of the held-out tasks' losses, the rate) of Adam at its best rate."""

    def left(rate: float) -> float:
        steps = parts.plan.config.horizon
        plain = adamw(rate, weight_decay=0)
        return loss_left(curves(lambda _: plain, {}, TASKS[name], _held_out(parts), steps, parts.backend))

    return min((left(rate), rate) for rate in ADAM_RATES)


def _mean(row: Mapping[str, float], what: str) -> float:
    values = [value for name, value in row.items() if name.endswith(f"/{what}")]
    return sum(values) / len(values)


def _plain(config: MetaConfig) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}


def _table(
    config: MetaConfig, before: Mapping[str, float], after: Mapping[str, float], adam: Mapping[str, tuple[float, float]]
) -> Table:
    """A line a family: what is left of held-out tasks' losses after the horizon."""
    table = Table(title=f"Loss left after {config.horizon} steps, {config.held_out} held-out tasks a family")
    table.add_column("tasks")
    for name in ("untrained", "learned", "Adam", "at its best rate"):
        table.add_column(name, justify="right")
    for name in config.tasks:
        left, rate = adam[name]
        key = f"{name}/held_out"
        table.add_row(name, f"{before[key]:.2%}", f"{after[key]:.2%}", f"{left:.2%}", f"{rate:g}")
    return table


def _draw(out: Path, config: MetaConfig, adam: Mapping[str, float]) -> None:
    """The objective by meta-step, and what is left of held-out losses beside Adam's."""
    rows = read_rows(out / METRICS)
    figure = new_figure(9, 3.8, f"{config.optimizer}: {config.steps} meta-steps")
    training, held_out = (figure.add_subplot(1, 2, number) for number in (1, 2))
    style(training, f"Meta-loss: log of the loss left, {config.unroll} steps", "meta-step")
    style(held_out, f"Held-out tasks: loss left after {config.horizon} steps", "meta-step")
    for name, colour in zip(config.tasks, COLOURS, strict=False):
        for axes, key, marker in ((training, f"{name}/objective", "-"), (held_out, f"{name}/held_out", "o-")):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, marker, color=colour, label=name, linewidth=1.6, markersize=3.5)
        held_out.axhline(adam[name], color=colour, linewidth=1.2, linestyle="--")
    held_out.plot([], [], "--", color=INK, linewidth=1.2, label="Adam at its best rate")
    held_out.set_yscale("log")
    held_out.legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(out / PICTURE, format="png")
