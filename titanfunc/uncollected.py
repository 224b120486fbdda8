"""A quicker start: no garbage collection while modules are imported, and none of modules afterwards."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python's collector rests inside, and never looks at what is there at the end.

    torch and its compiler are about a million objects, nearly all of which stay. Walking over them, again and again
    while they grow in number and then while a step is traced, took a tenth of the time to a first step whose programs
    lay on disk. Reference counts free what they free. A collector that rests already goes on to.
    """
    worked = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if worked:
            gc.enable()
