"""Symmetric products, and Newton-Schulz and Polar Express through them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from titanfunc_kernels.symmetric import GROUP, _tile_of

from tests.kernels import checks
from tests.kernels.checks import DEVICE, DTYPES, GPU, draw
from titanfunc.ops import symmetric
from titanfunc.ops.orthogonal import METHODS, orthogonalize

# Matrices, rows, columns: one row, tiles of 32, 64 and 128 with an edge and without, several groups of tiles.
SHAPES = [(1, 1, 1), (2, 33, 70), (1, 64, 64), (3, 65, 32), (1, 200, 40)]
LARGE = [(12, 768, 3072), (4, 1000, 1031), (1, 64, 4096), (1, 4096, 4096), (3, 2048, 2048), (2, 1100, 64)]
LINEAR, SQUARE = -4.7750, 2.0315


def gram(kernels):
    return lambda x: symmetric.gram(x, kernels=kernels)


def polynomial(kernels):
    def of_square(a):  # its argument is symmetric whatever it is given, as the kernel takes it to be
        return symmetric.square_polynomial((a + a.mT) / 2, LINEAR, SQUARE, kernels=kernels)

    return of_square


def inputs(operation, shape, dtype):
    matrices, rows, columns = shape
    if operation is gram:
        return draw(matrices, rows, columns, dtype=dtype, scale=columns**-0.5)
    root = draw(matrices, rows, rows, scale=rows**-0.5)
    return (root @ root.mT).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *(LARGE if GPU else [])])
@pytest.mark.parametrize("operation", [gram, polynomial])
def test_values_and_gradients(operation, shape, dtype):
    x = inputs(operation, shape, dtype)
    floor = max(1e-6, x.shape[-1] ** 0.5 * 2.0**-24)  # float32 sums of so many products, in another order
    checks.check_against_float64(operation("triton"), operation("reference"), [x], floor=floor)
    product = operation("triton")(x)
    assert torch.equal(product.tril(-1), product.triu(1).mT)


@triton.jit
def tiles(out, side, GROUP: tl.constexpr):
    index = tl.program_id(0)
    row, column = _tile_of(index, side, GROUP)
    tl.store(out + 2 * index, row)
    tl.store(out + 2 * index + 1, column)


@pytest.mark.parametrize("side", [1, 2, 7, 8, 9, 16, 19, *([64, 333] if GPU else [])])
def test_every_tile_is_taken_once(side):
    count = side * (side + 1) // 2
    out = torch.empty(count, 2, dtype=torch.int32, device=DEVICE)
    tiles[(count,)](out, side, GROUP=GROUP)
    assert sorted(map(tuple, out.tolist())) == [(i, j) for i in range(side) for j in range(i + 1)]


@pytest.mark.parametrize("operation", [gram, polynomial])
def test_compiled_mapped_and_second_derivative(operation):
    x = inputs(operation, (2, 17, 24), torch.float32)
    checks.check_compiled(operation("triton"), [x], (0,))
    stacked = torch.stack([x, 2 * x, -x], 1)
    checks.check_vmap(operation("triton"), [stacked], (1,), (0,))
    checks.check_second(operation("triton"), operation("reference"), [x], (0,))


@pytest.mark.parametrize("name", ["gram", "square"])
def test_the_backward_that_was_bound_runs(name):
    x = draw(2, 16, 16)

    def function(x):
        if name == "gram":
            return symmetric.gram(x, kernels="triton")
        return symmetric.square_polynomial(x, LINEAR, SQUARE, kernels="triton")

    checks.check_backward_that_runs(symmetric, f"{name}_gradient", function, [x], (0,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 3, 30, 20), (17, 40), *([(12, 768, 3072), (4, 3, 1024, 1024)] if GPU else [])])
def test_orthogonalize(shape, method, dtype):
    def turned(kernels):
        return lambda x: orthogonalize(x, 5, method=method, kernels=kernels)

    x = draw(*shape, dtype=dtype)
    # What five steps make of the smallest singular values hangs on rounding: values at both precisions, no gradients.
    checks.check_against_float64(turned("triton"), turned("reference"), [x], gradients=False, floor=1e-5)


def test_orthogonalize_compiled_with_gradients():
    x = draw(2, 20, 9)

    def turned(x):
        return orthogonalize(x, 2, kernels="triton")

    checks.check_compiled(turned, [x], (0,), tolerance=1e-4)
    plain = checks.slopes_of(lambda x: orthogonalize(x, 2), (0,))(x)
    checks.assert_near(checks.slopes_of(turned, (0,))(x), plain, 1e-4)


def test_what_is_refused():
    x = draw(2, 8, 4)
    with pytest.raises(ValueError, match=r"x: wanted matrices \[L, M, K\], got shape \(8, 4\)"):
        symmetric.gram(x[0], kernels="triton")
    with pytest.raises(ValueError, match="a: wanted square matrices"):
        symmetric.square_polynomial(x, 1.0, 1.0, kernels="triton")
    with pytest.raises(ValueError, match="gram: x: wanted float32 or bfloat16 with kernels=triton, got torch"):
        symmetric.gram(x.double(), kernels="triton")
    with pytest.raises(ValueError, match="kernels: wanted one of reference, triton for gram, got 'cuda'"):
        symmetric.gram(x, kernels="cuda")


def test_a_cpu_that_interprets_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="gram: x: wanted a CUDA tensor"):
        symmetric.gram(torch.ones(1, 2, 2), kernels="triton")
