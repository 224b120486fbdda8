"""Small memories: how one is cut up into programs, blocks and warps; and what the parts of a chunk cost.

The cases without candidates are there for their differences: half the chunks, no clip, no second-order terms, other
chunk sizes. Letters: tuning/memories.py.
"""

from __future__ import annotations

from functools import partial

from titanfunc_kernels import memory_small, memory_small_backward

from tuning.case import Case, Settings
from tuning.memories import calls


def cut(programs: int, width: int, warps: int) -> Settings:
    """So many programs a memory, hidden features a block and warps."""
    return {"memory_small_common.blocks_of": {"programs": programs, "width": width, "warps": warps}}


def case(m: int, n: int, c: int, d: int, f: int, candidates=(), clip=0.5, first_order=False) -> Case:
    """The shape, with what is out of the ordinary about it."""
    odd = f"{' no clip' * (not clip)}{' first order' * first_order}"
    make = partial(
        calls, memory_small.forward, memory_small_backward.backward, (m, n, c, d, f), clip, first_order
    )  # fmt: skip
    return Case(f"M {m} N {n} C {c} D {d} {f'F {f}' if f else 'one matrix'}{odd}", make, candidates)


# Not here: 2 warps beside 64 hidden features, whose tiles do not fit the registers and keep the compiler for minutes; 4
# warps beside 32 of them, which Triton 3.6 compiles into wrong addresses; and blocks narrower than a head shared by
# several programs, on which it breaks off.
_WIDE = [
    cut(4, 64, 8),
    cut(2, 64, 8),
    cut(1, 64, 8),
    cut(4, 64, 4),
    {"memory_small_backward.WARPS_AT_ONCE": 8},
    {"memory_small_backward.STAGES": 1},
    {"memory_small_backward.STAGES": 3},
    {"order.OVERLAP": False},
]
_ONE = [cut(1, 64, 4), cut(1, 32, 8), cut(1, 16, 4)]

CASES = [
    case(32, 32, 64, 64, 256, _WIDE),
    case(96, 16, 64, 64, 256, _WIDE),
    case(64, 16, 64, 64, 128, _WIDE[1:4]),
    case(32, 32, 64, 64, 0, _ONE),
    case(32, 16, 64, 64, 256),
    case(32, 32, 64, 64, 256, first_order=True),
    case(32, 32, 64, 64, 256, clip=0.0),
    *(case(32, 2048 // c, c, 64, 256) for c in (16, 32, 128)),
]
