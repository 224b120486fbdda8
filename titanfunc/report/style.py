"""How every picture looks: colours, figures and axes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626")


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty white figure of some inches, 120 dots each, its title at the top left."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(width, height), dpi=120, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure


def style(axes: Axes, title: str, x: str, y: str = "") -> None:
    """The title and the axes' names, thin grey lines behind what is drawn, and no frame but the x axis."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, fontsize=9, color=MUTED)
    if y:
        axes.set_ylabel(y, fontsize=9, color=MUTED)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def doubling_axis(axes: Axes, ticks: Sequence[int]) -> None:
    """An x axis on which doubling is one step, with these numbers on it (every n-th, where they are many)."""
    shown = list(ticks)[:: -(-len(ticks) // 8)]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:,}" for tick in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
