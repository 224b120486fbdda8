"""RMSNorm, LayerNorm and unit rows: kernels against their references."""

from functools import partial

import pytest
import torch

from tests.kernels import checks
from titanfunc.ops.norm import layer_norm, rms_norm, unit_rows

# Odd, one row, block 64, more rows than a program takes at once, more features than a small tile has.
SHAPES = [(3, 5, 48), (1, 3), (7, 64), (600, 33), (4, 5000)]
if checks.GPU:
    SHAPES += [(4, 1000, 1024), (3, 4096), (100_003, 64), (700, 8192)]

FUNCTIONS = {
    "rms_norm": (rms_norm, 1),
    "layer_norm": (layer_norm, 2),
    "unit_rows": (unit_rows, 0),
    "unit_rows_silu": (partial(unit_rows, silu=True), 0),
}
every = pytest.mark.parametrize("name", FUNCTIONS)


def problem(name, *shape, dtype=torch.float32, features=torch.float32):
    function, vectors = FUNCTIONS[name]
    x = checks.draw(*shape, dtype=dtype, scale=2.0) + torch.tensor(0.5, dtype=dtype)
    tensors = [checks.draw(shape[-1], seed=10 + i, dtype=features) for i in range(vectors)] + [x]
    return partial(function, kernels="triton"), function, tensors


@every
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(name, shape, dtype):
    kernel, reference, tensors = problem(name, *shape, dtype=dtype)
    checks.check_against_float64(kernel, reference, tensors)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_vectors_in_half_precision(name):
    checks.check_against_float64(*problem(name, 9, 40, dtype=torch.bfloat16, features=torch.bfloat16))


@every
def test_rows_of_zeros_and_of_large_numbers(name):
    kernel, reference, tensors = problem(name, 4, 64)
    tensors[-1] = torch.cat([tensors[-1][:2] * 1e4, torch.zeros_like(tensors[-1][:2])])
    checks.check_against_float64(kernel, reference, tensors)


@every
def test_what_is_not_contiguous(name):
    kernel, reference, tensors = problem(name, 20, 6)
    tensors[-1] = tensors[-1].T
    tensors[:-1] = [checks.draw(40, seed=i)[::2] for i in range(len(tensors) - 1)]
    checks.check_against_float64(kernel, reference, tensors)


@every
def test_no_rows(name):
    kernel, reference, tensors = problem(name, 0, 8)
    got, want = (torch.func.vjp(f, *tensors) for f in (kernel, reference))
    assert got[0].shape == (0, 8)
    for ours, theirs in zip(got[1](got[0]), want[1](want[0]), strict=True):
        assert torch.equal(ours, theirs)


@every
def test_compiled(name):
    kernel, _, tensors = problem(name, 3, 2, 40)
    checks.check_compiled(kernel, tensors, range(len(tensors)))


@every
def test_vmap(name):
    kernel, _, tensors = problem(name, 5, 4, 3, 24)
    argnums = range(len(tensors))
    shared = [None] * (len(tensors) - 1)
    checks.check_vmap(kernel, tensors, [*shared, 1], argnums)
    own = [torch.stack([t, 2 * t, -t]) for t in tensors[:-1]]
    checks.check_vmap(kernel, [*own, tensors[-1]], [*(0 for _ in own), 2], argnums)


@every
def test_a_shared_vector_gets_the_sum_over_samples(name):
    kernel, reference, tensors = problem(name, 5, 4, 24)
    dims = (*[None] * (len(tensors) - 1), 0)
    checks.check_against_float64(torch.func.vmap(kernel, dims), torch.func.vmap(reference, dims), tensors)


@every
def test_second_derivative(name):
    kernel, reference, tensors = problem(name, 3, 17)
    checks.check_second(kernel, reference, tensors, range(len(tensors)))


@every
def test_the_kernels_backward_is_the_one_that_runs(name):
    from titanfunc_kernels import norm

    kernel, _, tensors = problem(name, 3, 16)
    raw = "unit_rows_backward" if name.startswith("unit") else f"{name}_backward"
    checks.check_backward_that_runs(norm, raw, kernel, tensors, range(len(tensors)))


def test_the_same_numbers_every_time():
    kernel, _, tensors = problem("rms_norm", 700, 33, dtype=torch.bfloat16)
    first, second = (torch.func.vjp(kernel, *tensors)[1](tensors[-1]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_the_kernels_refuse():
    x = checks.draw(3, 8)
    for tensors, message in [
        ((x[0].double(), x), "rms_norm: scale: wanted float32 or bfloat16"),
        ((x[0], x.half()), "rms_norm: x: wanted float32 or bfloat16"),
        ((x[0, :4], x), r"rms_norm: scale: wanted shape \[8\]"),
        ((x[0], x[..., :0]), "x: wanted 1 to 8192 features"),
        ((x[0].to("meta"), x), "scale: wanted a tensor on"),
        ((x[0].to("meta"), x.to("meta")), "x: wanted a CUDA tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            rms_norm(*tensors, kernels="triton")
    with pytest.raises(ValueError, match="bias: wanted shape"):
        layer_norm(x[0], x[0, :4], x, kernels="triton")
    with pytest.raises(ValueError, match=r"unit_rows: x: wanted \[..., D\]"):
        unit_rows(x[0, 0], kernels="triton")
    with pytest.raises(ValueError, match="kernels: wanted one of reference, triton"):
        unit_rows(x, kernels="cuda")
