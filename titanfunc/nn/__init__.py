"""Small pieces of a network as pure functions: parameters first, then the input."""

from titanfunc.nn.conv import convolve, extend, extend_at, init_taps, tail_at
from titanfunc.nn.linear import feed_forward, init_feed_forward, init_linear, linear
from titanfunc.nn.norm import l2_norm, rms_norm
from titanfunc.nn.rotary import Rotary, rotary_table, rotate

__all__ = [
    "Rotary", "convolve", "extend", "extend_at", "feed_forward", "init_feed_forward", "init_linear", "init_taps",
    "l2_norm", "linear", "rms_norm", "rotary_table", "rotate", "tail_at",
]  # fmt: skip
