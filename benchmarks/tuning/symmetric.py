"""Symmetric products: the large tile and the order of tiles. Letters: L matrices, M rows, K columns."""

from __future__ import annotations

from functools import partial

import torch
from titanfunc_kernels import symmetric

from tuning.case import Calls, Case, draw


def _make(shape: tuple[int, int, int], polynomial: bool, device: torch.device) -> Calls:
    (x,) = draw(device, shape, dtype=torch.bfloat16)
    x *= shape[-1] ** -0.5
    if not polynomial:
        return Calls(lambda: symmetric.symmetric(x))
    x = (x @ x.mT).contiguous()
    return Calls(lambda: symmetric.symmetric(x, 2.0315, -4.775))


def case(shape: tuple[int, int, int], candidates=(), polynomial: bool = False) -> Case:
    """X X^T of X [L, M, K]; or the polynomial of such a matrix."""
    what = "square_polynomial" if polynomial else "gram"
    return Case(f"{what} {'x'.join(map(str, shape))}", partial(_make, shape, polynomial), candidates)


def _large(*blocks: int | None):
    """Tile's side, columns a step, warps, stages, registers a thread."""
    return {"symmetric.LARGE.bfloat16": blocks}


_CANDIDATES = [
    _large(128, 64, 8, 4, None), _large(128, 64, 8, 3, None), _large(128, 64, 4, 3, None), _large(128, 64, 4, 4, None),
    _large(128, 128, 8, 2, None), _large(128, 32, 8, 5, 128), _large(256, 64, 8, 3, None), _large(128, 64, 8, 2, 128),
    {"symmetric.GROUP": 4}, {"symmetric.GROUP": 16}, _large(64, 64, 4, 4, None),
]  # fmt: skip
CASES = [
    case((24, 1024, 1024), _CANDIDATES),
    case((4, 4096, 11008), _CANDIDATES),
    case((24, 1024, 1024), _CANDIDATES[:4], polynomial=True),
]
