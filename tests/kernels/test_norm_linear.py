"""RMSNorm with the linear map after it: the kernel against its reference."""

from functools import partial

import pytest
import torch

from tests.kernels import checks
from titanfunc.ops.norm_linear import norm_linear

# [leading axes], D, E: less than a tile every way, 64 every way, more than a tile every way, one row,
# more tiles of rows than go together.
SHAPES = [((2, 3), 5, 7), ((64,), 64, 64), ((70,), 130, 67), ((1,), 16, 1), ((577,), 16, 70)]
if checks.GPU:
    SHAPES += [((1500,), 1000, 300), ((3000,), 512, 2500), ((4, 512), 1024, 1024)]


def problem(leading, size, columns, dtype=torch.float32, features=torch.float32):
    scale = 1 + 0.3 * checks.draw(size, seed=1)
    weight = checks.draw(size, columns, seed=2, scale=size**-0.5)
    x = checks.draw(*leading, size, dtype=dtype, scale=3.0)
    return [scale.to(features), weight.to(features), x]


def pair(dtype):
    reference = partial(norm_linear, dtype=dtype)
    return partial(reference, kernels="triton"), reference


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("own", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, own, dtype):
    kernel, reference = pair(dtype)
    tensors = problem(*shape, dtype=own)
    checks.check_against_float64(kernel, reference, tensors, exact=pair(torch.float64)[1])


@pytest.mark.parametrize("rows", [63, 1024])
@pytest.mark.parametrize("columns", [40, 2048])
def test_every_table_entry(rows, columns):
    kernel, reference = pair(torch.bfloat16)
    tensors = problem((rows,), 24, columns, dtype=torch.bfloat16)
    checks.check_against_float64(kernel, reference, tensors, exact=pair(torch.float64)[1], gradients=False)


def test_vectors_and_weights_in_half_precision():
    kernel, reference = pair(torch.bfloat16)
    tensors = problem((9,), 40, 20, torch.bfloat16, torch.bfloat16)
    checks.check_against_float64(kernel, reference, tensors, exact=pair(torch.float64)[1])


def test_what_is_not_contiguous():
    scale, weight, x = problem((9,), 20, 20)
    tensors = [scale, weight.T, torch.cat([x, x], -1)[:, 1:21]]
    checks.check_against_float64(*pair(torch.float32), tensors, exact=pair(torch.float64)[1])


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (2, 0)])
def test_nothing_to_compute(rows, columns):
    tensors = problem((rows,), 8, columns)
    kernel, reference = pair(torch.float32)
    got, want = (torch.func.vjp(f, *tensors) for f in (kernel, reference))
    assert got[0].shape == (rows, columns)
    for ours, theirs in zip(got[1](got[0]), want[1](want[0]), strict=True):
        assert torch.equal(ours, theirs)


def test_compiled():
    checks.check_compiled(pair(torch.float32)[0], problem((2, 3), 20, 18), (0, 1, 2))


def test_vmap():
    scale, weight, x = problem((3, 4), 20, 18)
    kernel = pair(torch.float32)[0]
    checks.check_vmap(kernel, [scale, weight, x], (None, None, 1), (0, 1, 2))
    checks.check_vmap(kernel, [scale, torch.stack([weight, -weight, 2 * weight]), x], (None, 0, 0), (0, 1, 2))


def test_second_derivative():
    kernel, reference = pair(torch.float32)
    checks.check_second(kernel, reference, problem((3,), 9, 10), (0, 1, 2))


def test_the_kernels_backward_is_the_one_that_runs():
    from titanfunc_kernels import norm_linear as raw

    tensors = problem((3,), 9, 10)
    checks.check_backward_that_runs(raw, "norm_linear_backward", pair(torch.float32)[0], tensors, (0, 1, 2))


def test_what_the_kernel_refuses():
    scale, weight, x = problem((3,), 8, 4)
    kernel = pair(torch.float32)[0]
    for tensors, message in [
        ((scale, weight.double(), x), "norm_linear: weight: wanted float32 or bfloat16"),
        ((scale, weight.to("meta"), x), "norm_linear: weight: wanted a tensor on"),
        ((scale[:4], weight, x), r"norm_linear: scale: wanted shape \[8\]"),
        ((scale, weight[:4], x), r"norm_linear: weight: wanted shape \[8, E\]"),
        ((scale, weight[0], x), r"norm_linear: weight: wanted shape \[8, E\]"),
        ((scale, weight, x[0, 0]), r"norm_linear: x: wanted \[..., D\]"),
        ((scale, weight, x[:, :0]), "norm_linear: x: wanted 1 to 8192 features"),
        ([t.to("meta") for t in (scale, weight, x)], "norm_linear: x: wanted a CUDA tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel(*tensors)
    with pytest.raises(ValueError, match="norm_linear: dtype: wanted float32 or bfloat16"):
        pair(torch.float16)[0](scale, weight, x)
