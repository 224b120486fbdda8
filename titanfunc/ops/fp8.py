"""A linear map whose matrix products run on 8-bit floating-point numbers, scaled as they come.

An operand is divided by a scale that brings its largest magnitude to the largest finite number of its format, and cast
to the nearest: e4m3 (448) for inputs and weights, e5m2 (57344) for the incoming gradient. Forward, y = x W; backward,
dx = g W^T and dW = x^T g. Source: FP8 Formats for Deep Learning (arXiv 2209.05433), with current scales instead of
delayed ones.

Letters: D_in, D_out features, K tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titanfunc.ops._bind import Bound, Reference, bind
from titanfunc.ops.backend import check_device, implementation, implements, interpreted, refuse_unless

_NAME = "linear_fp8"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXACT = (*_DTYPES, torch.float64)
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_SMALLEST = 2.0**-100  # the least peak: what divides by it stays finite
_SCALINGS = ("tensor", "row")
_WEIGHT_GRADIENTS = ("fp8", "bf16")


def linear_fp8(
    weight: Tensor, x: Tensor, dtype: torch.dtype, *, scaling: str = "tensor", weight_gradient: str = "fp8",
    kernels: str = "reference",
) -> Tensor:  # fmt: skip
    """``x @ weight`` for x [..., D_in] and weight [D_in, D_out], on 8-bit operands; result [..., D_out] in ``dtype``.

    scaling: "tensor", one scale an operand; or "row", one for each line along the axis that is summed over, so that a
    token or feature of large numbers does not coarsen the others.
    weight_gradient: "fp8", like the other products; or "bf16", from x and the incoming gradient as they are, in
    bfloat16.
    kernels: "triton" casts with Triton kernels and multiplies with torch._scaled_mm (cuBLAS); the reference multiplies
    the same 8-bit numbers in float32. A nan in an input makes nan of every sum that it enters. A second derivative
    takes every cast for the identity (straight through).

    Raises ValueError for shapes that do not fit; with "triton" too for D_in or D_out that 16 does not divide, for a GPU
    of compute capability below 8.9, and for scaling="row" on any but 9.0.
    """
    if x.ndim < 2 or weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{_NAME}: weight: wanted [D_in, D_out] for x [..., D_in], got {tuple(weight.shape)} for {tuple(x.shape)}"
        )
    for name, value, known in (
        ("scaling", scaling, _SCALINGS),
        ("weight_gradient", weight_gradient, _WEIGHT_GRADIENTS),
    ):
        if value not in known:
            raise ValueError(f"{_NAME}: {name}: wanted one of {', '.join(known)}, got {value!r}")
    if dtype not in _EXACT:
        raise ValueError(f"{_NAME}: dtype: wanted a floating-point one of 16 bits or more, got {dtype}")
    rows = implementation(_NAME, kernels)(x.flatten(0, -2), weight, dtype, scaling, weight_gradient)
    return rows.unflatten(0, x.shape[:-1])


@implements(_NAME, "reference")
def _reference(x: Tensor, weight: Tensor, dtype: torch.dtype, scaling: str, weight_gradient: str) -> Tensor:
    return _REFERENCE[scaling]([x, weight], _ints(dtype, weight_gradient), [])[0]


@implements(_NAME, "triton")
def _triton(x: Tensor, weight: Tensor, dtype: torch.dtype, scaling: str, weight_gradient: str) -> Tensor:
    check_device(_NAME, x=x, weight=weight)
    for name, given in (("dtype", dtype), ("x", x.dtype), ("weight", weight.dtype)):
        refuse_unless(given in _DTYPES, _NAME, name, "float32, bfloat16 or float16", given)
    fits = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    refuse_unless(fits, _NAME, "weight", "dimensions that are multiples of 16", tuple(weight.shape))
    refuse_unless(x.numel() > 0, _NAME, "x", "at least one token", tuple(x.shape))
    return _TRITON[scaling]([x, weight], _ints(dtype, weight_gradient), [])[0]


def _ints(dtype: torch.dtype, weight_gradient: str) -> list[int]:
    return [_EXACT.index(dtype), _WEIGHT_GRADIENTS.index(weight_gradient)]


def quantise(x: Tensor, fmt: torch.dtype, axis: int | None) -> tuple[Tensor, Tensor]:
    """x [M, N] in the 8-bit format ``fmt``, and the scales that it was divided by, float32 [1, 1], [1, N] or [M, 1].

    axis: the one that a scale covers; None: both. Divisions and casts round to the nearest, so that there is one
    right result.
    """
    wide = x.float()
    peak = wide.abs().amax((0, 1) if axis is None else axis, keepdim=True).clamp_min(_SMALLEST)
    largest = torch.full_like(peak, _LARGEST[fmt])  # a tensor: torch would multiply by a number's reciprocal
    return (wide * (largest / peak)).to(fmt), peak / largest


def _product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix product of two quantised matrices, summed in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    return ((a[0].to(wide) @ b[0].to(wide)) * (a[1] * b[1]).to(wide)).to(dtype)


def _multiply(
    a: Tensor, b: Tensor, formats: tuple[torch.dtype, torch.dtype], dtype: torch.dtype, scaling: str
) -> Tensor:
    """a [M, K] times b [K, N], each quantised on its own."""
    axes = (None, None) if scaling == "tensor" else (1, 0)
    return _product(quantise(a, formats[0], axes[0]), quantise(b, formats[1], axes[1]), dtype)


def _bound_reference(scaling: str) -> Bound:
    e4m3, e5m2 = _LARGEST

    def forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        x, weight = tensors
        return [_multiply(x, weight, (e4m3, e4m3), _EXACT[ints[0]], scaling)]

    def backward(
        tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
    ) -> list[Tensor]:
        (x, weight), (grad,) = tensors, cotangents
        d_x = _multiply(grad, weight.mT, (e5m2, e4m3), x.dtype, scaling)
        if ints[1]:
            return [d_x, (x.bfloat16().mT @ grad.bfloat16()).to(weight.dtype)]
        return [d_x, _multiply(x.mT, grad, (e4m3, e5m2), weight.dtype, scaling)]

    return bind(
        f"{_NAME}_{scaling}_reference", forward, _fake, backward, vmap="each", reference=_straight_through(scaling)
    )


def _bound_triton(scaling: str) -> Bound:
    def forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        from titanfunc_kernels import fp8

        x, weight = (tensor.contiguous() for tensor in tensors)
        _check_capability(x, scaling)
        return list(fp8.forward(x, weight, _EXACT[ints[0]], scaling))

    def fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        from titanfunc_kernels import fp8

        counts = [fp8.peak_count(tensor.numel()) if scaling == "tensor" else 0 for tensor in tensors]
        return _fake(tensors, ints, floats) + [
            torch.empty(count, dtype=torch.float32, device=tensors[0].device) for count in counts
        ]

    def backward(
        tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
    ) -> list[Tensor]:
        from titanfunc_kernels import fp8

        x, weight, grad = (tensor.contiguous() for tensor in (*tensors, *cotangents))
        _, of_x, of_weight = outputs
        return list(fp8.backward(x, weight, of_x, of_weight, grad, scaling, narrow_weight=not ints[1]))

    return bind(
        f"{_NAME}_{scaling}", forward, fake, backward, vmap="each", residuals=2, reference=_straight_through(scaling)
    )


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    x, weight = tensors
    return [torch.empty(x.shape[0], weight.shape[1], dtype=_EXACT[ints[0]], device=x.device)]


def _straight_through(scaling: str) -> Reference:
    """The layer with derivatives that pass through its casts, for second derivatives."""

    def through(x: Tensor, axis: int | None) -> Tensor:
        values, scale = quantise(x.detach(), torch.float8_e4m3fn, axis)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide + (values.to(wide.dtype) * scale - wide.detach())

    def layer(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
        x, weight = tensors
        rows, columns = (None, None) if scaling == "tensor" else (1, 0)
        return [(through(x, rows) @ through(weight, columns)).to(_EXACT[ints[0]])]

    return layer


def _check_capability(x: Tensor, scaling: str) -> None:
    """Raises ValueError where the device's tensor cores do not take the operands."""
    if interpreted() and not x.is_cuda:
        return
    capability = torch.cuda.get_device_capability(x.device)
    refuse_unless(capability >= (8, 9), _NAME, "x", "a GPU of compute capability 8.9 or more", capability)
    refuse_unless(scaling == "tensor" or capability == (9, 0), _NAME, "scaling", "'tensor' on this GPU", scaling)


_REFERENCE = {scaling: _bound_reference(scaling) for scaling in _SCALINGS}
_TRITON = {scaling: _bound_triton(scaling) for scaling in _SCALINGS}
