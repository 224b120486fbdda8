"""Which implementation of an operation runs: the plain-torch reference, or a Triton kernel behind the same signature.

The choice is an argument, ``kernels``, handed down from the model's configuration; nothing is chosen behind the
caller's back, and what a kernel does not take it refuses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

_TABLE: dict[str, dict[str, Callable[..., Any]]] = {}


def implements(operation: str, kernels: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters the decorated function into the table as what ``kernels`` means for ``operation``."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        _TABLE.setdefault(operation, {})[kernels] = function
        return function

    return enter


def implementation(operation: str, kernels: str) -> Callable[..., Any]:
    """The function behind ``operation``; ValueError if there is none of that name."""
    rows = _TABLE[operation]
    if kernels not in rows:
        raise ValueError(f"kernels: wanted one of {', '.join(sorted(rows))} for {operation}, got {kernels!r}")
    return rows[kernels]


def table() -> dict[str, tuple[str, ...]]:
    """Every operation of the modules imported so far, and the kernels it may be asked for."""
    return {operation: tuple(sorted(rows)) for operation, rows in sorted(_TABLE.items())}


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU: TRITON_INTERPRET=1, which must be set before it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse_unless(ok: bool, operation: str, argument: str, wanted: str, got: object) -> None:
    """Raises ValueError, saying what the kernel wants of ``argument``, unless ``ok``."""
    if not ok:
        raise ValueError(
            f"{operation}: {argument}: wanted {wanted} with kernels=triton, got {got} (kernels=reference takes it)"
        )


def check_device(operation: str, **arguments: Tensor | Iterable[Tensor]) -> None:
    """Raises ValueError unless every tensor, of any shape, is where a kernel can run: one CUDA device, or a CPU that
    interprets it."""
    first: Tensor | None = None
    for name, given in arguments.items():
        for tensor in [given] if isinstance(given, Tensor) else given:
            ok = tensor.is_cuda or (tensor.device.type == "cpu" and interpreted())
            refuse_unless(ok, operation, name, "a CUDA tensor", f"one on {tensor.device}")
            first = tensor if first is None else first
            there, device = first.device, tensor.device
            refuse_unless(there == device, operation, name, f"a tensor on {there}, with the others", f"one on {device}")
