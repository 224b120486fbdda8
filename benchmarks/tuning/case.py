"""What a kernel's module of this package gives: a list CASES of shapes, each with its calls and candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Settings = dict[str, Any]  # see tuning/settings.py


class Calls(NamedTuple):
    """Raw launches on inputs drawn beforehand. backward takes what forward returned; None: there is none."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None


class Case(NamedTuple):
    """A shape in words; make(device) draws its inputs; candidates are in order of promise."""

    shape: str
    make: Callable[[torch.device], Calls]
    candidates: Sequence[Settings] = ()


def draw(device: torch.device, *shapes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32):
    """Normal numbers of these shapes, the same on every call."""
    source = torch.Generator(device).manual_seed(seed)
    return [torch.randn(*shape, generator=source, device=device).to(dtype) for shape in shapes]


def like(tensors: Sequence[Tensor], seed: int = 100) -> list[Tensor]:
    """Normal numbers of the shapes and dtypes of ``tensors``: cotangents."""
    if not tensors:
        return []
    source = torch.Generator(tensors[0].device).manual_seed(seed)
    return [torch.randn(t.shape, generator=source, device=t.device).to(t.dtype) for t in tensors]
