"""A quicker start: no garbage collection while modules are imported, and none of what is there by then."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python's collector rests inside, and never looks at what is there at the end.

    torch and its compiler are some 650,000 objects, which stay. The collector would walk over them again and again,
    while they grow in number and then while a step is traced. Reference counts free what they free; a cycle that was
    dropped inside stays, so what takes much memory should not be in one. A collector that rests already goes on to.
    """
    worked = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if worked:
            gc.enable()
