"""A comparison told: a summary of each optimizer's runs, as a table and as a picture.

They are made from the rows of runs.jsonl, one mapping a run.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from titanfunc.report.style import COLOURS, INK, new_figure, style

LABELS = {
    "bits_per_byte": "Validation, bits per byte",
    "accuracy": "Validation accuracy of the answers' tokens",
    "loss": "Validation loss, nats a token",
}
COLUMNS = {
    "optimizer": "optimizer",
    "lr": "peak lr",
    "seeds": "seeds",
    "loss": "loss, nats",
    "bits_per_byte": "bits/byte",
    "accuracy": "accuracy",
    "seconds_per_step": "s/step",
    "peak_memory_gib": "GiB",
    "skipped": "skipped",
}
EDGE = "\\* The least or the greatest of the rates tried: a better one may lie beyond."
Row = Mapping[str, Any]


def summarize(name: str, rows: Sequence[Row], tuning: Sequence[Row] = ()) -> dict[str, Any]:
    """What an optimizer's runs come to: means, deviations and ranges over seeds, as one flat mapping.

    rows: a run a seed, at one learning rate. tuning: a run a rate that was tried, or none. Of each final number there
    are ``_mean``, ``_sd`` (n - 1; None for one seed), ``_min`` and ``_max``, over the runs that have not diverged;
    ``seeds`` counts all and ``diverged`` those. seconds_per_step: the median of the runs' medians. skipped: steps, the
    sum. at_edge: the best rate is the least or the greatest tried, so that a better one may lie beyond.
    Raises ValueError if there is no row.
    """
    if not rows:
        raise ValueError(f"rows: wanted at least one run of {name}, got none")
    best = rows[0]["lr"]
    rates = sorted(row["lr"] for row in tuning)
    summary = {
        "optimizer": name,
        "lr": best,
        "lrs": rates or [best],
        "tuning_loss": {f"{row['lr']:g}": row["loss"] for row in tuning},
        "at_edge": len(rates) > 1 and best in (rates[0], rates[-1]),
        "seeds": len(rows),
        "diverged": sum(row["diverged"] for row in rows),
    }
    for metric in (metric for metric in LABELS if metric in rows[0]):
        values = [row[metric] for row in rows if row[metric] is not None and not row["diverged"]]
        summary[f"{metric}_mean"] = statistics.fmean(values) if values else None
        summary[f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        summary[f"{metric}_min"] = min(values, default=None)
        summary[f"{metric}_max"] = max(values, default=None)
    seconds = [row["seconds_per_step"] for row in rows if row["seconds_per_step"] is not None]
    memory = [row["peak_memory_gib"] for row in rows if row["peak_memory_gib"] is not None]
    summary["seconds_per_step"] = statistics.median(seconds) if seconds else None
    summary["peak_memory_gib"] = max(memory, default=None)
    summary["skipped"] = sum(row["skipped"] for row in rows)
    return summary


def as_table(summaries: Sequence[Row]) -> Table:
    """A line an optimizer, for a terminal; the least loss in bold."""
    table = Table()
    columns = _columns(summaries)
    for column in columns:
        table.add_column(COLUMNS[column], justify="left" if column == "optimizer" else "right", overflow="fold")
    best = min((row["loss_mean"] for row in summaries if row["loss_mean"] is not None), default=None)
    for row in summaries:
        bold = best is not None and row["loss_mean"] == best
        cells = (_cell(row, column).replace(" (", "\n(") for column in columns)
        table.add_row(*cells, style="bold" if bold else "")
    return table


def as_markdown(summaries: Sequence[Row]) -> str:
    """The same table in Markdown, with a note on rates that are marked with a star."""
    columns = _columns(summaries)
    lines = [[COLUMNS[column] for column in columns], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[_cell(row, column) for column in columns] for row in summaries]
    note = f"\n{EDGE}\n" if any(row["at_edge"] for row in summaries) else ""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + note


def _columns(summaries: Sequence[Row]) -> list[str]:
    """Those with anything in them."""
    return [
        column
        for column in COLUMNS
        if any(row.get(column) is not None or row.get(f"{column}_mean") is not None for row in summaries)
        or column in ("loss", "seconds_per_step")
    ]


def _cell(row: Row, column: str) -> str:
    if column == "lr":
        return f"{row['lr']:g}" + ("*" if row["at_edge"] else "")
    if column == "seeds":
        return f"{row['seeds']}" + (f" ({row['diverged']} diverged)" if row["diverged"] else "")
    if column in LABELS:
        return _spread(row, column)
    value = row[column]
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _spread(row: Row, metric: str) -> str:
    """Mean, deviation, and the range over seeds."""
    mean, deviation = row[f"{metric}_mean"], row[f"{metric}_sd"]
    if mean is None:
        return "-"
    form = "{:.1%}" if metric == "accuracy" else "{:.4f}"
    if deviation is None:
        return form.format(mean)
    low, high = form.format(row[f"{metric}_min"]), form.format(row[f"{metric}_max"])
    return f"{form.format(mean)} ± {form.format(deviation)} ({low} to {high})"


def plot_comparison(rows: Sequence[Row], picture: str | Path, title: str = "") -> Path:
    """Draw the mean curve of each optimizer over its seeds, with a band from the least to the greatest, into a PNG.

    rows: ``{"optimizer": name, "curve": [{"step": ..., "loss": ..., "bits_per_byte": ...}, ...]}``, one a run; where
    a value is not finite or a run has ended, the others go on. The first tenth of the steps does not stretch the axis.
    Raises ValueError if there is no point to draw.
    """
    points = [point for row in rows for point in row["curve"]]
    if not points:
        raise ValueError("rows: wanted runs with a validation curve, got none")
    metric = next(name for name in LABELS if name in points[0])
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    last = max(point["step"] for point in points)
    figure = new_figure(7.2, 4.4 + 0.22 * len(names), title)
    axes = figure.add_subplot(1, 1, 1)
    style(axes, LABELS[metric], "step")
    for number, name in enumerate(names):
        mine = [row for row in rows if row["optimizer"] == name]
        label = f"{name} (mean of {len(mine)} seeds)" if len(mine) > 1 else name
        _draw(axes, *band(mine, metric), number, label)
    late = [point for point in points if point["step"] >= last / 10]
    _limit(axes, [point[metric] for point in late if point[metric] is not None], metric)
    axes.set_xlim(0, max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(picture, format="png")
    return Path(picture)


def band(rows: Sequence[Row], metric: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, and at each the mean, the least and the greatest value over runs; nan where no run has a finite one."""
    found: dict[int, list[float]] = {}
    for row in rows:
        for point in row["curve"]:
            values = found.setdefault(point["step"], [])
            if point[metric] is not None:
                values.append(point[metric])
    steps, nothing = sorted(found), [float("nan")]
    columns = [found[step] or nothing for step in steps]
    return steps, [float(np.mean(column)) for column in columns], [min(c) for c in columns], [max(c) for c in columns]


def _draw(
    axes: Axes, steps: list[int], mean: list[float], least: list[float], most: list[float], number: int, label: str
) -> None:
    colour, dashes = COLOURS[number % len(COLOURS)], ("-", "--", ":")[number // len(COLOURS) % 3]
    axes.fill_between(steps, least, most, color=colour, alpha=0.15, linewidth=0)
    marker = "o" if len(steps) < 30 else ""
    axes.plot(steps, mean, dashes, marker=marker, color=colour, label=label, linewidth=1.6, markersize=3.5)


def _limit(axes: Axes, values: Sequence[float], metric: str) -> None:
    """The y axis around these values, those of the accuracy from 0 to 1."""
    if metric == "accuracy":
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter("{x:.0%}")
    elif values:
        margin = 0.05 * (max(values) - min(values)) or 0.1
        axes.set_ylim(min(values) - margin, max(values) + margin)
