"""Linear maps on 8-bit numbers: casts bit by bit, products against the same numbers multiplied in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from titanfunc_kernels import fp8 as raw

from tests.kernels import checks
from tests.kernels.checks import DEVICE, GPU, draw
from titanfunc.ops import fp8
from titanfunc.ops.fp8 import linear_fp8, quantise

# tokens, D_in, D_out
SHAPES = [(4096, 1024, 2048), (333, 64, 192), (64, 64, 64), (1, 48, 16)] if GPU else [(7, 48, 32), (64, 64, 64)]
SMALL = (7, 48, 32)
FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOOR = 2.0**-7 if GPU else 1e-6  # of the largest number: Hopper sums 8-bit products in about 14 bits


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(raw, "PEAK_BLOCK", 64)
        monkeypatch.setattr(raw, "PEAK_PROGRAMS", 3)
        monkeypatch.setattr(raw, "CAST_ROWS", 16)
        monkeypatch.setattr(raw, "CAST_COLUMNS", 32)
        monkeypatch.setattr(raw, "COLUMN_PROGRAMS", 3)
        monkeypatch.setattr(raw, "LINE_BLOCK", 32)


def same(got, want):
    assert got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.contiguous().view(torch.uint8))


def matrix(rows, columns, dtype=torch.float32, seed=0):
    """Rows of very different sizes, a row and a column of zeros, and numbers down to the formats' subnormals."""
    x = draw(rows, columns, dtype=dtype, seed=seed) * draw(rows, columns, dtype=dtype, seed=seed + 1) ** 3
    x = (x * (10.0 ** torch.arange(rows).remainder(5)).to(x)[:, None]).clamp(-6e4, 6e4)
    x[rows // 2], x[:, columns // 3] = 0, 0
    return x


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 48), (33, 80), (16, 5), (1, 1), *([(1000, 5003)] if GPU else [])])
def test_casts_are_the_references_bit_by_bit(tiles, shape, dtype, fmt):
    x = matrix(*shape, dtype)
    rows = shape[0]
    with checks.poison():
        whole = raw.cast(x, raw.tensor_peaks(x), fmt)
        columns = raw.cast(x, raw.column_peaks(x), fmt)
        lines, line_scale = raw.cast_rows(x, fmt)
    want, scale = quantise(x, fmt, None)
    same(whole[0], want)
    same(whole[1][:, :rows], want.mT)
    assert torch.equal(whole[2], scale.flatten()) and whole[1].shape == (shape[1], -(-rows // 16) * 16)
    want, scale = quantise(x, fmt, 0)
    same(columns[0], want)
    same(columns[1][:, :rows], want.mT)
    assert torch.equal(columns[2], scale.flatten())
    for turned in (whole[1], columns[1]):
        assert (turned[:, rows:].float() == 0).all()
    want, scale = quantise(x, fmt, 1)
    same(lines, want)
    assert torch.equal(line_scale, scale.flatten())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_largest_magnitude_is_the_formats_and_nothing_is_off_by_more_than_half_a_step(fmt, axis):
    x = matrix(9, 40)
    values, scale = quantise(x, fmt, axis)
    assert values.float().abs().max() == torch.finfo(fmt).max
    bits = {torch.float8_e4m3fn: 4, torch.float8_e5m2: 3}[fmt]
    off = (values.float() * scale - x).abs()
    assert (off <= (2.0**-bits * x.abs() + torch.finfo(fmt).smallest_normal * 2.0**-bits * scale) * 1.0001).all()


def layer(kernels, scaling, weight_gradient, dtype):
    return lambda x, weight: linear_fp8(
        weight, x, dtype, scaling=scaling, weight_gradient=weight_gradient, kernels=kernels
    )


@pytest.mark.parametrize("weight_gradient", ["fp8", "bf16"])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_by_the_tolerance_rule(tiles, shape, dtype, scaling, weight_gradient):
    tokens, d_in, d_out = shape
    x, weight = draw(tokens, d_in, dtype=dtype), draw(d_in, d_out, seed=1, scale=d_in**-0.5)
    functions = [
        layer(kernels, scaling, weight_gradient, to)
        for kernels, to in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
    ]
    checks.check_against_float64(functions[0], functions[1], [x, weight], functions[2], floor=FLOOR)


def test_half_precision():
    x, weight = draw(*SMALL[:2], dtype=torch.float16), draw(*SMALL[1:], dtype=torch.float16, seed=1, scale=0.1)
    functions = [
        layer(kernels, "tensor", "fp8", to)
        for kernels, to in (("triton", x.dtype), ("reference", x.dtype), ("reference", torch.float64))
    ]
    checks.check_against_float64(functions[0], functions[1], [x, weight], functions[2], floor=FLOOR)


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_the_reference_is_near_the_linear_map(scaling):
    x, weight = draw(40, 48), draw(48, 32, seed=1)

    def slopes(function):
        y, pull = torch.func.vjp(function, x, weight)
        return [y, *pull(draw(*y.shape, seed=2))]

    def plain(x, weight):
        return x @ weight

    for kernels in ("reference", "triton"):
        for got, want in zip(slopes(layer(kernels, scaling, "fp8", torch.float32)), slopes(plain), strict=True):
            assert (got - want).norm() < 0.08 * want.norm()


def test_scales_by_row_keep_small_tokens():
    """A token of large numbers leaves the others' precision as it was."""
    x, weight = draw(16, 48), draw(48, 32, seed=1)
    x[0] *= 2.0**16
    want = (x @ weight)[1:]
    errors = {
        scaling: float((linear_fp8(weight, x, x.dtype, scaling=scaling, kernels="triton")[1:] - want).norm())
        for scaling in ("tensor", "row")
    }
    assert errors["row"] < 0.05 * want.norm() < errors["tensor"]


def test_leading_axes_and_strides():
    x, weight = draw(48, 2, 5).permute(1, 2, 0), draw(32, 48, seed=1).mT
    got = linear_fp8(weight, x, torch.float32, kernels="triton")
    want = linear_fp8(weight.contiguous(), x.contiguous().flatten(0, 1), torch.float32, kernels="reference")
    torch.testing.assert_close(got, want.view(2, 5, 32), rtol=1e-2 if GPU else 1e-5, atol=1e-2 if GPU else 1e-5)


def test_zeros_stay_zeros():
    x, weight = torch.zeros(7, 48, device=DEVICE), draw(48, 32)
    for scaling in ("tensor", "row"):
        y, pull = torch.func.vjp(layer("triton", scaling, "fp8", torch.float32), x, weight)
        assert all((t == 0).all() for t in (y, *pull(torch.zeros_like(y))))


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_compiled_is_eager(scaling, kernels):
    x, weight = draw(*SMALL[:2]), draw(*SMALL[1:], seed=1)
    # On a GPU the incoming gradient may differ in its last bit, and with it an 8-bit number by a step.
    checks.check_compiled(layer(kernels, scaling, "fp8", torch.float32), [x, weight], (0, 1), 0.02 if GPU else 1e-6)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_under_vmap(scaling, kernels):
    x, weight = draw(2, *SMALL[:2]), draw(*SMALL[1:], seed=1)
    function = layer(kernels, scaling, "fp8", torch.float32)
    checks.check_vmap(function, [x, weight], (0, None), (0, 1), 0.02 if GPU else 1e-6)


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_second_derivatives_are_the_references_and_pass_through_the_casts(scaling):
    x, weight = draw(*SMALL[:2]), draw(*SMALL[1:], seed=1, scale=0.1)
    kernel, reference = (layer(k, scaling, "bf16", torch.float32) for k in ("triton", "reference"))
    checks.check_second(kernel, reference, [x, weight], (0, 1), 0.05 if GPU else 1e-4)

    def mixed(function):
        def slope(x, weight):
            return torch.func.grad(lambda x: function(x, weight).square().sum())(x)

        return torch.func.grad(lambda weight: slope(x, weight).square().sum())(weight)

    want = mixed(lambda x, weight: x @ weight)
    assert (mixed(kernel) - want).norm() < 0.15 * want.norm()


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_the_backward_that_runs(scaling):
    x, weight = draw(*SMALL[:2]), draw(*SMALL[1:], seed=1)
    checks.check_backward_that_runs(
        raw, "backward", layer("triton", scaling, "fp8", torch.float32), [x, weight], (0, 1)
    )


def test_refusals(monkeypatch):
    x, weight = draw(*SMALL[:2]), draw(*SMALL[1:], seed=1)
    run = partial(linear_fp8, kernels="triton")
    with pytest.raises(ValueError, match=r"weight: wanted \[D_in, D_out\]"):
        run(weight.mT, x, x.dtype)
    with pytest.raises(ValueError, match="scaling: wanted one of tensor, row"):
        run(weight, x, x.dtype, scaling="block")
    with pytest.raises(ValueError, match="weight_gradient: wanted one of fp8, bf16"):
        run(weight, x, x.dtype, weight_gradient="float32")
    with pytest.raises(ValueError, match="dtype: wanted a floating-point one"):
        run(weight, x, torch.int32)
    with pytest.raises(ValueError, match="x: wanted float32, bfloat16 or float16"):
        run(weight, x.double(), torch.float32)
    with pytest.raises(ValueError, match="weight: wanted dimensions that are multiples of 16"):
        run(weight[:, :31], x, x.dtype)
    with pytest.raises(ValueError, match="x: wanted at least one token"):
        run(weight, x[:0], x.dtype)
    with pytest.raises(ValueError, match="kernels: wanted one of reference, triton"):
        run(weight, x, x.dtype, kernels="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="x: wanted a CUDA tensor"):
        run(weight.cpu(), x.cpu(), x.dtype)


def test_a_device_without_8_bit_tensor_cores_is_refused(monkeypatch):
    monkeypatch.setattr(fp8, "interpreted", lambda: False)
    for capability, scaling, wanted in (
        ((8, 0), "tensor", "compute capability 8.9 or more"),
        ((8, 9), "row", "'tensor' on this GPU"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        with pytest.raises(ValueError, match=wanted):
            fp8._check_capability(torch.empty(1), scaling)


@pytest.mark.gpu
def test_a_nan_stays_a_nan():
    x, weight = draw(16, 48), draw(48, 32, seed=1)
    x[3, 5] = torch.nan
    for scaling in ("tensor", "row"):
        y = linear_fp8(weight, x, torch.float32, scaling=scaling, kernels="triton")
        assert y[3].isnan().all()
