"""A comparison of optimizers under one budget: runs, table and picture. What scripts/compare.py calls.

An optimizer's step is built and compiled once: its runs differ in their weights and in the scale of the learning rate,
which are tensors of the state. A rate of ``lrs`` takes the place of ``optim.lr``, so that what is a share of that, as
AdamW's rate beside Muon, is scaled along.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import signal
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console

from titanfunc.config.compare import SETTINGS, Entry, Plan, to_mapping
from titanfunc.data import Source, open_source
from titanfunc.data.ahead import make_ahead
from titanfunc.device import require_kernels_run, require_optimizer_runs, resolve_backend, resolve_device
from titanfunc.job import batches_of, make_step, validation
from titanfunc.models import Model
from titanfunc.optim import GradientTransformation, current_learning_rate
from titanfunc.optim.transforms import scale_learning_rate
from titanfunc.report.comparison import as_markdown, as_table, plot_comparison, summarize
from titanfunc.train import TrainState, TrainStep, init_state
from titanfunc.train.display import Display
from titanfunc.train.loop import Diverged, train
from titanfunc.train.metrics import MetricsFile, read_rows

RUNS, SUMMARY, TABLE, CURVES = "runs.jsonl", "summary.jsonl", "table.md", "curves.png"
Row = dict[str, Any]


class Setup(NamedTuple):
    """What every run shares. backend: of torch.compile, or None. source: the batches, the same for all."""

    plan: Plan
    device: torch.device
    backend: str | None
    source: Source


class Trainer(NamedTuple):
    """What the runs of one optimizer share: its step is compiled once."""

    model: Model
    tx: GradientTransformation
    step: TrainStep
    evaluate: Callable[[Any], dict[str, float]]


class Stopped(RuntimeError):
    """A signal asked to stop in the midst of a run, which is not kept."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(f"stopped by {by.name}")
        self.by = by


def assemble(plan: Plan) -> Setup:
    """Read the corpus, find the device and see that each optimizer can be built; nothing is written.

    Raises ValueError, in one line, for a device that is not there, a corpus too small for its windows, what an
    optimizer refuses, such as a file of weights, or a damaged list of runs in the folder.
    """
    if (plan.out / RUNS).is_file():
        read_rows(plan.out / RUNS)
    config = plan.budget.train
    device = resolve_device(config.device)
    require_kernels_run(plan.budget.model, device)
    backend = resolve_backend(config.compile, device)
    for entry in plan.entries:  # the last one's turn may come hours later
        try:
            require_optimizer_runs(entry.optim, device)
            make_step(plan.experiment(entry), backend)
        except ValueError as error:
            raise ValueError(f"entries: {entry.name}: {error}") from None
    return Setup(plan, device, backend, open_source(plan.budget.data, config.eval_batches))


def run(setup: Setup, console: Console | None = None) -> int:
    """Make every run that the folder does not hold yet, then write the table and the picture there.

    Returns the exit status: 0, or 128 + the signal that stopped it; a run that it stopped is made anew the next time.
    """
    plan, console = setup.plan, console or Console()
    plan.out.mkdir(parents=True, exist_ok=True)
    (plan.out / SETTINGS).write_text(yaml.safe_dump(to_mapping(plan), sort_keys=False), encoding="utf-8")
    book = _Book(plan.out / RUNS, plan.budget.train.steps)
    _announce(setup, book, console)
    summaries, reported = [], []
    try:
        for entry in plan.entries:
            tuning, rows = _runs_of(setup, entry, book, console)
            summaries.append(summarize(entry.name, rows, tuning))
            reported += rows
    except Stopped as error:
        _say(console, f"{error}; finished runs are kept: go on with out={plan.out}")
        return 128 + error.by
    finally:
        book.close()
    title = _title(plan)
    (plan.out / SUMMARY).write_text("".join(json.dumps(row) + "\n" for row in summaries), encoding="utf-8")
    (plan.out / TABLE).write_text(f"{title}. {_budget(setup)}.\n\n{as_markdown(summaries)}", encoding="utf-8")
    plot_comparison(reported, plan.out / CURVES, title)
    console.print(f"\n{title}", style="bold", markup=False, highlight=False)
    console.print(as_table(summaries))
    for entry in (entry for entry in plan.entries if entry.optim.held_out):
        _say(console, f"{entry.name}: learned on {entry.optim.held_out} more batches at some steps than the others saw")
    for row in (row for row in summaries if row["at_edge"]):
        _say(console, f"{row['optimizer']}: the best rate, {row['lr']:g}, is at the edge of those tried; widen lrs")
    _say(console, f"written  {', '.join((RUNS, SUMMARY, TABLE, CURVES))} in {plan.out}")
    return 0


def best_rate(rows: list[Row]) -> float:
    """The learning rate of the tuning run with the least final loss; the least rate, if none has a finite one."""
    return min(rows, key=lambda row: (math.inf if row["loss"] is None else row["loss"], row["lr"]))["lr"]


class _Book:
    """The finished runs of a folder, on the disk as soon as they are there."""

    def __init__(self, path: Path, steps: int) -> None:
        self._file = MetricsFile(path, resume_step=steps + 1)  # drops a last line cut short, and no row
        self.rows = {_key(row): row for row in read_rows(path)}

    def add(self, row: Row) -> None:
        self.rows[_key(row)] = row
        self._file.write(row["step"], row)

    def close(self) -> None:
        self._file.close()


def _key(row: Mapping[str, Any]) -> tuple[str, float, int]:
    return row["optimizer"], row["lr"], row["seed"]


class _Record:
    """A writer that keeps what a comparison tells of a run. memory: of a GPU alone, which counts it run by run."""

    def __init__(self, tokens: int, on_gpu: bool) -> None:
        self.curve: list[Row] = []
        self.skipped, self.memory = 0, None if not on_gpu else 0.0
        self._tokens, self._seconds = tokens, list[float]()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        found = {name.removeprefix("validation_"): _finite(value) for name, value in values.items()}
        if "validation_loss" in values:
            self.curve.append({"step": step, **{name: found[name] for name in found if name != "perplexity"}})
        if "tokens_per_second" in values:
            self._seconds.append(self._tokens / values["tokens_per_second"])
        if "skipped" in values:
            self.skipped = int(values["skipped"])
        if self.memory is not None and "peak_memory_gib" in values:
            self.memory = max(self.memory, values["peak_memory_gib"])

    def close(self) -> None:
        pass

    @property
    def seconds_per_step(self) -> float | None:
        """The median over logging intervals, without the first after compiling, in which a GPU warms up."""
        steady = self._seconds[1:] or self._seconds
        return statistics.median(steady) if steady else None


def _runs_of(setup: Setup, entry: Entry, book: _Book, console: Console) -> tuple[list[Row], list[Row]]:
    """The rows of an optimizer's tuning and of its reported runs, from the book or made now."""
    config = setup.plan.config
    trainers: list[Trainer] = []  # none, as long as everything is in the book

    def get(lr: float, seed: int, purpose: str) -> Row:
        if (entry.name, lr, seed) not in book.rows:
            if not trainers:
                trainers.append(_make_trainer(setup, entry))
            row = _train(setup, entry, trainers[0], lr, seed, console)
            book.add(row)
            _say(console, f"{purpose:<9}{entry.name}: lr {lr:g}, seed {seed}: {_told(row)}")
        return book.rows[entry.name, lr, seed]

    tuning = [get(lr, config.tune_seed, "tuning") for lr in entry.lrs] if setup.plan.tunes else []
    best = best_rate(tuning) if tuning else entry.lrs[0]
    rows = [get(best, seed, "run") for seed in config.seeds]
    trainers.clear()
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    return tuning, rows


def _make_trainer(setup: Setup, entry: Entry) -> Trainer:
    model, tx, step = make_step(setup.plan.experiment(entry), setup.backend)
    return Trainer(model, tx, step, validation(model, setup.source))


def _begin(setup: Setup, entry: Entry, trainer: Trainer, lr: float, seed: int) -> TrainState:
    """A fresh state whose learning rate peaks at ``lr``, for a step that was built for ``entry.optim.lr``."""
    state = init_state(trainer.model, trainer.tx, seed, setup.device)
    if current_learning_rate(state.opt_state) is None:
        raise RuntimeError(f"{entry.name}: its state holds no learning rate to set")
    return state._replace(opt_state=scale_learning_rate(state.opt_state, lr / entry.optim.lr))


def _train(setup: Setup, entry: Entry, trainer: Trainer, lr: float, seed: int, console: Console) -> Row:
    """One run, as a row of runs.jsonl."""
    experiment, source = setup.plan.experiment(entry), setup.source
    data, config = experiment.data, dataclasses.replace(experiment.train, seed=seed)
    # A seed's batches, the same for every optimizer, though a dataset may move on the hub; validation is that of all.
    commit = source.corpus.identity.commit if source.corpus else ""
    batches = open_source(dataclasses.replace(data, seed=data.seed + seed), config.eval_batches, commit=commit)
    on_gpu = setup.device.type == "cuda"
    record = _Record(data.batch_size * data.seq_len, on_gpu)
    shown = console if console.is_terminal else Console(quiet=True, force_terminal=False)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(setup.device)
    diverged, steps = False, config.steps
    try:
        _, outcome = train(
            trainer.step,
            _begin(setup, entry, trainer, lr, seed),
            make_ahead(batches_of(batches, experiment), config.steps, data.workers),
            config,
            save=lambda *_: None,
            evaluate=trainer.evaluate,
            writers=[record],
            display=Display(config.steps, 0, shown),
            bytes_per_token=source.bytes_per_token,
        )
        if outcome.stopped_by is not None:
            raise Stopped(outcome.stopped_by)
        final: Mapping[str, Any] = record.curve[-1]
    except Diverged:
        diverged, final = True, dict.fromkeys(("loss", *_extra(source)))
    numbers = {name: value for name, value in final.items() if name != "step"}
    return {
        "step": steps,
        "optimizer": entry.name,
        "lr": lr,
        "seed": seed,
        **numbers,
        "diverged": diverged or numbers["loss"] is None,
        "skipped": record.skipped,
        "seconds_per_step": record.seconds_per_step,
        "peak_memory_gib": record.memory,
        "curve": record.curve,
    }


def _extra(source: Source) -> tuple[str, ...]:
    """What a validation tells beside the loss."""
    return ("accuracy",) if source.task else ("bits_per_byte",)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _told(row: Row) -> str:
    if row["diverged"]:
        return f"diverged; steps skipped: {row['skipped']}"
    seconds = f", {row['seconds_per_step']:.3g} s/step" if row["seconds_per_step"] else ""
    return f"loss {row['loss']:.4f}{seconds}"


def _announce(setup: Setup, book: _Book, console: Console) -> None:
    plan = setup.plan
    tried = len(plan.entries[0].lrs) if plan.tunes else 0
    total = len(plan.entries) * (tried + len(plan.config.seeds))
    seeds = {plan.config.tune_seed, *plan.config.seeds}
    kept = sum((each.name, lr, seed) in book.rows for each in plan.entries for lr in each.lrs for seed in seeds)
    _say(console, f"compare  {', '.join(entry.name for entry in plan.entries)}")
    _say(console, f"budget   {_budget(setup)}")
    _say(console, f"data     {setup.source.summary}")
    _say(console, f"device   {setup.device}, " + (f"compiled by {setup.backend}" if setup.backend else "uncompiled"))
    _say(console, f"runs     {total} in {plan.out}" + (f"; {kept} are there already and are kept" if kept else ""))


def _title(plan: Plan) -> str:
    count = len(plan.config.seeds)
    of = f"{count} seeds" if count > 1 else "1 seed"
    return f"{plan.budget.preset}: {len(plan.entries)} optimizers, {plan.budget.train.steps} steps, {of}"


def _budget(setup: Setup) -> str:
    plan = setup.plan
    data, tried = plan.budget.data, len(plan.entries[0].lrs)
    tuned = (
        f"best of {tried} learning rates each, chosen on seed {plan.config.tune_seed}"
        if plan.tunes
        else ("learning rates as given")
    )
    return f"{plan.budget.train.steps} steps of {data.batch_size} rows of {data.seq_len} tokens; {tuned}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
