"""How the programs of a launch, and the launches of a chain, wait for each other."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

OVERLAP = True  # launches of one chain


def overlaps(tensor: Tensor) -> dict[str, bool]:
    """Launch options with which a kernel may start while the one before it still runs (Hopper): it then has to call
    ``overlap`` before it touches what that one made."""
    if not OVERLAP or not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@triton.jit
def overlap(OVERLAP: tl.constexpr):
    """Waits for the launch before, all of it; then lets the next one start."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def meet(counter, arrivals):
    """Waits until ``counter`` has seen so many arrivals, this program's among them.

    What any thread of an arrived program stored before is then there to load past the first-level cache: the barrier
    before orders the program's threads before the one that releases, that after behind the one that acquires.
    """
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()
