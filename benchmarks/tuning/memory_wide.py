"""Wide memories: tiles of the update, of the products and of the pull through the state. Letters: tuning/memories.py.

Half as many tokens as titanfunc/bench/kernel_rows/memory.py has: a chunk costs the same.
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
_UPDATE_ROWS = "memory_wide.UPDATE_ROWS"


def _rows(most: int):
    return {"memory_wide.ROWS": most, "memory_wide.token_block.most": most}


_EITHER = [
    {_UPDATE: {"maxnreg": 168}},
    {_UPDATE_ROWS: 64},
    {_UPDATE: {"BN": 32, "maxnreg": 96}},
    {_HIDDEN: {"num_stages": 8}},
    {_HIDDEN: {"num_warps": 8}},
    {_OUTPUT: {"num_stages": 8}},
    {_FINISH: {"BT": 2}},
]
_SHORT = [
    {_STATE: {"maxnreg": 128}},
    {_STATE: {"maxnreg": 255, "num_stages": 4}},
    {_KEY: {"num_stages": 8}},
]
_LONGER = [
    {_LONG: {"maxnreg": 168}},
    _rows(128) | {_HIDDEN: {"BN": 128, "num_warps": 8, "num_stages": 3}},
    {_UPDATE_ROWS: 64, _STAGES: 2},
]

CASES = [
    case(4, 16, 64, 512, 2048, [*_EITHER, *_SHORT]),
    case(4, 8, 256, 512, 2048, [*_LONGER, *_EITHER]),
]
