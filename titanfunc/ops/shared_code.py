"""Calls that are alike share one compiled program.

A step that is one graph holds each block's operations again, and a compiler's time grows with them. Here a function is
traced once for all calls with the same constants, shapes and dtypes; its forward and its backward are compiled as
programs of their own, and each call is one operation of the step's graph, its gradient another.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

from titanfunc.fullgraph import backend_in_use, sharing
from titanfunc.ops.compile_ahead import Ahead, compile_ahead, compile_graph
from titanfunc.ops.joint_graph import Like, trace_joint
from titanfunc.ops.rematerialize import ATTENTION_KERNELS

Tree = Any
_NUMBERS = itertools.count()
_SCHEMA = "(Tensor[] tensors) -> Tensor[]"


def share_code(
    function: Callable[[Tree, Tree], Tree],
    recompute: bool = False,
    otherwise: Callable[[Tree, Tree], Tree] | None = None,
) -> Callable[[Tree, Tree], Tree]:
    """``function(stream, rest) -> tree of tensors`` (any shapes), which compiled steps hold as one operation a call.

    stream, rest: trees of tensors and hashable constants. ``function`` must be pure, draw nothing at random, and close
    over no tensor. recompute: keep the arguments alone for the backward pass, which computes the rest again; otherwise
    what is kept is for the compiler's partitioner to say. Where nothing is traced, and under vmap, ``otherwise`` runs
    (the function itself). Options of torch.compile do not reach shared programs. Raises RuntimeError for a second
    derivative of a compiled call, and ValueError for a function that draws at random, or under autocast.
    """
    made: dict[Hashable, _Program] = {}
    uncompiled = otherwise or function

    def shared(stream: Tree, rest: Tree) -> Tree:
        if torch.compiler.is_dynamo_compiling():
            return uncompiled(stream, rest)
        leaves, structure = optree.tree_flatten((stream, rest))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not _traced(tensors):
            return uncompiled(stream, rest)
        if any(torch.is_autocast_enabled(kind) for kind in {tensor.device.type for tensor in tensors}):
            raise ValueError("shared code: wanted no autocast, which a program of its own would not see")
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        wanted = tuple(_wants_gradient(tensor) for tensor in tensors)
        sizes = tuple(Like(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)
        kinds = tuple(type(constant) for constant in constants)  # 2 and 2.0 are equal, and make other dtypes
        key = structure, constants, kinds, sizes, wanted, backend_in_use(), _settings()
        if key not in made:

            def flat(given: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
                tensor = iter(given)
                whole = [next(tensor) if constant is None else constant for constant in constants]
                return optree.tree_flatten(function(*optree.tree_unflatten(structure, whole)))

            made[key] = _Program(flat, sizes, wanted, recompute)
        return made[key](tensors)

    return shared


def _settings() -> tuple[Any, ...]:
    """What of torch's settings decides what a function does."""
    allowed = tuple(enabled() for enabled in ATTENTION_KERNELS.values())
    return torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), *allowed


def _wants_gradient(tensor: Tensor) -> bool:
    """Whether any of the derivatives that are under way is one in ``tensor``."""
    if not tensor.is_floating_point():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def _traced(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are without data, and none is mapped over."""
    found = False
    for tensor in tensors:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            if torch._C._functorch.is_batchedtensor(tensor):
                return False
            tensor = torch._C._functorch.get_unwrapped(tensor)
        inner = getattr(tensor, "elem", tensor) if type(tensor).__name__ == "FunctionalTensor" else tensor
        if torch._is_functional_tensor(inner):
            inner = torch._from_functional_tensor(inner)
        found = found or isinstance(inner, FakeTensor)
    return found


class _Program:
    """One traced function: an operation for its outputs and one for its gradients, compiled when they first run."""

    def __init__(
        self, function: Callable[..., Any], sizes: Sequence[Like], wanted: Sequence[bool], recompute: bool
    ) -> None:
        self._wanted = [i for i, needed in enumerate(wanted) if needed]
        self._slopes = [sizes[i] for i in self._wanted]
        self._joint = trace_joint(function, sizes, self._wanted, recompute)
        self._backend, self._name = backend_in_use(), f"shared_code_{next(_NUMBERS)}"
        outputs = [*self._joint.outputs, *self._joint.kept]
        self._compiled: list[_Compiled] = []  # alone in holding them: torch forgets no operation
        self._forward = self._operation(self._name, self._joint.forward, outputs)
        self._backward: dict[frozenset[int], tuple[Any, list[tuple[str, int]]]] = {}
        self._function = self._as_function()

    def __call__(self, tensors: Sequence[Tensor]) -> Tree:
        leaves = self._function.apply(*(tensor.contiguous() for tensor in tensors))
        return optree.tree_unflatten(self._joint.structure, leaves[: len(self._joint.outputs)])

    def _operation(self, name: str, graph: GraphModule, like: Sequence[Like]) -> Any:
        self._compiled.append(_Compiled(graph, self._backend))
        return _operation(name, self._compiled[-1], like)

    def _pull(
        self, saved: dict[tuple[str, int], Tensor], wanted: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The gradients of the ``wanted`` tensors."""
        absent = frozenset(i for i, cotangent in enumerate(cotangents) if cotangent is None)
        if absent not in self._backward:
            graph, sources = self._joint.backward(absent)
            name = f"{self._name}_backward_{len(self._backward)}"
            self._backward[absent] = self._operation(name, graph, self._slopes), sources
        operation, sources = self._backward[absent]
        given = {("cotangent", i): c.contiguous() for i, c in enumerate(cotangents) if c is not None}
        arguments = [(saved | given)[source] for source in sources]
        return list(_once(operation).apply(len(arguments), *arguments, *wanted))

    def _as_function(self) -> Any:
        program, joint = self, self._joint
        count = len(joint.outputs)
        saved = [source for source in dict.fromkeys(joint.sources.values()) if source[0] != "cotangent"]

        class Shared(torch.autograd.Function):
            @staticmethod
            def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
                return tuple(program._forward(list(tensors)))

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                by_kind = {"tensor": inputs, "output": output}
                ctx.save_for_backward(*(by_kind[kind][i] for kind, i in saved), *(inputs[i] for i in program._wanted))
                ctx.set_materialize_grads(False)
                ctx.mark_non_differentiable(
                    *(x for i, x in enumerate(output) if i >= count or not x.is_floating_point())
                )
                ctx.inputs = len(inputs)

            @staticmethod
            def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
                slopes: list[Tensor | None] = [None] * ctx.inputs
                kept, wanted = ctx.saved_tensors[: len(saved)], ctx.saved_tensors[len(saved) :]
                found = program._pull(dict(zip(saved, kept, strict=True)), wanted, cotangents)
                for i, slope in zip(program._wanted, found, strict=True):
                    slopes[i] = slope
                return tuple(slopes)

        return Shared


def _once(operation: Any) -> Any:
    """An autograd.Function around ``operation`` (any tensors -> its results) that cannot be differentiated: (how many
    arguments, these, the tensors whose gradients they are) -> the gradients. Of the tensors only that they are there
    matters: what is kept of a call hides where it came from."""

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(operation(list(tensors[:count])))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Any:
            raise RuntimeError("shared code has no second derivative: compile each call's code (layer_code=each)")

    return Slope


class _Compiled:
    """A graph, compiled when it is first called.

    Past Dynamo, which sees nothing inside of an operation. On a GPU inductor begins at once, in another process.
    """

    def __init__(self, graph: GraphModule, backend: Any) -> None:
        self._graph, self._backend = graph, backend
        self._run: Callable[..., Any] | None = None if backend is not None else graph
        self._ahead = Ahead()
        like = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        if backend == "inductor" and any(value.is_cuda for value in like):
            self._ahead = compile_ahead(graph, [(v.shape, v.stride(), v.dtype, v.device) for v in like])

    def __call__(self, *tensors: Tensor) -> Any:
        if self._run is not None:
            return self._run(*tensors)
        self._ahead.wait()
        self._run = compile_graph(self._graph, tensors, self._backend)
        results = self._run(*tensors)
        self._ahead.keep()  # after the run, in which launches are chosen and kernels behind our operations compiled
        return results


def _operation(name: str, compiled: _Compiled, like: Sequence[Like]) -> Any:
    """Registers ``titanfunc::name``, opaque to a compiler, whose results are of the sizes of ``like``."""

    found = weakref.ref(compiled)
    copied: list[int] | None = None

    def implementation(tensors: list[Tensor]) -> list[Tensor]:
        nonlocal copied
        run = found()
        assert run is not None, "the function whose code is shared is gone"
        with torch.no_grad():
            results = [each.fit(result) for each, result in zip(like, run(*tensors), strict=True)]
            # No result may lie in another's memory, but inductor computes the parts of a cat in place, and then
            # returns a view of a part as one of the whole. A program does so at every call, or at none.
            if copied is None:
                copied = sharing(results, tensors)
            for i in copied:
                results[i] = like[i].copy(results[i])
            return results

    def empty(tensors: list[Tensor]) -> list[Tensor]:
        return [each.empty() for each in like]

    operation = torch.library.custom_op(f"titanfunc::{name}", implementation, mutates_args=(), schema=_SCHEMA)
    operation.register_fake(empty)
    return getattr(torch.ops.titanfunc, name)
