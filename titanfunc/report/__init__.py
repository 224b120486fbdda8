"""Pictures of a run."""

from titanfunc.report.curves import plot_curves

__all__ = ["plot_curves"]
