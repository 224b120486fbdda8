"""Rotary positions: the kernel against its reference."""

from functools import partial

import pytest
import torch

from tests.kernels import checks
from titanfunc.ops.rotary import Rotary, rotary_table, rotate

# x's leading axes, the table's, tokens, features: tables for all, for each batch entry, for each of two leading axes,
# for each head; more heads than one program takes; odd numbers of tokens and pairs; 64 features.
SHAPES = [
    ((2, 3), (), 5, 64),
    ((2, 5), (2, 1), 7, 6),
    ((2, 3, 2), (2, 3, 1), 4, 10),
    ((2, 3, 2), (3, 1), 4, 10),
    ((3, 2), (1, 2), 3, 8),
    ((3,), (3,), 9, 2),
    ((), (), 130, 34),
]
if checks.GPU:
    SHAPES += [((4, 16), (), 2048, 64), ((2, 9), (2, 1), 1001, 128)]


def run(x, cos, sin, kernels="reference"):
    return rotate(x, Rotary(cos, sin), kernels)


kernel = partial(run, kernels="triton")


def problem(leading, own, tokens, size, dtype=torch.float32, table_dtype=None):
    x = checks.draw(*leading, tokens, size, dtype=dtype)
    positions = torch.randint(500, (*own, tokens), generator=torch.Generator().manual_seed(1)).to(checks.DEVICE)
    return [x, *rotary_table(positions, size, table_dtype or dtype)]


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype):
    x, cos, sin = problem(*shape, dtype=dtype)
    checks.check_against_float64(
        lambda x: kernel(x, cos, sin), lambda x: run(x, cos, sin), [x],
        exact=lambda x: run(x, cos.double(), sin.double()),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_a_table_of_another_dtype(dtype):
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    x, cos, sin = problem((2, 2), (), 5, 8, dtype=dtype, table_dtype=other)
    assert kernel(x, cos, sin).dtype == torch.float32
    checks.check_against_float64(
        lambda x: kernel(x, cos, sin), lambda x: run(x, cos, sin), [x],
        exact=lambda x: run(x, cos.double(), sin.double()),
    )  # fmt: skip


@pytest.mark.parametrize("function", [kernel, run])
def test_the_table_is_a_constant(function):
    x, cos, sin = problem((2, 2), (), 5, 8)
    for slope in checks.slopes_of(function, (1, 2))(x, cos, sin):
        assert (slope == 0).all()
    assert (checks.slopes_of(function, (0,))(x, cos, sin)[0] != 0).any()


def test_heads_swapped_with_tokens_and_features_apart():
    x, cos, sin = problem((2, 3), (), 5, 8)
    for view in (x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3), x.mT.contiguous().mT):
        assert not view.is_contiguous()
        got = kernel(view, cos.T.contiguous().T, sin)
        assert got.is_contiguous()
        torch.testing.assert_close(got, kernel(x, cos, sin), rtol=0, atol=0)
        slopes = [checks.slopes_of(kernel, (0,))(t, cos, sin)[0] for t in (view, x)]
        torch.testing.assert_close(*slopes, rtol=0, atol=0)


def test_nothing_to_rotate():
    x, cos, sin = problem((0, 3), (), 5, 8)
    assert kernel(x, cos, sin).shape == (0, 3, 5, 8)


@pytest.mark.parametrize("own", [(), (2, 1)])
def test_compiled(own):
    checks.check_compiled(kernel, problem((2, 3), own, 5, 8), (0,))


def test_vmap():
    x, cos, sin = problem((3, 4, 2), (4, 1), 5, 8)
    checks.check_vmap(kernel, [x, cos, sin], (0, None, None), (0,))
    checks.check_vmap(kernel, [x, cos, sin], (1, 0, 0), (0,))


def test_second_derivative():
    checks.check_second(kernel, run, problem((2, 3), (), 5, 8), (0,))


def test_the_kernels_backward_is_the_one_that_runs():
    from titanfunc_kernels import rotary

    x, cos, sin = problem((2, 3), (), 5, 8)
    checks.check_backward_that_runs(rotary, "rotate_backward", lambda x: kernel(x, cos, sin), [x], (0,))


def test_what_the_kernel_refuses():
    x, cos, sin = problem((2, 3), (), 5, 8)
    for tensors, message in [
        ((x.double(), cos, sin), "rotate: x: wanted float32 or bfloat16"),
        ((x, cos.half(), sin.half()), "rotate: cos: wanted float32 or bfloat16"),
        ((x, cos, sin.bfloat16()), "rotate: sin: wanted cos's shape and dtype"),
        ((x[0, 0, 0], cos, sin), r"rotate: x: wanted \[..., T, D\]"),
        ((x[..., :7], cos, sin), "rotate: x: wanted 2 to 2048 features, an even number"),
        ((x, cos[:4], sin[:4]), r"rotate: cos: wanted \[..., 5, 4\] to broadcast to x"),
        ((x, cos.expand(2, 5, 4), sin.expand(2, 5, 4)), "to broadcast to x"),
        ((x, cos.expand(1, 1, 1, 5, 4), sin.expand(1, 1, 1, 5, 4)), "to broadcast to x"),
        ((x.to("meta"), cos, sin), "rotate: cos: wanted a tensor on meta"),
        ((x.to("meta"), cos.to("meta"), sin.to("meta")), "rotate: x: wanted a CUDA tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel(*tensors)


def test_the_table_is_one_operation_to_a_compiler_and_maps_over_positions():
    positions = torch.arange(12, device=checks.DEVICE).reshape(3, 4)
    angles = positions.unsqueeze(-1) * 100.0 ** (-torch.arange(4, device=checks.DEVICE) / 4)

    def table(positions):
        return tuple(rotary_table(positions, 8, torch.float32, base=100.0))

    torch.testing.assert_close(table(positions), (angles.cos(), angles.sin()))
    assert all(map(torch.equal, torch.vmap(table)(positions), table(positions)))
    assert all(map(torch.equal, torch.compile(table, fullgraph=True, backend="aot_eager")(positions), table(positions)))
    traced = torch.fx.experimental.proxy_tensor.make_fx(table)(positions)
    assert not any(node.target == torch.ops.aten.cos.default for node in traced.graph.nodes)
