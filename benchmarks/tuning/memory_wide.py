"""Wide memories: tiles of the update, of the products and of the pull through the state. Letters: tuning/memories.py.

Half as many tokens as benchmarks/kernel_rows/memory.py has: a chunk costs the same.
"""

from __future__ import annotations

from functools import partial

from titanfunc_kernels import memory_wide, memory_wide_backward

from tuning.case import Case
from tuning.memories import calls


def case(m: int, n: int, c: int, d: int, f: int, candidates=()) -> Case:
    """One shape."""
    make = partial(calls, memory_wide.forward, memory_wide_backward.backward, (m, n, c, d, f), 0.5, False)
    return Case(f"M {m} N {n} C {c} D {d} {f'F {f}' if f else 'one matrix'}", make, candidates)


_UPDATE, _STAGES = "memory_wide.UPDATE.bfloat16", "memory_wide.update_stages"
_HIDDEN, _OUTPUT, _FINISH = "memory_wide.HIDDEN", "memory_wide.OUTPUT", "memory_wide.FINISH"
_STATE, _LONG = "memory_wide_backward.STATE", "memory_wide_backward.STATE_LONG"
_KEY = "memory_wide_backward.KEY"


def _rows(most: int):
    return {"memory_wide.ROWS": most, "memory_wide.token_block.most": most}


_EITHER = [
    {"memory_small_common.OVERLAP": False},
    {_UPDATE: {"num_warps": 8, "maxnreg": 128}},
    {_UPDATE: {"num_warps": 8}},
    {_UPDATE: {"BN": 128, "num_warps": 8}},
    {_UPDATE: {"BM": 32, "BN": 128}},
    {_UPDATE: {"BM": 32}},
    {_OUTPUT: {"BN": 64}},
    {_OUTPUT: {"BK": 64, "num_stages": 5}},
    {_OUTPUT: {"BK": 256, "num_stages": 3}},
    {"memory_wide.OUTPUT_ROWS": 64},
    {_HIDDEN: {"BN": 128}},
    {_HIDDEN: {"BK": 128, "num_stages": 3}},
    {_HIDDEN: {"BN": 32}},
    {_FINISH: {"BT": 2}},
    {_FINISH: {"BT": 8, "num_warps": 8}},
    {_FINISH: {"BN": 512}},
    {_KEY: {"BN": 128, "num_warps": 8}},
    {_KEY: {"BK": 128, "num_stages": 3}},
]
_SHORT = [
    {_STATE: {"maxnreg": 255}},
    {_STATE: {"maxnreg": 255, "num_warps": 8}},
    {_STATE: {"num_stages": 2}},
    {_STATE: {"BN": 32}},
    {_STATE: {"BK": 128, "num_stages": 2}},
]
_LONGER = [
    {_LONG: {"maxnreg": 255}},
    {_LONG: {"BC": 64, "num_warps": 4, "maxnreg": 168}},
    {_LONG: {"BC": 64, "BN": 128}},
    {_LONG: {"BN": 128, "maxnreg": 255}},
    {_LONG: {"num_stages": 2}},
]

CASES = [
    case(4, 16, 64, 512, 2048, [*_SHORT, *_EITHER, _rows(32)]),
    case(4, 8, 256, 512, 2048, [_rows(128), {_STAGES: 1}, {_STAGES: 3}, *_LONGER, *_EITHER, _rows(128) | {_STAGES: 1}]),
]
