"""SiLU times gate: elements and warps of a program. N rows, F features."""

from __future__ import annotations

from functools import partial

import torch
from titanfunc_kernels import gate

from tuning.case import Calls, Case, draw, like


def _make(n: int, f: int, device: torch.device) -> Calls:
    a, b = draw(device, (n, f), (n, f), dtype=torch.bfloat16)
    (dy,) = like([a])
    return Calls(lambda: gate.silu_gate_forward(a, b), lambda _: gate.silu_gate_backward(a, b, dy))


def case(n: int, f: int, candidates=()) -> Case:
    """One shape."""
    return Case(f"silu_gate N {n} F {f}", partial(_make, n, f), candidates)


def _block(elements: int, warps: int = 4):
    return {"gate.BLOCK": elements, "gate.WARPS": warps}


_CANDIDATES = [_block(2048), _block(512), _block(2048, 8), _block(4096, 8), _block(512, 2)]
CASES = [case(32768, 4096, _CANDIDATES), case(16384, 1024, _CANDIDATES)]
