"""bfloat16 and 8-bit casts under Triton's interpreter, as the GPU has them.

The interpreter (3.6, 3.7) keeps bfloat16 numbers as their bits: its products multiply those bits as whole numbers, and
its casts from float32 cut the lower half off where the GPU rounds to the nearest. Casts to 8 bits lose carries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest).reshape(x.shape)


@contextlib.contextmanager
def right_bfloat16() -> Iterator[None]:
    """While it is entered, interpreted products and casts of bfloat16 are the GPU's."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(x: Any) -> Any:
        return TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        if src.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(_rounded(src.data), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return TensorHandle(_widened(src.data), tl.float32)
        return cast(self, src, to)

    with (
        mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
        mock.patch.object(InterpreterBuilder, "cast_impl", cast_impl),
    ):
        yield


@contextlib.contextmanager
def right_float8() -> Iterator[None]:
    """While it is entered, interpreted casts of float32 to 8 bits are torch's."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    formats = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    original = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, to: Any, rounding: Any) -> Any:
        if src.dtype.scalar == tl.float32 and to.scalar in formats:
            bits = torch.tensor(src.data).to(formats[to.scalar]).view(torch.uint8).numpy()
            return TensorHandle(bits, to.scalar)
        return original(self, src, to, rounding)

    with mock.patch.object(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp):
        yield
