"""Rotary positions (arXiv 2104.09864): the operation of titanfunc.ops.rotary."""

from titanfunc.ops.rotary import Rotary, rotary_table, rotate

__all__ = ["Rotary", "rotary_table", "rotate"]
