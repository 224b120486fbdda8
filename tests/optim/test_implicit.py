"""Derivatives by the implicit function theorem: against closed forms, finite differences and each other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

from titanfunc import tree
from titanfunc.fullgraph import compile_function
from titanfunc.optim.implicit import (
    conjugate_gradient,
    fixed_point,
    implicit_root,
    neumann,
    normal_conjugate_gradient,
)

ROWS, DIM = 12, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, PROBE = draw(ROWS, DIM), draw(ROWS, seed=1), draw(DIM, seed=2)


def ridge_objective(w, x, y, penalty):
    return 0.5 * ((x @ w - y) ** 2).sum() + 0.5 * (penalty.exp() * w**2).sum()


def solve_ridge(w, x, y, penalty):
    """In closed form; nothing of it is seen by a derivative."""
    return torch.linalg.solve(x.T @ x + torch.diag(penalty.exp().expand(DIM)), x.T @ y)


ridge = implicit_root(grad(ridge_objective), solve=partial(conjugate_gradient, steps=8, tolerance=1e-14))(solve_ridge)


def outer(solver):
    """A scalar of the solution: a function of all that the solver is given."""
    return lambda *args: torch.sin(solver(torch.zeros(DIM, dtype=torch.float64), *args) @ PROBE)


PENALTIES = {"one": torch.tensor(-0.3, dtype=torch.float64), "each": 0.3 * draw(DIM, seed=3)}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_ridge_hypergradient_is_the_closed_forms(penalty):
    args = (X, Y, penalty)
    found = grad(outer(ridge), argnums=(0, 1, 2))(*args)
    wanted = grad(outer(solve_ridge), argnums=(0, 1, 2))(*args)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(outer(ridge)(*args), outer(solve_ridge)(*args), rtol=0, atol=0)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_second_derivatives_are_the_closed_forms(penalty):
    found = torch.func.hessian(lambda p: outer(ridge)(X, Y, p))(penalty)
    wanted = torch.func.hessian(lambda p: outer(solve_ridge)(X, Y, p))(penalty)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)
    backwards = torch.func.jacrev(torch.func.jacrev(lambda p: outer(ridge)(X, Y, p)))(penalty)
    torch.testing.assert_close(backwards, wanted, rtol=1e-8, atol=1e-12)


def test_finite_differences_and_plain_autograd():
    args = [leaf.clone().requires_grad_() for leaf in (X, Y, PENALTIES["each"])]
    assert torch.autograd.gradcheck(outer(ridge), args, check_forward_ad=True, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(outer(ridge), args, rtol=1e-5, atol=1e-7)


def test_forwards_and_backwards_agree():
    args, zeros = (X, Y, PENALTIES["each"]), torch.zeros(DIM, dtype=torch.float64)
    tangents = tuple(draw(*leaf.shape, seed=7 + i) for i, leaf in enumerate(args))
    cotangent = draw(DIM, seed=11)
    value, forwards = jvp(partial(ridge, zeros), args, tangents)
    same, pull = vjp(partial(ridge, zeros), *args)
    backwards = sum((a * b).sum() for a, b in zip(pull(cotangent), tangents, strict=True))
    torch.testing.assert_close(forwards @ cotangent, backwards, rtol=1e-10, atol=0)
    assert torch.equal(value, same)


def test_under_vmap_in_either_order():
    ys, penalties = draw(4, ROWS, seed=5), 0.3 * draw(4, seed=6)
    of_one = grad(outer(ridge), argnums=(0, 1, 2))
    wanted = [
        torch.stack(each) for each in zip(*[of_one(X, y, p) for y, p in zip(ys, penalties, strict=True)], strict=True)
    ]
    for mine, theirs in zip(vmap(of_one, in_dims=(None, 0, 0))(X, ys, penalties), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    total = grad(lambda y, p: vmap(outer(ridge), in_dims=(None, 0, 0))(X, y, p).sum(), argnums=(0, 1))
    for mine, theirs in zip(total(ys, penalties), wanted[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    forwards = vmap(lambda p: jvp(lambda p: outer(ridge)(X, Y, p), (p,), (torch.ones_like(p),))[1])(penalties)
    one = torch.stack([grad(lambda p: outer(ridge)(X, Y, p))(p) for p in penalties])
    torch.testing.assert_close(forwards, one, rtol=1e-9, atol=1e-12)


def test_the_initial_point_has_no_gradient_and_the_iterations_none_either():
    def descend(w, x, y, penalty):
        for _ in range(600):
            w = w - 0.03 * grad(ridge_objective)(w, x, y, penalty)
        return w

    solver = implicit_root(grad(ridge_objective))(descend)
    initial = draw(DIM, seed=9)
    of_initial, of_penalty = grad(lambda w, p: solver(w, X, Y, p) @ PROBE, argnums=(0, 1))(initial, PENALTIES["each"])
    assert torch.equal(of_initial, torch.zeros_like(initial))
    wanted = grad(lambda p: solve_ridge(initial, X, Y, p) @ PROBE)(PENALTIES["each"])
    torch.testing.assert_close(of_penalty, wanted, rtol=1e-8, atol=1e-12)

    wrong = implicit_root(grad(ridge_objective))(lambda w, x, y, penalty: w + 0 * penalty.sum())
    away = grad(lambda p: wrong(initial, X, Y, p) @ PROBE)(PENALTIES["each"])
    assert away.abs().min() > 0 and not torch.allclose(away, wanted)  # of the conditions at w, whatever made it


def contraction(x, params):
    """Not symmetric; a fixed point of nested dicts, their keys out of order."""
    mixed = torch.tanh(params["m"] @ x["z"] + params["bias"]["c"])
    return {"z": 0.5 * mixed + 0.1 * x["inner"]["a"].sum(), "inner": {"a": 0.2 * x["z"][:2] * params["gain"]}}


PARAMS = {"m": 0.4 * draw(3, 3, seed=20), "bias": {"c": draw(3, seed=21)}, "gain": draw(2, seed=22)}
START = {"z": torch.zeros(3, dtype=torch.float64), "inner": {"a": torch.zeros(2, dtype=torch.float64)}}


def iterate(x, params, steps=80):
    for _ in range(steps):
        x = contraction(x, params)
    return x


def weigh(x):
    return (x["z"] ** 3).sum() + x["inner"]["a"] @ torch.tensor([1.0, -2.0], dtype=torch.float64)


SOLVES = {
    "neumann": partial(neumann, terms=60),
    "normal conjugate gradient": partial(normal_conjugate_gradient, steps=12, tolerance=0.0),
}


@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
def test_a_fixed_point_that_is_not_symmetric_over_nested_dicts(solve):
    solver = fixed_point(contraction, solve=solve)(iterate)
    found = grad(lambda params: weigh(solver(START, params)))(PARAMS)
    wanted = grad(lambda params: weigh(iterate(START, params)))(PARAMS)  # through all iterations
    for name, leaf in tree.named_leaves(wanted).items():
        torch.testing.assert_close(tree.named_leaves(found)[name], leaf, rtol=1e-8, atol=1e-12)
    tangents = tree.map(torch.ones_like, PARAMS)
    forwards = jvp(lambda params: weigh(solver(START, params)), (PARAMS,), (tangents,))[1]
    torch.testing.assert_close(forwards, sum(leaf.sum() for leaf in tree.leaves(wanted)), rtol=1e-8, atol=0)
    assert list(solver(START, PARAMS)) == ["z", "inner"]  # the solver's own order


def test_linear_solvers_on_one_system():
    a = draw(DIM, 4 * DIM)
    spd = 0.3 * torch.eye(DIM, dtype=torch.float64) + a @ a.T / (8 * DIM)
    b = {"y": draw(DIM, seed=1), "x": draw(2, seed=2)}

    def matvec(v):
        return {"x": 0.7 * v["x"], "y": spd @ v["y"]}

    wanted = {"y": torch.linalg.solve(spd, b["y"]), "x": b["x"] / 0.7}
    for found in (
        conjugate_gradient(matvec, b, steps=12, tolerance=1e-15),
        normal_conjugate_gradient(matvec, b, steps=12, tolerance=0.0),
        neumann(matvec, b, terms=400, scale=0.9),
        tree.scale(conjugate_gradient(lambda v: tree.scale(matvec(v), -1), b, steps=12), -1),
    ):
        for name, leaf in wanted.items():
            torch.testing.assert_close(found[name], leaf, rtol=1e-7, atol=1e-9)


def test_conjugate_gradient_stops_where_it_is_good_enough():
    spd = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    b = torch.ones(4, dtype=torch.float64)
    rough = conjugate_gradient(lambda v: spd @ v, b, steps=30, tolerance=0.3)
    assert torch.equal(rough, conjugate_gradient(lambda v: spd @ v, b, steps=3, tolerance=0.3))
    assert 1e-3 < (spd @ rough - b).norm() / b.norm() <= 0.3
    for nothing in (torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)):
        assert torch.equal(conjugate_gradient(lambda v: 2 * v, nothing), nothing)
    many = conjugate_gradient(lambda v: v * torch.arange(1.0, 5.0), torch.ones(4), steps=50, tolerance=0.0)
    torch.testing.assert_close(many, 1 / torch.arange(1.0, 5.0))  # finite, long after the last digit


FIXED = fixed_point(contraction)(iterate)


def ridge_loss(penalty, x, y):
    return ridge(torch.zeros_like(x[0]), x, y, penalty).sin().sum()


COMPILED = {
    "grad": lambda p, x, y, *rest: grad(ridge_loss)(p, x, y),
    "grad of nested dicts": lambda p, x, y, start, params: grad(
        lambda m: tree.global_norm(FIXED(start, {**params, "m": m}))
    )(params["m"]),
    "grad of grad": lambda p, x, y, *rest: grad(lambda p: grad(ridge_loss)(p, x, y).square().sum())(p),
    "jvp": lambda p, x, y, *rest: jvp(lambda p: ridge_loss(p, x, y), (p,), (torch.ones_like(p),))[1],
    "vmap of grad": lambda p, x, y, *rest: vmap(grad(ridge_loss), in_dims=(0, None, None))(p, x, y),
}


def as_a_step_is_compiled(function):
    return compile_function(function, "aot_eager")


@pytest.mark.parametrize(
    "compiler",
    [partial(torch.compile, fullgraph=True, backend="aot_eager"), as_a_step_is_compiled],
    ids=["Dynamo", "own"],
)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_as_one_graph_equals_eager(name, compiler):
    torch._dynamo.reset()
    args = PENALTIES["each"], X, Y, START, PARAMS
    found, wanted = compiler(COMPILED[name])(*args), COMPILED[name](*args)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_whole_numbers_and_constants_among_the_arguments():
    def centre(x, data, index, settings):
        return x - settings["scale"] * data[index].mean(0)

    solver = implicit_root(centre)(lambda x, data, index, settings: settings["scale"] * data[index].mean(0))
    data, index = draw(6, 2), torch.tensor([[0, 1], [3, 3]])

    def loss(data, index):
        return solver(torch.zeros(2, dtype=torch.float64), data, index, {"scale": 3.0, "name": None}).sum()

    wanted = torch.zeros(2, 6, 2, dtype=torch.float64)
    wanted[0, :2], wanted[1, 3] = 1.5, 3.0
    torch.testing.assert_close(vmap(grad(loss), in_dims=(None, 0))(data, index), wanted)
    tangent = jvp(lambda data: loss(data, index[0]), (data,), (torch.ones_like(data),))[1]
    assert tangent.item() == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conjugate_gradient(lambda v: v, torch.ones(2), steps=0), "steps: wanted at least 1, got 0"),
        (lambda: conjugate_gradient(lambda v: v, torch.ones(2), tolerance=-1.0), "tolerance: wanted 0 or a positive"),
        (lambda: neumann(lambda v: v, torch.ones(2), terms=0), "terms: wanted at least 1, got 0"),
        (lambda: neumann(lambda v: v, torch.ones(2), scale=0.0), "scale: wanted a number other than 0, got 0"),
        (lambda: misshapen(lambda x, a: x.sum()), r"optimality: wanted the solution's leaves, as torch.float32 \[2\]"),
        (lambda: misshapen(lambda x, a: {"x": x}), r"optimality: wanted the solution's structure"),
        (lambda: misshapen(lambda x, a: x, torch.tensor([1, 2])), r"solver: wanted floating tensors, got torch.int64"),
        (lambda: misshapen(lambda x, a: x, 1.0), r"solver: wanted floating tensors, got <class 'float'>"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def misshapen(optimality, solution=None):
    solution = torch.ones(2) if solution is None else solution
    solver = implicit_root(optimality)(lambda x, a: solution)
    return grad(lambda a: solver(torch.ones(2), a).sum())(torch.ones(2))
