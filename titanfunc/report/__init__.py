"""Pictures of a run and of an evaluation."""

from titanfunc.report.curves import plot_curves
from titanfunc.report.recall import plot_heat_map, plot_lengths, plot_positions

__all__ = ["plot_curves", "plot_heat_map", "plot_lengths", "plot_positions"]
