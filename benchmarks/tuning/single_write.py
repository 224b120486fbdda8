"""The single write: its tiles. Letters: N rows, D features, F hidden features."""

from __future__ import annotations

from functools import partial

import torch
from titanfunc_kernels import single_write

from tuning.case import Calls, Case, Settings, draw


def _make(n: int, d: int, f: int, device: torch.device) -> Calls:
    shapes = [(1, d, f), (1, f, d)]
    weights = [w * w.shape[1] ** -0.5 for w in draw(device, *shapes)]
    momentum = draw(device, *shapes, seed=1)
    k, v = draw(device, (1, n, d), (1, n, d), seed=2, dtype=torch.bfloat16)
    # Called through the module, where a setting may have put another default.
    return Calls(
        lambda: single_write.single_write(weights, momentum, k, v, [0.1, 0.9, 0.1], max_grad_norm=0.01)
    )  # fmt: skip


def case(n: int, d: int, f: int, candidates=()) -> Case:
    """One memory of two layers, clipped."""
    return Case(f"N {n} D {d} F {f}", partial(_make, n, d, f), candidates)


def _some(**fields: int | bool) -> Settings:
    """Candidates of the tiles between few and many."""
    return {"single_write.BLOCKS.bfloat16": fields}


def _many(**fields: int | bool) -> Settings:
    return {"single_write.MANY": fields}


def _few(**fields: int | bool) -> Settings:
    return {"single_write.FEW": fields}


_SOME = [
    _some(together=False, early=True, stages=3),
    _some(together=False, early=True),
    _some(ahead=True),
    _some(together=False, early=True, stages=3, ahead=True),
    _some(stages=3),
    _some(columns=128, ahead=True),
    _some(together=False),
    _some(fill=64),
    _some(gradient_columns=64),
    _some(inner=128, stages=3),
    _some(gradient_inner=128, stages=3),
    _some(elements=1024),
]
_MANY = [
    _many(early=True),
    _many(columns=128, stages=3),
    _many(stages=3, early=True),
    _many(warps=16),
    _many(columns=128, gradient_columns=128, early=True),
    _many(fill=256),
    _many(together=True),
    _many(gradient_rows=256, gradient_columns=128),
]
_FEW = [
    _few(together=False, early=True),
    _few(columns=64),
    _few(warps=8),
    _few(inner=64, stages=4),
    _few(ahead=True),
    _few(together=False, early=True, ahead=True),
    _few(elements=1024),
]
CASES = [case(2048, 512, 512, _SOME), case(8192, 512, 2048, _MANY), case(256, 512, 512, _FEW)]
