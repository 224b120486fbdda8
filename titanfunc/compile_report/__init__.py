"""How a training step compiles, variant beside variant, each in a process of its own. For scripts/compile_report.py."""

from titanfunc.compile_report.report import Setup, assemble, run

__all__ = ["Setup", "assemble", "run"]
