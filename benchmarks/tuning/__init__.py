"""Kernels whose constants benchmarks/tune_kernels.py sweeps: a module each, with its cases and candidates."""
