"""Attention: blocks of the forward, of the kernel that holds queries and of the one that holds keys.

Letters: B batch, H heads, T tokens, D head size, W window, S tokens of a segment, P prefix.
"""

from __future__ import annotations

from functools import partial

import torch
from titanfunc_kernels import attention, attention_backward

from tuning.case import Calls, Case, draw, like


def _make(b: int, h: int, t: int, w: int, segment: int, d: int, p: int, device: torch.device) -> Calls:
    """A window of W (segment 0), or segments with a context (W 0)."""
    rows, held, fixed = (b, h, t, d), (b, h, w + t, d), (b, h, p, d)
    q, plain, keys, values, prefix_k, prefix_v, *context = draw(
        device, rows, rows, held, held, fixed, fixed, *[held] * (2 if segment else 0), dtype=torch.bfloat16
    )
    if segment:
        of_keys = (tuple(context), (prefix_k, prefix_v), None, None)
    else:
        of_keys = (None, (prefix_k, prefix_v), plain, (w + torch.arange(t, device=device)).expand(b, t).contiguous())
    (dy,) = like([q])
    return Calls(
        lambda: attention.forward(q, keys, values, *of_keys, segment),
        lambda made: attention_backward.backward(q, keys, values, *of_keys, segment, *made, dy),
    )


def case(b: int, h: int, t: int, w: int, segment: int, d: int, p: int, candidates=()) -> Case:
    """One shape."""
    what = f"segments S {segment} with context" if segment else f"window W {w}"
    return Case(f"{what} B {b} H {h} T {t} D {d} P {p}", partial(_make, b, h, t, w, segment, d, p), candidates)


def _blocks(table: str, queries: int, keys: int, warps: int, stages: int, registers: int | None = None):
    fields = {"queries": queries, "keys": keys, "warps": warps, "stages": stages, "registers": registers}
    return {f"{table}.(16, 64)": fields}


_FORWARD, _QUERIES, _KEYS = "attention.FORWARD", "attention_backward.BY_QUERIES", "attention_backward.BY_KEYS"
_CANDIDATES = [
    _blocks(_KEYS, 64, 64, 4, 3),
    _blocks(_FORWARD, 128, 64, 8, 4, 128),
    _blocks(_QUERIES, 128, 64, 8, 2, 128),
    _blocks(_KEYS, 32, 128, 8, 3),
    _blocks(_FORWARD, 128, 128, 8, 2),
    _blocks(_QUERIES, 64, 64, 4, 3),
    _blocks(_KEYS, 128, 64, 8, 2),
    _blocks(_FORWARD, 64, 64, 4, 3, 128),
    _blocks(_QUERIES, 128, 64, 8, 3),
    _blocks(_KEYS, 64, 128, 8, 2),
    _blocks(_FORWARD, 128, 64, 4, 3),
    _blocks(_QUERIES, 128, 32, 8, 4, 128),
    _blocks(_KEYS, 128, 128, 8, 2),
    _blocks(_FORWARD, 128, 64, 8, 2, 128),
    _blocks(_QUERIES, 64, 128, 4, 2),
    _blocks(_KEYS, 64, 64, 4, 2, 128),
    _blocks(_FORWARD, 64, 128, 4, 3),
    _blocks(_FORWARD, 128, 32, 8, 4, 128),
    _blocks(_KEYS, 64, 64, 8, 3),
    {"attention_backward.STRETCH": 256},
    {"attention_backward.STRETCH": 1024},
]
CASES = [case(16, 16, 1024, 0, 512, 64, 16, _CANDIDATES), case(16, 16, 1024, 512, 0, 64, 16, _CANDIDATES)]
