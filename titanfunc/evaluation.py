"""An evaluation of trained runs: recall by length and depth, and loss by position. What scripts/evaluate.py calls."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.config.evaluate import Plan, Subject
from titanfunc.config.recall import LEVELS, TESTS, WITHOUT_TEXT
from titanfunc.data import Corpus, load, validation_batches
from titanfunc.data.recall import RecallTask, Stream, make_task
from titanfunc.device import require_kernels_run, resolve_backend, resolve_device
from titanfunc.evals import Reader, Reading, by_position, make_reader, score
from titanfunc.models import build
from titanfunc.report import plot_heat_map, plot_lengths, plot_positions
from titanfunc.train import checkpoint

RECALL, POSITIONS, CURVES = "recall.jsonl", "loss_by_position.jsonl", "loss_by_position.png"
Row = dict[str, Any]


class Tests(NamedTuple):
    """What every run reads. tasks: by name. text: rows of held-out text [N, L + 1], or None."""

    plan: Plan
    device: torch.device
    backend: str | None
    tasks: dict[str, RecallTask]
    text: Tensor | None


def assemble(plan: Plan) -> Tests:
    """Read the held-out text and lay out the tasks; nothing is written.

    Raises ValueError, in one line, for a device or a text that is not there.
    """
    config = plan.config
    device = resolve_device(config.device, "device")
    for subject in plan.subjects:
        require_kernels_run(subject.model, device, "kernels")
    plain = config.compile == "auto" and device.type == "cpu"  # a few rows a shape do not repay compiling there
    backend = None if plain else resolve_backend(config.compile, device)
    corpus = load(dataclasses.replace(plan.data, task="")) if plan.reads_text else None
    held_out = corpus.validation if corpus else None
    tasks = {
        name: make_task(name, plan.data, None if TESTS[name] in WITHOUT_TEXT else held_out, Stream.TEST)
        for name in plan.tasks
    }
    return Tests(plan, device, backend, tasks, _text_rows(plan, corpus))


def run(tests: Tests, console: Console | None = None) -> None:
    """Take every test with every run, print a table a task, and write rows and pictures into the plan's folder."""
    plan, console = tests.plan, console or Console()
    plan.out.mkdir(parents=True, exist_ok=True)
    for name in (RECALL, POSITIONS, CURVES, *map(picture_name, TESTS)):
        (plan.out / name).unlink(missing_ok=True)  # of an earlier evaluation in this folder
    console.print(f"device   {tests.device}, " + (f"compiled by {tests.backend}" if tests.backend else "uncompiled"))
    recall: list[Row] = []
    positions: list[Row] = []
    for subject in plan.subjects:
        params = _load(subject, tests.device)
        console.print(f"run      {subject.name}: {tree.size(params):,} parameters, {subject.step} steps", markup=False)
        for memory in memory_states(subject, plan.config.memory):
            began = time.perf_counter()
            found = _take(tests, subject, params, memory, console)
            _append(plan.out / RECALL, found[0])
            _append(plan.out / POSITIONS, found[1])
            recall += found[0]
            positions += found[1]
            console.print(f"         memory {memory}: {time.perf_counter() - began:.1f} s")
    one = len(plan.subjects) == 1
    for name in plan.tasks:
        of_task = [row for row in recall if row["task"] == name]
        by = "length in tokens" + (f" and {LEVELS[TESTS[name]]}" if LEVELS[TESTS[name]] and one else "")
        title = f"\n{name}: answers right as a whole, by {by} ({plan.config.samples} rows each)"
        console.print(title, style="bold", markup=False, highlight=False)
        console.print(_by_level(name, of_task) if one else _by_run(of_task))
    written = [RECALL, POSITIONS, *_draw(plan, recall, positions)]
    console.print(f"\nwritten  {', '.join(written)} in {plan.out}", markup=False, soft_wrap=True)


def picture_name(task: str) -> str:
    """The file of a task's picture."""
    return f"recall_{task}.png"


def memory_states(subject: Subject, wanted: str) -> tuple[str, ...]:
    """The memory states that a run is tested in; "none" alone for a model that has no memory to switch off."""
    if not subject.model.memory_at:
        return ("none",)
    return ("on", "off") if wanted == "both" else (wanted,)


def _text_rows(plan: Plan, corpus: Corpus | None) -> Tensor | None:
    """Rows [N, L + 1] of held-out text at the greatest length that they hold, spread over it; documents joined."""
    if corpus is None or not plan.text_rows:
        return None
    tokens = len(corpus.validation.tokens)
    length = min(max(plan.lengths), tokens - 1)
    count = min(plan.text_rows, tokens // length)
    return validation_batches(corpus.validation, length, count, 1, separate_documents=False)[0]


def _load(subject: Subject, device: torch.device) -> Any:
    model = build(subject.model)
    checkpoint.require_params(subject.checkpoint, lambda: model.init(rng.generator(0)))
    params = tree.map(lambda leaf: leaf.to(device), model.init(rng.generator(0)))
    return checkpoint.load_params(subject.checkpoint, params, verify=False)  # prepare() has read it all


def _take(tests: Tests, subject: Subject, params: Any, memory: str, console: Console) -> tuple[list[Row], list[Row]]:
    """Rows of recall and of losses by position, of one run in one memory state."""
    plan, config = tests.plan, tests.plan.config
    reader = make_reader(
        build(subject.model),
        write=memory != "off",
        piece=config.piece,
        rows=config.batch_size,
        backend=tests.backend,
    )
    about = {"run": subject.name, "step": subject.step, "memory": memory}
    recall, positions = [], []
    if tests.text is not None:
        with console.status(f"{subject.name}: reading text, memory {memory}"):
            loss = reader(params, tests.text).loss
        positions += _positions(loss, None, {**about, "of": "text", "trained": plan.trained_on_text})
    for name, task in tests.tasks.items():
        for length in plan.lengths:
            with console.status(f"{subject.name}: {name} at {length:,} tokens, memory {memory}"):
                rows, loss, weights = _test(reader, params, task, name, length, plan)
            recall += [{**about, **row} for row in rows]
        # Of the last length, usually the greatest; by the answers alone, as all else in a row may be anything.
        positions += _positions(loss, weights, {**about, "of": name, "trained": True})
    return recall, positions


def _test(
    reader: Reader, params: Any, task: RecallTask, name: str, length: int, plan: Plan
) -> tuple[list[Row], Tensor, Tensor]:
    """A row of recall for every level of a task at a length; losses and weights [N, L] of all that was read."""
    level_name, levels, samples = LEVELS[TESTS[name]], plan.levels(name), plan.config.samples
    drawn = [task.examples(length, level, samples, plan.config.seed) for level in levels]
    weights = torch.cat([weights for _, weights in drawn])
    reading = reader(params, torch.cat([tokens for tokens, _ in drawn]))  # all levels share the reader's batches
    rows, start = [], 0
    for level, (_, of_level) in zip(levels, drawn, strict=True):
        at = slice(start, start := start + len(of_level))
        found = score(Reading(reading.loss[at], reading.right[at]), of_level)
        about = {level_name: level} if level_name else {}
        row = {"task": name, "length": length, **about, "count": found.answers, "accuracy": found.accuracy}
        rows.append({**row, "token_accuracy": found.token_accuracy, "loss": found.loss, "rows": len(of_level)})
    return rows, reading.loss, weights


def _positions(loss: Tensor, weights: Tensor | None, about: Mapping[str, Any]) -> list[Row]:
    return [{**about, "length": loss.shape[1], **bucket._asdict()} for bucket in by_position(loss, weights)]


def _append(path: Path, rows: Sequence[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _by_level(name: str, rows: Sequence[Row]) -> Table:
    """One run: a line a length and memory state, a column a depth (or number of pairs), and the mean."""
    level = LEVELS[TESTS[name]]
    levels = list(dict.fromkeys(row[level] for row in rows)) if level else []
    table = Table()
    table.add_column("length", justify="right")
    table.add_column("memory")
    for each in levels:
        table.add_column(f"{each:.0%}" if level == "depth" else f"{each:g}", justify="right")
    table.add_column("mean", justify="right", style="bold")
    by_length = sorted(rows, key=lambda row: row["length"])  # memory on and off next to each other
    for length, memory in dict.fromkeys((row["length"], row["memory"]) for row in by_length):
        mine = [row["accuracy"] for row in rows if (row["length"], row["memory"]) == (length, memory)]
        cells = mine if level else []
        table.add_row(f"{length:,}", memory, *_percent([*cells, sum(mine) / len(mine)]))
    return table


def _by_run(rows: Sequence[Row]) -> Table:
    """Several runs: a line a run and memory state, a column a length; the mean over depths (or pairs)."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    table = Table()
    table.add_column("run", overflow="fold")
    table.add_column("memory")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for run, memory in _lines(rows):
        mine = [row for row in rows if (row["run"], row["memory"]) == (run, memory)]
        by_length = [[row["accuracy"] for row in mine if row["length"] == length] for length in lengths]
        table.add_row(run, memory, *_percent([sum(each) / len(each) for each in by_length]))
    return table


def _percent(values: Sequence[float]) -> Iterator[str]:
    return (f"{value:.1%}" for value in values)


def _draw(plan: Plan, recall: Sequence[Row], positions: Sequence[Row]) -> list[str]:
    """The pictures; returns their names."""
    written = []
    one = plan.subjects[0] if len(plan.subjects) == 1 else None
    of = f"{one.name} after {one.step} steps" if one else f"{len(plan.subjects)} runs"
    for name in plan.tasks:
        of_task = [row for row in recall if row["task"] == name]
        picture = plan.out / picture_name(name)
        title = f"{name}: {of}"
        if one and LEVELS[TESTS[name]]:
            plot_heat_map(of_task, picture, title)
        else:
            plot_lengths(of_task, picture, title)
        written.append(picture.name)
    spread = [row for row in positions if sum(row["of"] == other["of"] for other in positions) > len(_lines(positions))]
    if spread:  # the answers of most tasks all stand at the end: a point, and no curve
        plot_positions(spread, plan.out / CURVES, f"Loss by position: {of}")
        written.append(CURVES)
    return written


def _lines(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Every run and memory state, in order."""
    return list(dict.fromkeys((row["run"], row["memory"]) for row in rows))
