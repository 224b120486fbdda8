"""Derivatives of a solver's result by the implicit function theorem: none is taken of the solver's own iterations.

Letters: F the optimality conditions, x their root, a the arguments, A = dF/dx at the root, v a cotangent of x.

F(x(a), a) = 0 gives A dx/da = -dF/da. Backwards that is one linear system, A^T u = v, and then -u^T dF/da; forwards
it is A dx = -(dF/da) da. Both need products with A and A^T alone (jvp and vjp), never A itself. The systems' own
solutions are implicit roots again, so that derivatives of any order exist. Blondel et al., arXiv 2105.15183.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.fullgraph import plain

Tree = Any
MatVec = Callable[[Tree], Tree]
Solve = Callable[[MatVec, Tree], Tree]
Leaves = tuple[Tensor, ...]


def conjugate_gradient(matvec: MatVec, b: Tree, *, steps: int = 32, tolerance: float = 1e-8) -> Tree:
    """x with ``matvec(x) = b`` for a symmetric positive (or negative) definite ``matvec``; x and b of any one shape.

    From x = 0, exact after as many steps as A has distinct eigenvalues. All ``steps`` are in the graph and nothing is
    read; once |b - A x| <= tolerance |b|, x stays as it is. Raises ValueError for values out of range.
    Hestenes & Stiefel 1952.
    """
    _require_whole(steps, "steps")
    if tolerance < 0:
        raise ValueError(f"tolerance: wanted 0 or a positive number, got {tolerance}")
    x, residual, direction = tree.zeros_like(b), b, b
    square = _dot(residual, residual)
    enough = tolerance**2 * square
    for _ in range(steps):
        product = matvec(direction)
        curvature = _dot(direction, product)
        going = (square > enough) & (curvature != 0)
        length = torch.where(going, square / torch.where(going, curvature, 1), 0)
        x = _add_scaled(x, length, direction)
        residual = _add_scaled(residual, -length, product)
        new = _dot(residual, residual)
        momentum = torch.where(going, new / torch.where(going, square, 1), 0)
        direction = tree.where(going, _add_scaled(residual, momentum, direction), direction)
        square = new
    return x


def normal_conjugate_gradient(matvec: MatVec, b: Tree, *, steps: int = 32, tolerance: float = 1e-8) -> Tree:
    """x with ``matvec(x) = b`` for any invertible linear ``matvec``; x and b of any one shape.

    Conjugate gradients on A^T A x = A^T b, whose condition number is that of A squared. Raises ValueError as those do.
    """

    def product(x: Tree) -> Tree:
        return tree.map(lambda _, leaf: leaf, b, matvec(x))  # torch minds the order of dict keys: always b's

    transposed = torch.func.vjp(product, b)[1]
    return conjugate_gradient(lambda x: transposed(product(x))[0], transposed(b)[0], steps=steps, tolerance=tolerance)


def neumann(matvec: MatVec, b: Tree, *, terms: int = 32, scale: float = 1.0) -> Tree:
    """x with ``matvec(x) = b`` by ``terms`` terms of scale * sum_i (I - scale A)^i b; x and b of any one shape.

    It converges where I - scale A contracts: for a ``fixed_point`` of a contraction with scale 1, else with a scale
    below 2 / (the largest eigenvalue of A). Raises ValueError for values out of range. Lorraine et al., 1911.02590.
    """
    _require_whole(terms, "terms")
    if scale == 0:
        raise ValueError("scale: wanted a number other than 0, got 0")
    term = total = b
    for _ in range(terms - 1):
        term = _add_scaled(term, -scale, matvec(term))
        total = tree.add(total, term)
    return tree.scale(total, scale)


def implicit_root(
    optimality: Callable[..., Tree], *, solve: Solve = conjugate_gradient
) -> Callable[[Callable[..., Tree]], Callable[..., Tree]]:
    """A decorator for ``solver(initial, *args) -> x``: the result has the derivatives of a root of ``optimality``.

    optimality: ``(x, *args) -> `` zeros of x's structure and shapes at the solution; for a minimum, the objective's
    gradient. x and args are pytrees with leaves of any shapes; floating ones among args have derivatives, ``initial``
    has none, and neither has a tensor that the functions close over. solve: ``(matvec, b) -> x``, which fits A:
    ``conjugate_gradient`` for a minimum, ``normal_conjugate_gradient`` or ``neumann`` for what is not symmetric;
    its settings by ``functools.partial``. The derivatives are as exact as the solver's result and ``solve`` are.

    Right under torch.func's grad, vjp, jvp and vmap in any order, and in a compiled graph, where the decorator itself
    belongs outside of what is compiled. Raises ValueError for a solution with leaves that are not floating, and, when
    differentiated, an ``optimality`` of another structure, shape or dtype. Blondel et al., arXiv 2105.15183.

    >>> mean = implicit_root(lambda x, data: x - data.mean())(lambda initial, data: data.mean())
    >>> torch.func.grad(lambda data: mean(torch.zeros(()), data))(torch.ones(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    @torch.compiler.allow_in_graph  # Dynamo would differentiate the Function's forward, which is constant
    def attach(places: Tree, x: Tree, args: Tree) -> Leaves:
        leaves = _attach(optimality, solve, plain(x), plain(args))
        by_place = dict(zip(tree.leaves(plain(places)), leaves, strict=True))
        return tuple(by_place[place] for place in range(len(leaves)))

    def decorate(solver: Callable[..., Tree]) -> Callable[..., Tree]:
        @functools.wraps(solver)
        def solved(initial: Tree, *args: Tree) -> Tree:
            found = _constant(solver(_constant(initial), *_constant(args)))
            for leaf in tree.leaves(found):
                if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                    raise ValueError(f"solver: wanted floating tensors, got {getattr(leaf, 'dtype', type(leaf))}")
            numbers = itertools.count()
            places = tree.map(lambda leaf: next(numbers), found)  # Dynamo's order of leaves need not be optree's
            leaves = attach(places, found, args)
            return tree.map(lambda place: leaves[place], places)

        return solved

    return decorate


def fixed_point(
    step: Callable[..., Tree], *, solve: Solve = neumann
) -> Callable[[Callable[..., Tree]], Callable[..., Tree]]:
    """``implicit_root`` of x - step(x, *args), for solvers of x = step(x, *args); x of any structure and shapes.

    The Neumann series converges where ``step`` contracts, as fast as iterating it does. Bai et al., arXiv 1909.01377.
    """
    return implicit_root(lambda x, *args: tree.map(torch.sub, x, step(x, *args)), solve=solve)


class _Problem:
    """The conditions at a solution as functions of tuples: x's leaves, and the tensors among the arguments' leaves."""

    def __init__(self, optimality: Callable[..., Tree], solve: Solve, x: Tree, args: Tree) -> None:
        leaves, self._args = optree.tree_flatten(args)
        self._structure, self._optimality, self._solve = optree.tree_structure(x), optimality, solve
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.count = self._structure.num_leaves
        self.tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def pull(self, x: Leaves, tensors: Leaves, cotangents: Leaves) -> list[Tensor | None]:
        """-u^T dF/da with A^T u = v, for every tensor; None for one of whole numbers."""

        def product(u: Leaves, x: Leaves, tensors: Leaves) -> Leaves:
            return torch.func.vjp(lambda x: self._residual(x, tensors), x)[1](u)[0]

        u = self._linear(product, cotangents, x, tensors)
        found = iter(
            torch.func.vjp(lambda moving: self._residual(x, _join(tensors, moving)), _moving(tensors))[1](u)[0]
        )
        return [-next(found) if leaf.is_floating_point() else None for leaf in tensors]

    def push(self, x: Leaves, tensors: Leaves, tangents: Leaves) -> Leaves:
        """dx with A dx = -(dF/da) da; tangents: of every floating tensor."""

        def product(dx: Leaves, x: Leaves, tensors: Leaves) -> Leaves:
            return _jvp(lambda x: self._residual(x, tensors), x, dx)

        right = _jvp(lambda moving: self._residual(x, _join(tensors, moving)), _moving(tensors), tangents)
        return self._linear(product, tuple(-leaf for leaf in right), x, tensors)

    def _residual(self, x: Leaves, tensors: Leaves) -> Leaves:
        given = iter(tensors)
        leaves = [next(given) if yes else held for yes, held in zip(self._is_tensor, self._constants, strict=True)]
        result = self._optimality(self._tree(x), *optree.tree_unflatten(self._args, leaves))
        found, structure = optree.tree_flatten(result)
        if structure != self._structure:
            raise ValueError(f"optimality: wanted the solution's structure {self._structure}, got {structure}")
        for leaf, wanted in zip(found, x, strict=True):
            if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
                raise ValueError(f"optimality: wanted the solution's leaves, as {_told(wanted)}, got {_told(leaf)}")
        return tuple(found)

    def _linear(self, product: Callable[..., Leaves], b: Leaves, *operands: Leaves) -> Leaves:
        """The solution of product(., *operands) = b, with derivatives by b and operands as an implicit root's."""
        known = _constant(operands)
        solution = self._by_leaves(lambda u: product(u, *known), _constant(b))
        return _attach(
            lambda u, b, *operands: tree.map(torch.sub, product(u, *operands), b),
            self._by_leaves,
            solution,
            (b, *operands),
        )

    def _by_leaves(self, matvec: Callable[[Leaves], Leaves], b: Leaves) -> Leaves:
        """``solve``, which knows the solution's tree, for leaves."""
        found = self._solve(lambda u: self._tree(matvec(tuple(tree.leaves(u)))), self._tree(b))
        return tuple(tree.leaves(found))

    def _tree(self, leaves: Leaves) -> Tree:
        return optree.tree_unflatten(self._structure, leaves)


class _Root(torch.autograd.Function):
    """(problem, x's leaves, tensors) -> x's leaves, as a function of the tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(problem: _Problem, *leaves: Tensor) -> Leaves:
        return tuple(leaf.clone() for leaf in leaves[: problem.count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Leaves) -> None:
        ctx.problem, *leaves = inputs
        # The output, not the input: at higher orders it is a function of the tensors, too.
        kept = (*output, *leaves[len(output) :])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        count = len(cotangents)
        x, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        return None, *[None] * count, *ctx.problem.pull(x, tensors, cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        count = ctx.problem.count
        x, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        moving = tuple(
            torch.zeros_like(leaf) if tangent is None else tangent
            for leaf, tangent in zip(tensors, tangents[count:], strict=True)
            if leaf.is_floating_point()
        )
        return ctx.problem.push(x, tensors, moving)


def _attach(optimality: Callable[..., Tree], solve: Solve, x: Tree, args: Tree) -> Leaves:
    """x's leaves with the derivatives of a root."""
    problem = _Problem(optimality, solve, x, args)
    return _Root.apply(problem, *tree.leaves(x), *problem.tensors)


def _constant(values: Tree) -> Tree:
    """The values without derivatives, of any order and direction."""
    return tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, values)


def _jvp(function: Callable[[Leaves], Leaves], primals: Leaves, tangents: Leaves) -> Leaves:
    """By two vjps: torch has no forward mode inside of a compiled forward mode (2.13)."""
    found = torch.func.vjp(function, primals)
    return torch.func.vjp(lambda u: found[1](u)[0], found[0])[1](tangents)[0]


def _moving(tensors: Leaves) -> Leaves:
    return tuple(leaf for leaf in tensors if leaf.is_floating_point())


def _join(tensors: Leaves, moving: Leaves) -> Leaves:
    """The tensors with their floating ones replaced."""
    new = iter(moving)
    return tuple(next(new) if leaf.is_floating_point() else leaf for leaf in tensors)


def _dot(left: Tree, right: Tree) -> Tensor:
    """Over all leaves; 0-d, in float32 or more."""
    wide = tree.map(lambda a: a.to(torch.promote_types(a.dtype, torch.float32)), (left, right))
    return torch.stack([leaf.sum() for leaf in tree.leaves(tree.map(torch.mul, *wide))]).sum()


def _add_scaled(left: Tree, factor: Tensor | float, right: Tree) -> Tree:
    return tree.map(lambda a, b: a + (factor * b).to(a.dtype), left, right)


def _told(leaf: Tensor) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}"


def _require_whole(value: int, name: str) -> None:
    if value < 1:
        raise ValueError(f"{name}: wanted at least 1, got {value}")
