"""SiLU times gate: the kernel against its reference."""

from functools import partial

import pytest
import torch

from tests.kernels import checks
from titanfunc.ops.gate import silu_gate

kernel = partial(silu_gate, kernels="triton")

# Less than a block, 64 features, more blocks than programs (and not whole ones), a single number.
SHAPES = [(3, 5, 7), (2, 64), (150_001,), (1, 1)]
if checks.GPU:
    SHAPES += [(4, 2048, 1024), (50_000_003,)]


def problem(*shape, dtype=torch.float32):
    return [checks.draw(*shape, dtype=dtype, seed=seed, scale=2.0) for seed in (0, 1)]


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype):
    checks.check_against_float64(kernel, silu_gate, problem(*shape, dtype=dtype))


def test_far_from_zero():
    a = torch.tensor([-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0], device=checks.DEVICE)
    checks.check_against_float64(kernel, silu_gate, [a, checks.draw(7)])


def test_what_is_not_contiguous():
    both = checks.draw(6, 10)
    checks.check_against_float64(kernel, silu_gate, [both[:, :5], both[:, 5:]])
    checks.check_against_float64(kernel, silu_gate, [both.T, both.T])


def test_no_elements():
    a = checks.draw(0, 4)
    value, pull = torch.func.vjp(kernel, a, a)
    assert value.shape == (0, 4) and all(slope.shape == (0, 4) for slope in pull(value))


def test_compiled():
    checks.check_compiled(kernel, problem(3, 5, 6), (0, 1))


def test_vmap():
    a, b = problem(4, 3, 5)
    checks.check_vmap(kernel, [a, b], (1, 1), (0, 1))
    checks.check_vmap(kernel, [a, b[:, 0]], (1, None), (0, 1))


def test_second_derivative():
    checks.check_second(kernel, silu_gate, problem(3, 5), (0, 1))


def test_the_kernels_backward_is_the_one_that_runs():
    from titanfunc_kernels import gate

    checks.check_backward_that_runs(gate, "silu_gate_backward", kernel, problem(3, 5), (0, 1))


def test_what_the_kernel_refuses():
    a = checks.draw(3, 4)
    for tensors, message in [
        ((a.double(), a), "silu_gate: a: wanted float32 or bfloat16"),
        ((a, a.bfloat16()), "silu_gate: b: wanted a's dtype, torch.float32"),
        ((a, a[:1]), r"silu_gate: b: wanted a's shape, \[3, 4\]"),
        ((a, a.to("meta")), "silu_gate: b: wanted a tensor on"),
        ((a.to("meta"), a.to("meta")), "silu_gate: a: wanted a CUDA tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel(*tensors)
