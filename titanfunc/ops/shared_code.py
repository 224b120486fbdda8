"""Calls that are alike share one compiled program.

A step that is one graph holds each block's operations again, and a compiler's time grows with them. Here a function is
traced once for all calls with the same constants, shapes and dtypes; its forward and its backward are compiled as
programs of their own, and each call is one operation of the step's graph, its gradient another.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from titanfunc.fullgraph import backend_in_use
from titanfunc.ops.compile_ahead import compile_ahead, compile_graph

Tree = Any
_NUMBERS = itertools.count()
_SCHEMA = "(Tensor[] tensors) -> Tensor[]"


def share_code(function: Callable[[Tree, Tree], Tree], recompute: bool = False) -> Callable[[Tree, Tree], Tree]:
    """``function(stream, rest) -> tree of tensors`` (any shapes), which compiled steps hold as one operation a call.

    stream, rest: trees of tensors and hashable constants. ``function`` must be pure, draw nothing at random, and close
    over no tensor. recompute: keep the arguments alone for the backward pass, which computes the rest again; otherwise
    what is kept is for the compiler's partitioner to say. Where nothing is traced, and under vmap, the function itself
    runs. Raises RuntimeError for a second derivative of a compiled call.
    """
    made: dict[Hashable, _Program] = {}

    def shared(stream: Tree, rest: Tree) -> Tree:
        if torch.compiler.is_dynamo_compiling():
            return function(stream, rest)
        leaves, structure = optree.tree_flatten((stream, rest))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not _traced(tensors):
            return function(stream, rest)
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        wanted = tuple(tensor.requires_grad and tensor.is_floating_point() for tensor in tensors)
        sizes = tuple(_Like(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)
        key = structure, constants, sizes, wanted, backend_in_use(), recompute
        if key not in made:

            def flat(given: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
                tensor = iter(given)
                whole = [next(tensor) if constant is None else constant for constant in constants]
                return optree.tree_flatten(function(*optree.tree_unflatten(structure, whole)))

            made[key] = _Program(flat, sizes, wanted, recompute)
        return made[key](tensors)

    return shared


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


class _Like(NamedTuple):
    """What a tensor is, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, tuple(tensor.stride()))

    def empty(self) -> Tensor:
        """A tensor like this, contiguous if it has no strides."""
        if self.stride is None:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def fit(self, tensor: Tensor) -> Tensor:
        """``tensor``, copied if it lies otherwise in memory."""
        if self.stride is None:
            return tensor.contiguous()
        return tensor if tensor.stride() == self.stride else self.empty().copy_(tensor)


class _Joint(NamedTuple):
    """What tracing leaves: the two graphs, and where the backward's arguments come from.

    forward: tensors -> outputs, then what is kept. backward: its arguments -> gradients of the wanted tensors.
    arguments: of the backward, in order: ("tensor" | "output" | "cotangent", number). outputs, kept: their shapes and
    dtypes. structure: of the outputs.
    """

    forward: GraphModule
    backward: GraphModule
    arguments: list[tuple[str, int]]
    outputs: list[_Like]
    kept: list[_Like]
    structure: Any


class _Program:
    """One traced function: an operation for its outputs and one for its gradients, compiled when they first run."""

    def __init__(
        self, function: Callable[..., Any], sizes: Sequence[_Like], wanted: Sequence[bool], recompute: bool
    ) -> None:
        self._wanted = [i for i, needed in enumerate(wanted) if needed]
        self._joint = _in_a_thread(lambda: _trace(function, sizes, self._wanted, recompute))
        backend, number = backend_in_use(), next(_NUMBERS)
        forward, backward = (_compiled(graph, backend) for graph in (self._joint.forward, self._joint.backward))
        self._forward = _operation(f"shared_code_{number}", forward, [*self._joint.outputs, *self._joint.kept])
        self._backward = _operation(f"shared_code_{number}_backward", backward, [sizes[i] for i in self._wanted])
        self._function = self._as_function()

    def __call__(self, tensors: Sequence[Tensor]) -> Tree:
        leaves = self._function.apply(*(tensor.contiguous() for tensor in tensors))
        return optree.tree_unflatten(self._joint.structure, leaves[: len(self._joint.outputs)])

    def _as_function(self) -> Any:
        program, joint = self, self._joint
        count = len(joint.outputs)

        class Slope(torch.autograd.Function):
            @staticmethod
            def forward(*arguments: Tensor) -> tuple[Tensor, ...]:
                return tuple(program._backward(list(arguments)))

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                pass

            @staticmethod
            def backward(ctx: Any, *cotangents: Tensor) -> Any:
                raise RuntimeError("shared code has no second derivative: compile each call's code (layer_code=each)")

        class Shared(torch.autograd.Function):
            @staticmethod
            def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
                return tuple(program._forward(list(tensors)))

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                by_kind = {"tensor": inputs, "output": output}
                ctx.save_for_backward(*(by_kind[kind][i] for kind, i in joint.arguments if kind in by_kind))
                ctx.set_materialize_grads(False)
                ctx.mark_non_differentiable(
                    *(x for i, x in enumerate(output) if i >= count or not x.is_floating_point())
                )
                ctx.inputs = len(inputs)

            @staticmethod
            def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
                saved, arguments = iter(ctx.saved_tensors), []
                for kind, i in joint.arguments:
                    if kind != "cotangent":
                        arguments.append(next(saved))
                        continue
                    like, given = joint.outputs[i], cotangents[i]
                    made = torch.zeros(like.shape, dtype=like.dtype, device=like.device) if given is None else given
                    arguments.append(made.contiguous())
                slopes: list[Tensor | None] = [None] * ctx.inputs
                for i, slope in zip(program._wanted, Slope.apply(*arguments), strict=True):
                    slopes[i] = slope
                return tuple(slopes)

        return Shared


def _in_a_thread(call: Callable[[], Any]) -> Any:
    """What ``call`` returns or raises, run where no transform and no tracing is under way: both belong to threads."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((call(), None))
        except BaseException as error:  # raised again below, in the thread that waits
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = found[0]
    if error is not None:
        raise error
    return result


def _trace(function: Callable[..., Any], sizes: Sequence[_Like], wanted: Sequence[int], recompute: bool) -> _Joint:
    structure: Any = None

    def outputs_of(tensors: Sequence[Tensor]) -> list[Tensor]:
        nonlocal structure
        results, structure = function(tensors)
        return results

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        def moved(*leaves: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            whole = list(primals)
            for i, leaf in zip(wanted, leaves, strict=True):
                whole[i] = leaf
            results = outputs_of(whole)
            return tuple(results[i] for i in smooth), tuple(results)

        if not wanted:
            return _fresh(outputs_of(primals), primals), []
        pulled: Any = torch.func.vjp(moved, *(primals[i] for i in wanted), has_aux=True)
        _, pull, results = pulled
        slopes = pull(tuple(tangents))
        return _fresh(results, primals), _fresh(slopes, [*primals, *tangents])

    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device, _ in sizes]
        with torch.no_grad():
            like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in outputs_of(tensors)]
        smooth = [i for i, x in enumerate(like) if x.is_floating_point()]
        given = tensors, [like[i] for i in smooth]
        graph = make_fx(joint)(*given)
        # torch writes some derivatives in place, and functionalize takes no autograd.Function: hence a second trace.
        graph = make_fx(torch.func.functionalize(graph), decomposition_table=select_decomp_table())(*given)
    return _parted(graph, smooth, like, recompute, structure)


def _fresh(results: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """The results, contiguous, none of them in memory of what was given or of another result."""
    seen = {tensor.untyped_storage()._cdata for tensor in given}
    fresh = []
    for result in results:
        whole = result.contiguous()
        if whole.untyped_storage()._cdata in seen:
            whole = whole.clone(memory_format=torch.contiguous_format)
        seen.add(whole.untyped_storage()._cdata)
        fresh.append(whole)
    return fresh


def _parted(graph: GraphModule, smooth: list[int], like: list[Tensor], recompute: bool, structure: Any) -> _Joint:
    """The joint graph as a forward and a backward one."""
    count = len(like)
    places = graph.graph.find_nodes(op="placeholder")
    tensors, tangents = places[: len(places) - len(smooth)], places[len(places) - len(smooth) :]
    sources: dict[str, tuple[str, int]] = {}
    named = [*((t, "tangents", "cotangent", i) for t, i in zip(tangents, smooth, strict=True))]
    named += [(node, "primals", "tensor", i) for i, node in enumerate(tensors)]
    for node, name, kind, i in named:
        node.target = node.name = f"{name}_{i + 1}"  # by which the partitioner knows them
        sources[node.name] = kind, i
    wanted: set[str] = set()
    if not recompute and len(_results(graph)) > count:
        static = list(range(len(tensors)))
        backward = min_cut_rematerialization_partition(
            graph, None, num_fwd_outputs=count, static_lifetime_input_indices=static
        )[1]
        wanted = {node.name for node in backward.graph.find_nodes(op="placeholder")} - set(sources)
    # The partitioner has put another graph in place of the one it was given: without what was computed twice.
    places = graph.graph.find_nodes(op="placeholder")
    outputs, slopes = _results(graph)[:count], _results(graph)[count:]
    saved = _bases([node for node in graph.graph.nodes if node.name in wanted])
    kept = [node for node in saved if node not in outputs]
    forward = _cut(graph, [node for node in places if sources[node.name][0] == "tensor"], [*outputs, *kept])
    backward = _cut(graph, [*places, *saved], slopes)
    sources.update({node.name: ("output", count + i) for i, node in enumerate(kept)})
    sources.update({node.name: ("output", outputs.index(node)) for node in saved if node in outputs})
    found = _used_arguments(backward)
    made = [_Like(tuple(x.shape), x.dtype, x.device) for x in like]
    arguments = [sources[node.name] for node in found]
    return _Joint(forward, backward, arguments, made, _fresh_nodes(forward, count), structure)


def _results(graph: GraphModule) -> list[Node]:
    return list(torch.utils._pytree.arg_tree_leaves(*graph.graph.output_node().args))


def _bases(nodes: list[Node]) -> list[Node]:
    """The nodes, a view given as what it views: views of one tensor would be kept as so many tensors."""
    found: dict[Node, None] = {}
    for node in nodes:
        while isinstance(node.target, torch._ops.OpOverload) and node.target.is_view and node.all_input_nodes:
            node = node.all_input_nodes[0]
        if node.op != "placeholder":
            found[node] = None
    return list(found)


def _cut(graph: GraphModule, arguments: list[Node], outputs: list[Node]) -> GraphModule:
    """A module (``arguments``) -> ``outputs`` of the graph's operations between them."""
    cut = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    for node in arguments:
        copies[node] = cut.placeholder(node.name)
        copies[node].meta = node.meta
    needed, rest = set(), [node for node in outputs if node not in copies]
    while rest:
        node = rest.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            rest.extend(node.all_input_nodes)
    for node in graph.graph.nodes:
        if node in needed:
            copies[node] = cut.node_copy(node, lambda given: copies[given])
    cut.output([copies[node] for node in outputs])
    return GraphModule(graph, cut)


def _used_arguments(module: GraphModule) -> list[Node]:
    """The module's arguments, those that it does not look at taken away."""
    for node in list(module.graph.nodes):
        if node.op == "placeholder" and not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _fresh_nodes(forward: GraphModule, count: int) -> list[_Like]:
    """Makes what the module returns behind its ``count`` outputs dense and in memory of its own; what it is."""
    end = forward.graph.output_node()
    (results,) = end.args
    assert isinstance(results, (list, tuple))
    seen = {_memory(node) for node in [*forward.graph.find_nodes(op="placeholder"), *results[:count]]}
    kept: list[Node] = []
    values: list[_Like] = []
    for node in results[count:]:
        assert isinstance(node, Node)
        value = node.meta["val"]
        if _memory(node) in seen or not torch.ops.aten.is_non_overlapping_and_dense.default(value):
            value = torch.empty_like(value)
            with forward.graph.inserting_before(end):
                node = forward.graph.call_function(torch.ops.aten.clone.default, (node,))
        else:
            seen.add(_memory(node))
        kept.append(node)
        values.append(_Like.of(value))
    end.args = ([*results[:count], *kept],)
    forward.recompile()
    return values


def _memory(node: Any) -> int:
    return node.meta["val"].untyped_storage()._cdata


def _compiled(graph: GraphModule, backend: Any) -> Callable[..., Any]:
    """The graph, compiled when it is first called. Past Dynamo, which sees nothing inside of an operation, and has
    nothing left to do here. On a GPU inductor begins at once, in another process."""
    if backend is None:
        return graph
    like = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    wait: Callable[[], None] | None = None
    if backend == "inductor" and any(value.is_cuda for value in like):
        wait = compile_ahead(graph, [(v.shape, v.stride(), v.dtype, v.device) for v in like])
    made: list[Callable[..., Any]] = []

    def call(*tensors: Tensor) -> Any:
        if not made:
            if wait is not None:
                wait()
            made.append(compile_graph(graph, tensors, backend))
        return made[0](*tensors)

    return call


def _operation(name: str, run: Callable[..., Any], like: Sequence[_Like]) -> Any:
    """Registers ``titanfunc::name``, opaque to a compiler, whose results are of the sizes of ``like``."""

    def implementation(tensors: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [each.fit(result) for each, result in zip(like, run(*tensors), strict=True)]

    def empty(tensors: list[Tensor]) -> list[Tensor]:
        return [each.empty() for each in like]

    operation = torch.library.custom_op(f"titanfunc::{name}", implementation, mutates_args=(), schema=_SCHEMA)
    operation.register_fake(empty)
    return getattr(torch.ops.titanfunc, name)
