"""Compiling a pure function of pytrees into one graph.

A function is traced as JAX traces: run once on tensors without data, its operations recorded. Its Python runs at
tracing only, so it must be pure. torch.compile's reading of bytecode, which takes minutes for a step of this size,
sees one call; its guards on shapes and dtypes, its one-graph check and its backends stay.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict, immutable_list

from titanfunc.recorded import kept_by_contents

Backend = str | Callable[..., Any] | None
Leaves = Callable[..., tuple[Tensor, ...]]


class Flat:
    """A function of pytrees of one structure as a function of leaves; remembers its results' structure when traced.

    backend: with which it is being compiled, for what it compiles apart (``backend_in_use``).
    """

    def __init__(self, function: Callable[..., Any], inputs: Any, backend: Backend = "inductor") -> None:
        self.function, self.inputs, self.backend = function, inputs, backend
        self.outputs: Any = None
        self._raised: Exception | None = None

    def __call__(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The function's results as leaves (any shapes)."""
        before = _in_use.copy()
        _in_use.append(self.backend)
        self._raised = None
        try:
            results, self.outputs = optree.tree_flatten(self.function(*optree.tree_unflatten(self.inputs, leaves)))
            return self.finish(leaves, results)
        except Exception as error:
            self._raised = error
            raise
        finally:
            _in_use[:] = before

    def finish(self, leaves: Sequence[Tensor], results: Sequence[Any]) -> tuple[Tensor, ...]:
        """The results (any shapes) as they leave the function; raises ValueError for one that is no tensor."""
        for name, result in zip(optree.treespec_accessors(self.outputs), results, strict=True):
            if not isinstance(result, Tensor):
                raise ValueError(f"result{name.codify('')}: wanted a tensor, got {type(result).__name__}")
        return tuple(results)

    def run(self, compiled: Callable[..., Any], *args: Any) -> Any:
        """``compiled(*args)``, of the function; what it raises where a compiler traces it comes out as it is."""
        own = None
        try:
            return compiled(*args)
        except Exception as error:
            own = self._raised if self._raised is not error else None
            if own is None:
                raise
        finally:
            self._raised = None
        try:
            raise own  # here, where nothing is handled: its cause and context stay its own
        finally:
            own = None  # else its traceback, and with it these tensors, would hold itself


def in_graph(function: Leaves, backend: Backend, options: Mapping[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    """``function`` (leaves -> results, any shapes) as one call to Dynamo; and the options of torch.compile, with what
    inductor needs to keep on disk what is made of it (recorded.py)."""
    noted, further = kept_by_contents(function, backend, options)

    @torch.compiler.allow_in_graph
    def traced(*leaves: Tensor) -> tuple[Tensor, ...]:
        return noted(traced, leaves)

    return traced, further


def sharing(results: Sequence[Tensor], given: Sequence[Tensor]) -> list[int]:
    """Which of the results (any shapes) lie in memory of what was given or of another result: of those in one place all
    but the largest."""
    seen = {tensor.untyped_storage()._cdata for tensor in given}
    found = []
    for i in sorted(range(len(results)), key=lambda i: -results[i].numel()):
        place = results[i].untyped_storage()._cdata
        if place in seen:
            found.append(i)
        seen.add(place)
    return found


def apart(results: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """The results (any shapes), copied where they lie in memory of what was given or of another result."""
    found = list(results)
    for i in sharing(results, given):
        found[i] = results[i].clone(memory_format=torch.contiguous_format)
    return found


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


def kinds_of(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a compiled function is made for: Dynamo gives up on one that it had to compile for too many shapes."""
    return tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)


def compile_function(function: Callable[..., Any], backend: Backend = "inductor", **options: Any) -> Callable[..., Any]:
    """A pure function of pytrees of tensors (any shapes), compiled fullgraph: a graph for each structure and shapes.

    backend: a torch.compile backend ("inductor", "aot_eager", a function), or None to leave it eager.
    options: further arguments of torch.compile. Raises ValueError for a result that is no tensor, and what the function
    raises.
    """
    if backend is None:
        return function

    def make(structure: Any) -> tuple[Flat, Leaves]:
        flat = Flat(function, structure, backend)
        traced, further = in_graph(flat, backend, options)

        def call(*leaves: Tensor) -> tuple[Tensor, ...]:
            return traced(*leaves)

        return flat, torch.compile(own_code(call), fullgraph=True, dynamic=False, backend=backend, **further)

    made: dict[Any, tuple[Flat, Leaves]] = {}

    def compiled(*args: Any) -> Any:
        leaves, structure = optree.tree_flatten(args)
        key = structure, kinds_of(leaves)
        if key not in made:
            made[key] = make(structure)
        flat, run = made[key]
        values = flat.run(run, *leaves)
        return optree.tree_unflatten(flat.outputs, values)

    return compiled
