"""Runs that come out the same, bit for bit, each time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import deterministic


@contextlib.contextmanager
def same_each_time(device: torch.device, wanted: bool) -> Iterator[None]:
    """While entered, sums are added in one order wherever torch can: always on a CPU, on a GPU if that is ``wanted``.

    The gradient of an embedding is what a compiled step would else add atomically, in the order in which threads come.
    On a GPU an operation that knows no order warns; that of attention costs time.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = deterministic  # mypy sees no properties of modules
    fills = memory.fill_uninitialized_memory
    if not wanted and device.type != "cpu":
        yield
        return
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is taken
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills
