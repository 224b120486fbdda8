"""Compiling a pure function of pytrees into one graph.

A function is traced as JAX traces: run once on tensors without data, its operations recorded. Its Python runs at
tracing only, so it must be pure. torch.compile's reading of bytecode, which takes minutes for a step of this size,
sees one call; its guards on shapes and dtypes, its one-graph check and its backends stay.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict, immutable_list

Backend = str | Callable[..., Any] | None


class Flat:
    """A function of pytrees of one structure as a function of leaves; remembers its results' structure when traced.

    backend: with which it is being compiled, for what it compiles apart (``backend_in_use``).
    """

    def __init__(self, function: Callable[..., Any], inputs: Any, backend: Backend = "inductor") -> None:
        self.function, self.inputs, self.backend = function, inputs, backend
        self.outputs: Any = None

    def __call__(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The function's results as leaves (any shapes)."""
        before = _in_use.copy()
        _in_use.append(self.backend)
        try:
            results, self.outputs = optree.tree_flatten(self.function(*optree.tree_unflatten(self.inputs, leaves)))
        finally:
            _in_use[:] = before
        return tuple(results)


_in_use: list[Backend] = []


def backend_in_use() -> Backend:
    """The backend with which the function is compiled that is being traced now ("inductor" where none is)."""
    return _in_use[-1] if _in_use else "inductor"


def plain(values: Any) -> Any:
    """The dicts and lists that Dynamo hands over, which optree takes for leaves, as plain ones."""
    if isinstance(values, immutable_dict):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, immutable_list):
        return [plain(value) for value in values]
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(plain(value) for value in values))
    return tuple(plain(value) for value in values) if type(values) is tuple else values


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function (results of any shapes) with a code object of its own.

    Dynamo keeps what it compiled by code object, and closures of one definition share theirs: without this, one
    compiled function would run the graph of another that was called with tensors of the same shapes before.
    """
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


def compile_function(function: Callable[..., Any], backend: Backend = "inductor", **options: Any) -> Callable[..., Any]:
    """A pure function of pytrees of tensors (any shapes), compiled fullgraph: a graph for each structure and shapes.

    backend: a torch.compile backend ("inductor", "aot_eager", a function), or None to leave it eager.
    options: further arguments of torch.compile. The function must return tensors only.
    """
    if backend is None:
        return function

    def make(structure: Any) -> tuple[Flat, Callable[..., tuple[Tensor, ...]]]:
        flat = Flat(function, structure, backend)

        @torch.compiler.allow_in_graph
        def traced(*leaves: Tensor) -> tuple[Tensor, ...]:
            return flat(*leaves)

        def call(*leaves: Tensor) -> tuple[Tensor, ...]:
            return traced(*leaves)

        return flat, torch.compile(own_code(call), fullgraph=True, dynamic=False, backend=backend, **options)

    made: dict[Any, tuple[Flat, Callable[..., tuple[Tensor, ...]]]] = {}

    def compiled(*args: Any) -> Any:
        leaves, structure = optree.tree_flatten(args)
        # A function for each set of shapes: Dynamo gives up on one that it had to compile for too many.
        key = structure, tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        if key not in made:
            made[key] = make(structure)
        flat, run = made[key]
        values = run(*leaves)
        return optree.tree_unflatten(flat.outputs, values)

    return compiled
