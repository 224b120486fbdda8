"""SiLU times gate: elements a program takes at once, warps, programs. N rows, F features."""

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


def _blocks(forward: int, backward: int, warps: int = 4, programs: int = 32):
    return {
        "gate.FORWARD_BLOCK": forward,
        "gate.BACKWARD_BLOCK": backward,
        "gate.WARPS": warps,
        "gate.PROGRAMS_PER_MULTIPROCESSOR": programs,
    }


# A million programs a multiprocessor: a program for each block.
_CANDIDATES = [
    _blocks(1024, 2048), _blocks(1024, 1024, programs=10**6), _blocks(2048, 2048, programs=10**6),
    _blocks(2048, 1024, programs=16), _blocks(4096, 2048, 8), _blocks(2048, 1024, 8), _blocks(1024, 512),
    _blocks(4096, 4096, 8, programs=10**6), _blocks(4096, 4096, 8),
]  # fmt: skip
CASES = [case(32768, 4096, _CANDIDATES), case(16384, 1024, _CANDIDATES)]
