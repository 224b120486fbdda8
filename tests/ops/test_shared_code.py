"""Calls that share code: what they compute, how often they are traced and compiled, what they keep."""

from __future__ import annotations

import gc
import itertools
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from titanfunc import tree
from titanfunc.fullgraph import compile_function
from titanfunc.ops import shared_code
from titanfunc.ops.compile_ahead import Ahead
from titanfunc.ops.shared_code import share_code


class State(NamedTuple):
    total: Any
    position: Any


def layer(x, rest):
    """Results of several kinds: floats, whole numbers, None, a view, an argument as it was; silu's own derivative."""
    hidden = torch.nn.functional.silu(x @ rest["weight"].T) * rest["scale"]
    state = State(hidden.cumsum(0), rest["state"].position + 1)
    return hidden + x, {"state": state, "none": None, "turned": hidden.mT, "given": x}


def objective(function, depth=3):
    def value(weights, x, position):
        state, total = State(torch.zeros(()), position), 0.0
        for weight in weights:
            x, made = function(x, {"weight": weight, "state": state, "scale": 2})
            state, total = made["state"], total + made["turned"].sin().sum() + made["given"].square().sum()
        return total + state.total.sum() * state.position, x

    return torch.func.grad_and_value(value, (0, 1), has_aux=True)


def given(depth=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 6, generator=generator, dtype=dtype) / 3 for _ in range(depth)]
    return weights, torch.randn(4, 6, generator=generator, dtype=dtype), torch.tensor(2)


@pytest.fixture
def programs(monkeypatch):
    """The programs that are traced."""
    made = []
    original = shared_code._Program

    class Counted(original):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(shared_code, "_Program", Counted)
    return made


@pytest.mark.parametrize(
    ("backend", "recompute"),
    [("eager", False), ("eager", True), ("aot_eager", False), ("aot_eager", True), ("inductor", False)],
)
def test_a_compiled_function_computes_the_same_by_one_program(backend, recompute, programs):
    torch._dynamo.reset()
    shared = share_code(layer, recompute)
    got = compile_function(objective(shared), backend)(*given())
    want = objective(layer)(*given())
    assert tree.leaves(got)[0].shape == tree.leaves(want)[0].shape
    for ours, theirs in zip(tree.leaves(got), tree.leaves(want), strict=True):
        torch.testing.assert_close(ours, theirs)
    # The first call's state is not yet computed from weights, and has no gradient: another program.
    assert [program._wanted for program in programs] == [[0, 3], [0, 1, 3]]


def in_one_place(graph, _):
    """Compiles so that all results of a program are views into one memory."""

    def run(*tensors):
        results = graph(*tensors)
        starts = [0, *itertools.accumulate(-(-x.nbytes // 8) * 8 for x in results)]
        place = torch.UntypedStorage(starts[-1])
        return [
            torch.empty(0, dtype=x.dtype).set_(place, start // x.itemsize, x.shape, x.stride()).copy_(x)
            for x, start in zip(results, starts, strict=False)
        ]

    return run


@pytest.mark.parametrize("recompute", [False, True])
def test_results_that_a_compiler_puts_into_one_memory_are_right_at_every_call(recompute):
    torch._dynamo.reset()
    run = compile_function(objective(share_code(layer, recompute)), aot_autograd(fw_compiler=in_one_place))
    for scale in (1, 2):
        weights, x, position = given()
        got, want = (f(weights, x * scale, position) for f in (run, objective(layer)))
        for ours, theirs in zip(tree.leaves(got), tree.leaves(want), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_view_of_what_inductor_computes_inside_of_a_cat_is_copied_and_the_cat_is_not(rows, programs, monkeypatch):
    """Which torch refuses as the result of an operation: "may not alias any inputs ... or other returns"."""
    torch._dynamo.reset()

    def joined(x, rest):
        hidden = (x @ rest["weight"]).sin()
        return {"cat": torch.cat([rest["prefix"], hidden]), "part": hidden[:rows]}

    def slopes(function):
        def value(x, weight, prefix):
            made = function(x, {"weight": weight, "prefix": prefix})
            return made["cat"].square().sum() + made["part"].sum(), made

        return torch.func.grad(value, (0, 1, 2), has_aux=True)

    copied = []
    original = shared_code.Like.copy
    monkeypatch.setattr(shared_code.Like, "copy", lambda like, x: copied.append(x.shape) or original(like, x))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, 32, generator=generator) for size in (64, 32, 8)]
    run = compile_function(slopes(share_code(joined)))
    for _ in range(2):
        for ours, theirs in zip(tree.leaves(run(*tensors)), tree.leaves(slopes(joined)(*tensors)), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(programs) == 1 and copied == [(rows, 32)] * 2


def test_the_step_holds_an_operation_a_call_and_each_program_compiles_once(programs):
    torch._dynamo.reset()
    seen = []

    def compiler(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    shared = share_code(layer)
    compile_function(objective(shared), aot_autograd(fw_compiler=compiler))(*given(depth=5))
    step = next(names for names in seen if any("shared_code" in name for name in names))
    calls = [name for name in step if "shared_code" in name]
    assert len(calls) == 10 and sum("backward" in name for name in calls) == 5
    assert not any("silu" in name or "sigmoid" in name or "mm" in name for name in step)
    # The last call's state has no cotangent: a backward of its own.
    assert len(programs) == 2 and len(seen) == 1 + 2 + 3


def test_other_constants_shapes_and_dtypes_are_other_programs(programs):
    torch._dynamo.reset()
    shared = share_code(lambda x, rest: {"y": x * rest["scale"]})

    def values(x):
        return [shared(part, {"scale": scale})["y"] for part, scale in ((x, 2), (x, 3), (x[:1], 3), (x, 2.0))]

    for x in (torch.arange(3.0), torch.arange(3)):
        for y, want in zip(compile_function(values, "aot_eager")(x), values(x), strict=True):
            assert y.dtype == want.dtype and torch.equal(y, want)
    assert len(programs) == 8


def test_without_a_compiler_and_under_vmap_the_function_itself_runs(programs):
    shared = share_code(layer)
    for ours, theirs in zip(
        tree.leaves(objective(shared)(*given())), tree.leaves(objective(layer)(*given())), strict=True
    ):
        assert torch.equal(ours, theirs)
    weights, x, position = given()
    xs = torch.stack([x, 2 * x])
    mapped = [torch.func.vmap(objective(f), (None, 0, None)) for f in (shared, layer)]
    got, want = compile_function(mapped[0], "aot_eager")(weights, xs, position), mapped[1](weights, xs, position)
    for ours, theirs in zip(tree.leaves(got), tree.leaves(want), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not programs


def test_uncompiled_calls_go_to_what_stands_for_the_function():
    shared = share_code(lambda x, rest: x + 1, otherwise=lambda x, rest: x + 2)
    assert torch.equal(shared(torch.zeros(2), ()), torch.full((2,), 2.0))
    assert torch.equal(compile_function(lambda x: shared(x, ()), "aot_eager")(torch.zeros(2)), torch.ones(2))


def test_on_a_gpu_inductor_begins_elsewhere_and_is_waited_for_once(monkeypatch):
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    (place,) = graph.graph.find_nodes(op="placeholder")
    place.meta["val"] = SimpleNamespace(
        is_cuda=True, shape=(2,), stride=lambda: (1,), dtype=torch.float32, device="cuda"
    )
    done = []

    def ahead(graph, like):
        done.append(like)
        return Ahead(lambda: done.append("wait"), lambda: done.append("keep"))

    monkeypatch.setattr(shared_code, "compile_ahead", ahead)
    monkeypatch.setattr(shared_code, "compile_graph", lambda graph, tensors, backend: graph)
    compiled = shared_code._Compiled(graph, "inductor")
    assert done == [[((2,), (1,), torch.float32, "cuda")]]
    for _ in range(2):
        assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert done[1:] == ["wait", "keep"]


def test_what_is_kept_is_dense_and_in_memory_of_its_own(programs):
    """Views of one tensor are kept as that tensor; arguments are not kept again."""
    torch._dynamo.reset()

    def stretched(x, rest):
        hidden = torch.tanh(x @ rest["weight"])  # kept for tanh's derivative, and transposed for the product's
        return {"y": (hidden @ hidden.mT) @ x, "turned": hidden.mT}

    shared = share_code(stretched)

    def loss(x, weight):
        made = shared(x, {"weight": weight})
        return made["y"].square().sum() + made["turned"].sum()

    x, weight = torch.randn(5, 4), torch.randn(4, 4)
    got = compile_function(torch.func.grad(loss, (0, 1)), "aot_eager")(x, weight)
    want = torch.func.grad(
        lambda x, weight: sum(
            f(y) for f, y in zip((lambda y: y.square().sum(), torch.sum), stretched(x, {"weight": weight}).values(),
                                 strict=True)
        ), (0, 1)
    )(x, weight)  # fmt: skip
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    (program,) = programs
    kept = [each.shape for each in program._joint.kept]
    assert len(kept) <= 2 and (4, 5) not in kept


@pytest.mark.parametrize("function", [torch.sin, lambda x: 2 * (x @ torch.ones(3, 3)).tanh()])
def test_a_second_derivative_is_refused(function):
    """Also where the backward has nothing but what the forward kept, which does not say where it came from."""
    torch._dynamo.reset()
    shared = share_code(lambda x, rest: {"y": function(x)})
    slope = torch.func.grad(lambda x: shared(x, ())["y"].sum())
    curve = torch.func.grad(lambda x: slope(x).sum())
    with pytest.raises(Exception, match="second derivative"):
        compile_function(curve, "aot_eager")(torch.ones(3))


def test_a_derivative_around_another_one():
    """The inner one is not in z, but in a value that is computed from z."""
    torch._dynamo.reset()

    def outer(function):
        def inner(w, z):
            return (function(w, {"z": z * 2})["y"]).sum()

        return torch.func.grad(lambda z, w: torch.func.grad_and_value(inner)(w, z)[1])

    def product(w, rest):
        return {"y": w * rest["z"]}

    w, z = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    got = compile_function(outer(share_code(product)), "aot_eager")(z, w)
    torch.testing.assert_close(got, outer(product)(z, w))
    assert torch.equal(got, 2 * w)


def test_what_a_program_of_its_own_would_get_wrong_is_refused():
    torch._dynamo.reset()
    noisy = share_code(lambda x, rest: torch.nn.functional.dropout(x, 0.5), recompute=True)
    with pytest.raises(Exception, match="draws nothing at random"):
        compile_function(torch.func.grad(lambda x: noisy(x, ()).sum()), "aot_eager")(torch.ones(3))
    plain = share_code(lambda x, rest: x @ x)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="wanted no autocast"):
        compile_function(lambda x: plain(x, ()), "aot_eager")(torch.ones(3, 3))


def test_the_programs_of_a_function_that_is_gone_are_gone():
    torch._dynamo.reset()
    shared = share_code(layer)
    compile_function(objective(shared), "aot_eager")(*given())
    found = [cell.cell_contents for cell in shared.__closure__ if isinstance(cell.cell_contents, dict)]
    (made,) = [each for each in found if each]
    alive = [weakref.ref(compiled) for program in made.values() for compiled in program._compiled]
    assert len(alive) >= 4
    del shared, found, made
    torch._dynamo.reset()
    gc.collect()
    assert not any(reference() for reference in alive)


def test_an_error_in_the_function_comes_through():
    torch._dynamo.reset()

    def wrong(x, rest):
        raise ValueError("x: wanted something else")

    shared = share_code(wrong)
    with pytest.raises(Exception, match="wanted something else"):
        compile_function(lambda x: shared(x, ()), "aot_eager")(torch.ones(3))
