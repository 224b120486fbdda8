"""What is computed again: the same derivatives of every order, a graph that computes twice and keeps less."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.backends.common

from tests.graph_memory import count, graph_of, peak
from titanfunc import tree
from titanfunc.ops import rematerialize as module
from titanfunc.ops.barrier import barrier
from titanfunc.ops.rematerialize import rematerialize

WIDE = {"rtol": 1e-12, "atol": 1e-10}


class State(NamedTuple):
    total: Any
    position: Any


def layer(x, rest):
    """Results with a tree of dicts and NamedTuples, whole numbers, None, and an argument as it was."""
    hidden = torch.tanh(x @ rest["weight"]) * rest["scale"]
    state = State(hidden.cumsum(0), rest["state"].position + 1)
    return hidden + x, {"state": state, "none": None, "given": (x, x)}


again = rematerialize(layer)


def objective(function):
    def value(weight, x, position):
        rest = {"weight": weight, "state": State((), position), "scale": 2}
        y, first = function(x, rest)
        y, second = function(y, {**rest, "weight": 2 * weight, "state": first["state"]})
        used = second["given"][0].sum() * second["given"][1].sin().sum() * second["state"].position.sum()
        return (y**2).sum() + first["state"].total.sin().sum() + used

    return value


def gradient(function):
    return torch.func.grad(objective(function), argnums=(0, 1))


def curvature(function):
    return torch.func.grad(lambda *args: sum((part**2).sum() for part in gradient(function)(*args)), argnums=(0, 1))


def each(function):
    return torch.func.vmap(gradient(function), (None, 0, None))


def each_curvature(function):
    return torch.func.vmap(curvature(function), (None, 0, None))


def of_all(function):
    total = torch.func.vmap(objective(function), (None, 0, None))
    return torch.func.grad(lambda *args: total(*args).sum(), argnums=(0, 1))


TRANSFORMED = (gradient, curvature, each, each_curvature, of_all)


def arguments(mapped):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*([3] if mapped else []), 5, 4, generator=draw, dtype=torch.float64)
    return torch.randn(4, 4, generator=draw, dtype=torch.float64), x, torch.arange(3)


@pytest.mark.parametrize(
    ("transformed", "backend"),
    [*((each, backend) for each in TRANSFORMED for backend in (None, "aot_eager")), (of_all, "inductor")],
)
def test_derivatives_are_the_functions_own(transformed, backend):
    given = arguments(transformed not in (gradient, curvature))
    want, function = transformed(layer)(*given), transformed(again)
    if backend:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend=backend)
    for ours, theirs in zip(function(*given), want, strict=True):
        torch.testing.assert_close(ours, theirs, **WIDE)
        if backend is None and transformed in (gradient, each, of_all):
            assert torch.equal(ours, theirs)  # the same operations in the same order


def test_under_backward_only_the_arguments_are_kept():
    weight, x, position = arguments(False)
    found = []
    for function in (layer, again):
        kept = []
        leaf = weight.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = function(x, {"weight": leaf, "state": State((), position), "scale": 2})[0]
        y.sum().backward()
        found.append((leaf.grad, {t.data_ptr() for t in kept}, {t.data_ptr() for t in (x, leaf, position)}))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1] == found[1][2] and not found[0][1] <= found[0][2]


def deep(function, layers=8):
    def value(weights, x):
        for weight in weights:
            x = function(x, weight)
        return (x**2).sum()

    return torch.func.grad(value)


def wide_layer(x, weight):
    for _ in range(6):
        x = torch.sin(x @ weight)
    return x


def test_a_graph_computes_twice_and_keeps_only_what_goes_in(monkeypatch):
    weights, x = tuple(0.3 * torch.ones(4, 4) + i for i in range(8)), torch.ones(512, 4)
    plain, ours = graph_of(deep(wide_layer), weights, x), graph_of(deep(rematerialize(wide_layer)), weights, x)
    size = x.numel() * x.element_size()
    assert (count(plain, "titanfunc.barrier"), count(ours, "titanfunc.barrier")) == (0, 8)
    assert (count(plain, "aten.sin"), count(ours, "aten.sin")) == (48, 48 + 8 * 5)
    # (a layer's last sine is not asked for again, its argument is)
    assert count(ours, "aten.mm") == count(plain, "aten.mm") + 48
    # A layer keeps 6 sines' arguments and 6 products' where it is not computed again, and else its input.
    assert peak(plain) >= 90 * size
    assert peak(ours) <= (8 + 12 + 6) * size
    # Without the barrier what is computed again is what was computed before, and nothing is saved.
    monkeypatch.setattr(module, "barrier", lambda values, after: values)
    merged = graph_of(deep(rematerialize(wide_layer)), weights, x)
    assert count(merged, "aten.sin") == 48 and peak(merged) >= 90 * size


def test_dynamo_does_not_differentiate_through_it():
    seen = []

    def record(graph, inputs):
        seen.append(graph.graph)
        return graph.forward

    torch._dynamo.reset()
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record)
    given = arguments(False)
    torch.compile(gradient(again), fullgraph=True, backend=backend)(*given)
    assert len(seen) == 1
    assert count(seen[0], "titanfunc.barrier") == 2 and count(seen[0], "aten.tanh.default") == 4


def test_nothing_to_pull_back_is_no_work():
    calls = []

    def counted(x, rest):
        calls.append(1)
        return x * rest, x.detach()

    leaf = torch.ones(3, requires_grad=True)
    rematerialize(counted)(leaf, 2)[0].sum().backward()
    assert torch.equal(leaf.grad, torch.full((3,), 2.0)) and len(calls) == 2
    assert tree.leaves(torch.func.grad(lambda x: rematerialize(counted)(x, 2)[1].sum())(torch.ones(3)))[0].sum() == 0


def test_a_barrier_copies_and_has_the_derivative_of_what_it_copies():
    x, n = torch.arange(6.0).reshape(2, 3).mT, torch.arange(2)
    copy, number = barrier([x, n], [torch.ones(1)])
    assert torch.equal(copy, x) and torch.equal(number, n) and copy.data_ptr() != x.data_ptr()

    def value(x, after):
        return (barrier([x], [after])[0] ** 3).sum()

    by_x, by_after = torch.func.grad(value, argnums=(0, 1))(x, x)
    assert torch.equal(by_x, 3 * x**2) and not by_after.any()
    second = torch.func.grad(lambda x: torch.func.grad(value)(x, x).sum())
    torch.testing.assert_close(second(x), 6 * x)
    torch.testing.assert_close(torch.func.vmap(second, 1, 1)(x), 6 * x)
    mapped = torch.func.vmap(lambda x, after: barrier([x], [after])[0], (1, None), 1)(x, n)
    assert torch.equal(mapped, x)
    torch.library.opcheck(torch.ops.titanfunc.barrier.default, ([x, n], [n]))
