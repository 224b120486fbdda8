"""The curves of a run as one picture, from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from titanfunc.report.style import COLOURS, INK, new_figure, style
from titanfunc.train.metrics import read_rows


class Panel(NamedTuple):
    """One plot: its title, the metrics drawn in it with their labels, and its y axis.

    ticks: a format for its numbers. from_zero: it begins at 0. top: where it ends (None: by what is drawn).
    quiet: it is left out where all is 0. by_decades: its axis is logarithmic, where all numbers are above 0.
    """

    title: str
    series: tuple[tuple[str, str], ...]
    ticks: str = "{x:g}"
    from_zero: bool = True
    top: float | None = None
    quiet: bool = False
    by_decades: bool = False


MULTIPLIERS = ("embedding", "attention", "memory", "feed_forward", "norms_and_gates", "head")
PANELS = (
    Panel(
        "Bits per byte",
        (("bits_per_byte", "training"), ("validation_bits_per_byte", "validation")),
        from_zero=False,
    ),
    Panel("Gradient norm, before clipping", (("grad_norm", "gradient norm"),)),
    Panel("Learning rate", (("lr", "learning rate"),)),
    Panel("Memory: inner loss", (("memory/inner_loss", "inner loss"),)),
    Panel(
        "Memory: mean gates",
        (
            ("memory/forget", "forget \N{GREEK SMALL LETTER ALPHA}"),
            ("memory/momentum_decay", "momentum decay \N{GREEK SMALL LETTER ETA}"),
            ("memory/inner_lr", "inner learning rate \N{GREEK SMALL LETTER THETA}"),
        ),
        by_decades=True,
    ),
    Panel(
        "Learned multipliers of the learning rate",
        tuple((f"nested/multiplier_{name}", name.replace("_", " ")) for name in MULTIPLIERS),
    ),
    Panel("Meta-loss", (("nested/meta_loss", "meta-loss"),), from_zero=False),
    Panel("Norm of the momentum", (("nested/momentum_norm", "norm"),)),
    Panel("Skipped steps", (("skipped", "skipped"),), quiet=True),
    Panel("Tokens per second", (("tokens_per_second", "tokens per second"),), "{x:,.0f}"),
)
ANSWERS = (
    Panel("Loss of the answers, nats a token", (("loss", "training"), ("validation_loss", "validation"))),
    Panel(
        "Accuracy of the answers' tokens",
        (("accuracy", "training"), ("validation_accuracy", "validation")),
        "{x:.0%}",
        top=1.0,
    ),
)
"""What takes the place of bits per byte in a run of a recall task."""


def plot_curves(metrics: str | Path, picture: str | Path, title: str = "") -> Path:
    """Draw the curves of a metrics file into a PNG (120 dots an inch, two or three panels a row); returns its path.

    A panel whose metrics the run does not have is left out; values that are not finite leave a gap.
    Raises ValueError if the file holds no metric that is drawn, or is damaged.
    """
    rows = read_rows(metrics)
    recall = any("accuracy" in row or "validation_accuracy" in row for row in rows)
    possible = (*ANSWERS, *PANELS[1:]) if recall else PANELS
    panels = [panel for panel in possible if _has_something(panel, rows)]
    if not panels:
        raise ValueError(f"metrics: wanted rows with {PANELS[0].series[0][0]}, ..., got none in {metrics}")
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(0.3 + 4.3 * columns, 0.6 + 3.2 * lines, title)
    last = max(row["step"] for row in rows)
    for index, panel in enumerate(panels):
        _draw(figure.add_subplot(lines, columns, index + 1), panel, rows, last)
    place = Path(picture)
    figure.savefig(place, format="png")
    return place


def _has_something(panel: Panel, rows: Sequence[dict[str, Any]]) -> bool:
    points = [point for name, _ in panel.series for point in _points(rows, name)]
    return any(value for _, value in points) if panel.quiet else bool(points)


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """``(step, value)`` of every row that has the metric; not finite is nan."""
    return [(row["step"], float("nan") if row[name] is None else row[name]) for row in rows if name in row]


def _draw(axes: Axes, panel: Panel, rows: Sequence[dict[str, Any]], last: int) -> None:
    style(axes, panel.title, "step")
    drawn, lowest, highest = 0, float("inf"), 0.0
    for (name, label), colour in zip(panel.series, COLOURS, strict=False):
        points = _points(rows, name)
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        marker = "o-" if len(points) < 30 else "-"
        axes.plot(steps, values, marker, color=colour, label=label, linewidth=1.6, markersize=3.5, clip_on=False)
        drawn += 1
        finite = [value for value in values if math.isfinite(value)]
        lowest, highest = min([lowest, *finite]), max([highest, *finite])
    axes.yaxis.set_major_formatter(panel.ticks)
    if panel.by_decades and 0 < lowest < float("inf"):
        axes.set_yscale("log")
        bottom = math.floor(math.log10(lowest))
        axes.set_ylim(10.0**bottom, 10.0 ** max(math.ceil(math.log10(highest)), bottom + 1))
        axes.yaxis.set_major_formatter(panel.ticks)
        axes.yaxis.set_minor_locator(NullLocator())
    elif panel.from_zero:
        axes.set_ylim(bottom=0, top=panel.top)
    axes.set_xlim(0, max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if drawn > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
