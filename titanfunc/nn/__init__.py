"""Small pieces of a network as pure functions: parameters first, then the input."""

from titanfunc.nn.cms import cms, init_cms
from titanfunc.nn.conv import convolve, extend, extend_at, init_taps, of_document, tail_at
from titanfunc.nn.linear import Product, feed_forward, init_feed_forward, init_linear, linear, linear_each
from titanfunc.nn.moe import Balance, init_moe, moe
from titanfunc.nn.norm import l2_norm, rms_norm
from titanfunc.nn.rotary import Rotary, rotary_table, rotate
from titanfunc.nn.window import WindowCache, empty_cache, window_attention

__all__ = [
    "Balance", "Product", "Rotary", "WindowCache", "cms", "convolve", "empty_cache", "extend", "extend_at",
    "feed_forward", "init_cms", "init_feed_forward", "init_linear", "init_moe", "init_taps", "l2_norm", "linear",
    "linear_each", "moe", "of_document", "rms_norm", "rotary_table", "rotate", "tail_at", "window_attention",
]  # fmt: skip
