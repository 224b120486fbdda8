"""Pictures of an evaluation: recall by length and depth, families compared, loss by position.

They are drawn from the rows of recall.jsonl and loss_by_position.jsonl, one mapping each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba

from titanfunc.report.style import COLOURS, INK, MUTED, doubling_axis, new_figure, style

Rows = Sequence[Mapping[str, Any]]
MARKERS = ("o", "s", "^", "D")
"""Of the first runs, as many as there are colours, then of the next."""
SHADES = LinearSegmentedColormap.from_list("recall", ["#f3f6fc", "#93b4f5", COLOURS[0], "#17357f"])
MEMORY_TITLES = {"on": "memory on", "off": "memory off", "none": "no memory"}


def level_name(row: Mapping[str, Any]) -> str:
    """What a row's task varies besides the length: "depth", "pairs", or "" for nothing."""
    return next((name for name in ("depth", "pairs") if name in row), "")


def plot_heat_map(rows: Rows, picture: str | Path, title: str = "") -> Path:
    """Accuracy of one task and one run as a map, length to the right and depth (or pairs) downwards, into a PNG.

    Memory on and off stand side by side. Raises ValueError if there is no row, or if they have no depth or pairs.
    """
    level = level_name(rows[0]) if rows else ""
    if not level:
        raise ValueError("rows: wanted some with a depth or pairs, got none")
    lengths, levels = (sorted({row[name] for row in rows}) for name in ("length", level))
    states = list(dict.fromkeys(row["memory"] for row in rows))
    width = max(2.2, 0.85 * len(lengths))
    figure = new_figure((width + 1.0) * len(states) + 1.2, 1.7 + 0.45 * len(levels), title)
    image = None
    for number, state in enumerate(states):
        cells = {(row[level], row["length"]): row["accuracy"] for row in rows if row["memory"] == state}
        values = np.array([[cells.get((one, length), np.nan) for length in lengths] for one in levels])
        axes = figure.add_subplot(1, len(states), number + 1)
        image = axes.imshow(values, cmap=SHADES, vmin=0, vmax=1, aspect="auto")
        _label_cells(axes, values)
        style(axes, MEMORY_TITLES[state], "length of the row, tokens", _level_label(level) if number == 0 else "")
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(levels)), [f"{one:.0%}" if level == "depth" else f"{one:g}" for one in levels])
    assert image is not None
    bar = figure.colorbar(image, ax=figure.axes, format="{x:.0%}", fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=9, length=0)
    bar.set_label("answers right", fontsize=9, color=MUTED)
    figure.savefig(picture, format="png")
    return Path(picture)


def plot_lengths(rows: Rows, picture: str | Path, title: str = "") -> Path:
    """Accuracy of one task by length, the mean over depths (or pairs), a line a run and memory state, into a PNG.

    A run keeps its colour (with another marker, where there are more runs than colours); with its memory off the line
    is dashed. Raises ValueError if there is no row.
    """
    if not rows:
        raise ValueError("rows: wanted at least 1, got none")
    lengths = sorted({row["length"] for row in rows})
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure = new_figure(6.4, 4.0 + 0.22 * len(_lines(rows)), title)
    axes = figure.add_subplot(1, 1, 1)
    for run, state in _lines(rows):
        mine = [row for row in rows if (row["run"], row["memory"]) == (run, state)]
        values = [_mean([row["accuracy"] for row in mine if row["length"] == length]) for length in lengths]
        _line(axes, lengths, values, runs.index(run), state, _line_label(run, state, len(runs)))
    style(axes, "Answers right, mean over " + _over(rows[0]), "length of the row, tokens")
    doubling_axis(axes, lengths)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(picture, format="png")
    return Path(picture)


def plot_positions(rows: Rows, picture: str | Path, title: str = "") -> Path:
    """Loss by position, a panel for each kind of row, a line a run and memory state, into a PNG.

    Raises ValueError if there is no row.
    """
    if not rows:
        raise ValueError("rows: wanted at least 1, got none")
    kinds = list(dict.fromkeys(row["of"] for row in rows))
    runs = list(dict.fromkeys(row["run"] for row in rows))
    columns = 2 if len(kinds) in (2, 4) else min(3, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = new_figure(0.8 + 4.6 * columns, 0.9 + 3.1 * lines + 0.22 * len(_lines(rows)), title)
    for number, kind in enumerate(kinds):
        axes = figure.add_subplot(lines, columns, number + 1)
        of_kind = [row for row in rows if row["of"] == kind]
        for run, state in _lines(of_kind):
            mine = [row for row in of_kind if (row["run"], row["memory"]) == (run, state)]
            middle = [(row["first"] * row["last"]) ** 0.5 for row in mine]
            _line(
                axes,
                middle,
                [row["loss"] for row in mine],
                runs.index(run),
                state,
                # One legend for all panels, which hold the same lines.
                _line_label(run, state, len(runs)) if number == 0 else "_nolegend_",
            )
        name = "Held-out text" if kind == "text" else f"Answers of {kind}"
        name += "" if of_kind[0]["trained"] else " (not trained on)"
        style(
            axes, f"{name}, {of_kind[0]['length']:,} tokens a row", "position in the row, tokens", "loss, nats a token"
        )
        octaves = of_kind[0]["length"].bit_length()
        doubling_axis(axes, [2**power for power in range(octaves)])
        axes.set_xlim(0.9, 1.1 * of_kind[0]["length"])
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(picture, format="png")
    return Path(picture)


def label_colour(value: float) -> tuple[float, ...]:
    """The colour of a number, from 0 to 1, on its cell: red, green, blue, opacity."""
    return to_rgba("white" if value > 0.55 else INK)


def _lines(rows: Rows) -> list[tuple[str, str]]:
    """Every (run, memory state), in order."""
    return list(dict.fromkeys((row["run"], row["memory"]) for row in rows))


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], run: int, state: str, label: str) -> None:
    dashes = "--" if state == "off" else "-"
    again, place = divmod(run, len(COLOURS))
    marker, size = MARKERS[again % len(MARKERS)], 3.5 + again
    axes.plot(
        x, y, dashes, marker=marker, color=COLOURS[place], label=label, linewidth=1.6, markersize=size, clip_on=False,
        zorder=3,
    )  # fmt: skip


def _line_label(run: str, state: str, runs: int) -> str:
    return MEMORY_TITLES[state] if runs == 1 else f"{run}, {MEMORY_TITLES[state]}"


def _label_cells(axes: Axes, values: Any) -> None:
    for (line, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = label_colour(value)
            axes.text(column, line, f"{value:.0%}", ha="center", va="center", fontsize=9, color=colour)


def _level_label(level: str) -> str:
    return "depth of the evidence" if level == "depth" else "key-value pairs"


def _over(row: Mapping[str, Any]) -> str:
    return {"depth": "depths", "pairs": "numbers of pairs", "": "rows"}[level_name(row)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
