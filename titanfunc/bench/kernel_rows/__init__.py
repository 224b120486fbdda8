"""Rows of kernels: each module's ROWS, dicts that titanfunc/bench/kernels.py describes."""
