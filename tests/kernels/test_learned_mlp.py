"""small_fc_lopt's step by one leaf."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import checks
from tests.kernels.checks import DEVICE, DTYPES, draw
from titanfunc.ops import _by_reference
from titanfunc.ops.learned_mlp import learned_mlp_step
from titanfunc.optim.learned.features import (
    Accumulators,
    accumulate,
    factored_axes,
    init_accumulators,
    small_fc_statistics,
    time_embedding,
)
from titanfunc.optim.learned.network import apply_layers, initial_decays

# A vector, one number, rows first and columns first, more columns than a program takes, factored axes apart in the
# middle, at the ends, and with axes after them, sides equal and of 1.
SHAPES = [
    (37,),
    (1,),
    (5, 7),
    (70, 3),
    (3, 300),
    (4, 2, 6),
    (2, 5, 9),
    (6, 2, 5),
    (5, 6, 2),
    (2, 4, 3, 5),
    (1, 4),
    (3, 1),
]
LARGE = [(8192, 768), (12, 256, 1024), (4096,), (12, 3, 768), (24, 16, 64), (1000, 1001)]
STEP_MULT, EXP_MULT = 0.01, 0.001
FLOOR = 5e-6  # three TensorFloat-32 products in sums that cut off rather than round: float32 but for the last bits


def problem(shape, hidden=32, dtype=torch.float32, seed=0):
    """p, g, momentum, second, times, six layers and the factors: after a few gradients."""
    p = draw(*shape, dtype=dtype, seed=seed)
    decays = {name: value.to(DEVICE) for name, value in initial_decays().items()}
    kept = init_accumulators(p)
    for t in range(3):
        g = (0.1 * draw(*shape, seed=seed + 1 + t)).to(dtype)
        kept = accumulate(kept, g, decays)
    layers = []
    for i, (fan_in, fan_out) in enumerate([(39, hidden), (hidden, hidden), (hidden, 2)]):
        layers += [draw(fan_in, fan_out, seed=50 + i, scale=fan_in**-0.5), draw(fan_out, seed=60 + i, scale=0.1)]
    times = time_embedding(torch.tensor(3, device=DEVICE))
    return [p, g, kept.momentum, kept.second, times, *layers, *kept.factors]


def step(kernels):
    """The step as a function of what ``problem`` returns."""

    def run(p, g, momentum, second, times, *rest):
        return learned_mlp_step(
            p, g, momentum, second, rest[6:], factored_axes(p.shape), times, rest[:6],
            step_mult=STEP_MULT, exp_mult=EXP_MULT, kernels=kernels,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_optimizers_own_step(shape):
    tensors = [t.double() for t in problem(shape)]
    p, g, momentum, second, times, *rest = tensors
    layers = {
        name: {"weight": rest[2 * i], "bias": rest[2 * i + 1]} for i, name in enumerate(("input", "hidden", "output"))
    }
    statistics = small_fc_statistics(p, g, Accumulators(momentum, second, tuple(rest[6:])))
    out = apply_layers(layers, torch.cat([statistics, times.expand(p.numel(), -1)], -1))
    want = (out[:, 0] * torch.exp(out[:, 1] * EXP_MULT) * STEP_MULT).reshape(p.shape)
    torch.testing.assert_close(step("reference")(*tensors), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype):
    checks.check_against_float64(
        step("triton"), step("reference"), problem(shape, dtype=dtype), gradients=False, floor=FLOOR
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE)
def test_values_of_large_leaves(shape):
    checks.check_against_float64(step("triton"), step("reference"), problem(shape), gradients=False, floor=FLOOR)


@pytest.mark.parametrize("hidden", [1, 4, 16, 33, 64, 128])
def test_widths_of_the_network(hidden):
    checks.check_against_float64(
        step("triton"), step("reference"), problem((5, 70), hidden), gradients=False, floor=FLOOR
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9,), (5, 7), (2, 5, 9)])
def test_gradients(shape, dtype):
    tensors = problem(shape, hidden=4, dtype=dtype)
    checks.check_against_float64(step("triton"), step("reference"), tensors, floor=FLOOR)


def test_numbers_that_are_not_finite_come_through():
    tensors = problem((5, 7))
    tensors[1][2, 3] = torch.nan
    tensors[2][2, 3] = torch.nan
    want = step("reference")(*tensors)
    assert torch.equal(step("triton")(*tensors).isnan(), want.isnan()) and want.isnan().any()


def test_compiled_mapped_and_second_derivative():
    tensors = problem((5, 7), hidden=4)
    smooth = (0, 1, 2, 3, *range(5, 13))
    checks.check_compiled(step("triton"), tensors, smooth, 1e-4)
    checks.check_second(step("triton"), step("reference"), tensors, (0, 1, 5, 7, 9))
    other = problem((5, 7), hidden=4, seed=9)
    stacked = [
        torch.stack(pair) if i not in (4, *range(5, 11)) else pair[0]
        for i, pair in enumerate(zip(tensors, other, strict=True))
    ]
    dims = [None if i in (4, *range(5, 11)) else 0 for i in range(len(tensors))]
    checks.check_vmap(step("triton"), stacked, dims, (0, 1, 5, 9), 1e-4)


def test_the_backward_that_was_bound_runs():
    tensors = problem((5, 7), hidden=4)
    p, g, momentum, second = tensors[:4]

    def of_elements(p, g, momentum, second):
        return step("triton")(p, g, momentum, second, *tensors[4:])

    checks.check_backward_that_runs(_by_reference, "gradients", of_elements, [p, g, momentum, second], range(4))


def test_what_is_refused(monkeypatch):
    tensors = problem((5, 7))
    run = step("triton")
    with pytest.raises(ValueError, match=r"momentum: wanted shape \(5, 7, 3\), got \(5, 7, 2\)"):
        run(*tensors[:2], tensors[2][..., :2], *tensors[3:])
    with pytest.raises(ValueError, match="layers: wanted shapes"):
        run(*tensors[:6], tensors[6][:3], *tensors[7:])
    with pytest.raises(ValueError, match="learned_mlp: layers: wanted at most 128 hidden units"):
        run(*problem((5, 7), hidden=129))
    with pytest.raises(ValueError, match="learned_mlp: p: wanted float32 or bfloat16 with kernels=triton"):
        run(*(t.double() for t in tensors))
    with pytest.raises(ValueError, match="learned_mlp: momentum: wanted float32"):
        run(*tensors[:2], tensors[2].bfloat16(), *tensors[3:])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="learned_mlp: p: wanted a CUDA tensor"):
        run(*(t.cpu() for t in tensors))
