"""How a training step compiles, variant beside variant, each in a process of its own. For scripts/compile_report.py.

Importing it brings no torch, and neither do ``process`` and ``checkout``, which the benchmarks share.
"""
