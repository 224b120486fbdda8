"""The binding of opaque operations, and the memory write through it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titanfunc import tree
from titanfunc.ops import memory_write
from titanfunc.ops._bind import bind


def _square(tensors, ints, floats):
    return [tensors[0] ** 2 * ints[0]]


def _empty(tensors, ints, floats):
    return [torch.empty_like(tensors[0])]


def _marked(tensors, outputs, cotangents, ints, floats):
    return [100.0 * tensors[0] * cotangents[0]]  # not the derivative: shows whose backward ran


def _true(tensors, outputs, cotangents, ints, floats):
    return [2.0 * ints[0] * tensors[0] * cotangents[0]]


marked = bind("test_marked", _square, _empty, _marked)
square = bind("test_square", _square, _empty, _true)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_backward_that_was_given_is_the_one_that_runs(compiled, mapped):
    def gradient(x):
        return torch.func.grad(lambda x: marked([x], [1], [])[0].sum())(x)

    function = torch.func.vmap(gradient) if mapped else gradient
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(function(x), 100 * x)


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_and_vmap(compiled):
    def gradient(x):
        return torch.func.grad(lambda x: (square([x], [3], [])[0] ** 2).sum())(x)

    def curvature(x):
        return torch.func.grad(lambda x: gradient(x).sum())(x)

    def both(x):
        return torch.func.vmap(gradient)(x), torch.func.vmap(curvature)(x)

    function = torch.compile(both, fullgraph=True, backend="aot_eager") if compiled else both
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    first, second = function(x)  # of 9 x^4
    torch.testing.assert_close(first, 36 * x**3)
    torch.testing.assert_close(second, 108 * x**2)


def test_operations_keep_torchs_own_rules():
    x = torch.randn(3, 4)
    torch.library.opcheck(torch.ops.titanfunc.test_square, ([x], [2], []))
    torch.library.opcheck(torch.ops.titanfunc.test_square_backward, ([x, x, x], [2, 1, 1], []))


def _gather(tensors, ints, floats):
    table, index = tensors
    return [floats[0] * table[index] ** 2, table.sum().reshape(1)]


def _gather_empty(tensors, ints, floats):
    table, index = tensors
    return [table.new_empty((*index.shape, *table.shape[1:])), table.new_empty(1)]


def _gather_backward(tensors, outputs, cotangents, ints, floats):
    table, index = tensors
    (given,) = cotangents  # the residual has none
    assert torch.equal(outputs[1], table.sum().reshape(1))
    return [torch.zeros_like(table).index_add(0, index, 2 * floats[0] * table[index] * given), index]


gather = bind(
    "test_gather", _gather, _gather_empty, _gather_backward,
    vmap="each", residuals=1, reference=lambda tensors, ints, floats: _gather(tensors, ints, floats)[:1],
)  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
def test_whole_numbers_residuals_a_vmap_of_single_calls_and_a_second_derivative_by_reference(compiled):
    table = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 6.0]], dtype=torch.float64)
    index = torch.tensor([[2, 0, 2], [1, 1, 1]])

    def plain(table, index):
        return (1.5 * table[index] ** 2).pow(2).sum()

    def bound(table, index):
        return gather([table, index], [], [1.5])[0].pow(2).sum()

    def results(loss):
        first = torch.func.grad(loss)
        second = torch.func.grad(lambda table, index: first(table, index).pow(2).sum())
        mapped = torch.func.vmap(first, (None, 0))
        return (
            first(table, index[0]),
            second(table, index[0]),
            mapped(table, index),
            torch.func.vmap(first, (1, None), 1)(table, index[0]),
        )

    run = (
        torch.compile(lambda: results(bound), fullgraph=True, backend="aot_eager")
        if compiled
        else lambda: results(bound)
    )
    for got, want in zip(run(), results(plain), strict=True):
        torch.testing.assert_close(got, want)


class _Made(TorchDispatchMode):
    """The sizes of all tensors that are made while it is on."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.sizes.update(t.numel() for t in tree.leaves(out) if isinstance(t, torch.Tensor))
        return out


def test_no_cotangent_of_a_residual_is_made():
    def forward(tensors, ints, floats):
        (x,) = tensors
        return [x * 3, x.repeat(11)]

    def backward(tensors, outputs, cotangents, ints, floats):
        return [3 * cotangents[0]]

    triple = bind("test_triple", forward, forward, backward, residuals=1)
    x = torch.randn(7)
    _, pull = torch.func.vjp(lambda x: triple([x], [], [])[0], x)
    with _Made() as made:
        (slope,) = pull(torch.ones(7))
    assert torch.equal(slope, torch.full((7,), 3.0)) and 7 in made.sizes and 77 not in made.sizes
    for used in (0, 1):  # an output that nothing is made of has a cotangent of zeros
        both = bind(f"test_both_{used}", lambda t, i, f: [t[0] * 2, t[0] * 5, t[0] + 0], lambda t, i, f: [t[0] + 0] * 3,
                    lambda t, o, c, i, f: [2 * c[0] + 5 * c[1]], residuals=1)  # fmt: skip
        (slope,) = torch.func.vjp(lambda x, f=both, used=used: f([x], [], [])[used], x)[1](torch.ones(7))
        assert torch.equal(slope, torch.full((7,), (2.0, 5.0)[used]))


def test_a_third_derivative_is_refused():
    def slope(f):
        return torch.func.grad(lambda x: f(x).sum())

    with pytest.raises(RuntimeError, match="third derivatives are not offered"):
        slope(slope(slope(lambda x: square([x], [1], [])[0])))(torch.ones(2))


@pytest.mark.parametrize(  # every pair of values in some case
    ("depth", "clip", "bias"),
    [(1, 0.0, True), (1, 0.7, False), (2, 0.0, False), (2, 0.7, True), (3, 0.0, False), (3, 0.7, True)],
)
def test_memory_write_gradients(depth, clip, bias):
    torch.manual_seed(0)
    batch, heads, chunks, tokens, dim, hidden = 2, 1, 3, 2, 3, 4

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    sizes = [dim, *[hidden] * (depth - 1), dim]
    weights = [0.4 * draw(batch, heads, sizes[i], sizes[i + 1]) for i in range(depth)]
    if bias:
        weights += [0.1 * draw(batch, heads, sizes[i + 1]) for i in range(depth)]
    momentum, anchor = [0.1 * draw(*w.shape) for w in weights], [0.4 * draw(*w.shape) for w in weights]
    rows = [draw(batch, heads, chunks, tokens, dim) for _ in range(2)]
    rates = [0.3 * draw(batch, heads, chunks, tokens).abs() for _ in range(3)]
    factors = [draw(batch, heads, chunks).abs() for _ in range(3)]
    refresh = (torch.rand(batch, heads, chunks) > 0.4).double()
    tensors = [t.requires_grad_() for t in [*weights, *momentum, *anchor, *rows, *rates, *factors]]
    count = len(weights)

    def write(*tensors):
        lists = [tensors[i * count : (i + 1) * count] for i in range(3)]
        written = memory_write.memory_write(*lists, *tensors[3 * count :], refresh, depth=depth, clip=clip)
        return (*written.weights, *written.momentum, *written.anchor, *written.inputs, *written.errors, written.loss)

    assert torch.autograd.gradcheck(write, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(write, tensors, fast_mode=True)


def test_memory_write_compiled_equals_eager_at_both_orders():
    torch.manual_seed(0)
    shape = (2, 1, 2, 3, 4)

    def draw(*shape):
        return 0.5 * torch.randn(*shape)

    weights = [draw(2, 1, 4, 5), draw(2, 1, 5, 4)]
    rates = [draw(*shape[:-1]).abs() for _ in range(3)]
    factors = [draw(*shape[:3]).abs() for _ in range(3)]

    def loss(k, v):
        written = memory_write.memory_write(
            weights, weights, weights, k, v, *rates, *factors, torch.ones(shape[:3]), depth=2, clip=0.5
        )
        return sum(w.square().sum() for w in written.weights)

    def gradients(k, v):
        first = torch.func.grad(loss)(k, v)
        return first, torch.func.grad(lambda k: torch.func.grad(loss)(k, v).square().sum())(k)

    k, v = draw(*shape), draw(*shape)
    compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(k, v), gradients(k, v), strict=True):
        torch.testing.assert_close(got, want)
