"""RMSNorm: tiles and warps of the forward; those, the programs and the pipeline of the backward. N rows, D features."""

from __future__ import annotations

from functools import partial

import torch
from titanfunc_kernels import norm

from tuning.case import Calls, Case, draw, like

EPS = 1e-6


def _make(n: int, d: int, device: torch.device) -> Calls:
    (scale,) = draw(device, (1, d))
    (x,) = draw(device, (1, n, d), seed=1, dtype=torch.bfloat16)
    (dy,) = like([x])
    return Calls(
        lambda: norm.rms_norm_forward(scale, x, EPS), lambda made: norm.rms_norm_backward(scale, x, made[1], dy)
    )  # fmt: skip


def case(n: int, d: int, candidates=()) -> Case:
    """One group of rows."""
    return Case(f"rms_norm N {n} D {d}", partial(_make, n, d), candidates)


def _backward(tile: int | None = None, per_warp: int | None = None, programs: int | None = None, stages=None):
    found = {
        "TILE": tile, "ELEMENTS_PER_WARP": per_warp, "PROGRAMS_PER_MULTIPROCESSOR": programs, "STAGES": stages,
    }  # fmt: skip
    return {f"norm.BACKWARD_{name}": value for name, value in found.items() if value is not None}


def _forward(tile: int, per_warp: int):
    return {"norm.FORWARD_TILE": tile, "norm.FORWARD_ELEMENTS_PER_WARP": per_warp}


_CANDIDATES = [
    _backward(programs=4),
    _backward(stages=1, programs=4),
    _backward(per_warp=256),
    _backward(tile=8192),
    _backward(tile=8192, per_warp=1024),
    _backward(per_warp=1024, programs=4),
    _forward(4096, 512),
    _forward(8192, 1024),
    _backward(stages=3),
    _backward(tile=2048, programs=4),
    _backward(programs=1),
    _backward(programs=8, stages=1),
    _forward(2048, 512),
    _forward(8192, 512),
    _forward(4096, 256),
    _backward(tile=16384, per_warp=1024, programs=1),
]
CASES = [case(32768, 4096, _CANDIDATES), case(16384, 1024, _CANDIDATES)]
