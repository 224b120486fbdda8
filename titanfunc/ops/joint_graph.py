"""A function of tensors as two graphs: its forward, with what is to be kept, and its backward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from titanfunc.fullgraph import apart
from titanfunc.ops.graphs import cut, results_of


class Like(NamedTuple):
    """What a tensor is, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """What ``tensor`` is, strides with it."""
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
        return tensor if tensor.stride() == self.stride else self.copy(tensor)

    def copy(self, tensor: Tensor) -> Tensor:
        """``tensor``, of this shape, in memory of its own."""
        return self.empty().copy_(tensor)


class Joint(NamedTuple):
    """What tracing leaves. forward: tensors -> outputs, then what is kept.

    graph: all operations, forward and backward. sources: of each of the backward's arguments, by name: ("tensor" |
    "output" | "cotangent", number). slopes: the gradients. outputs, kept: what these are. structure: of the
    outputs.
    """

    forward: GraphModule
    graph: GraphModule
    sources: dict[str, tuple[str, int]]
    slopes: list[Node]
    outputs: list[Like]
    kept: list[Like]
    structure: Any

    def backward(self, absent: frozenset[int]) -> tuple[GraphModule, list[tuple[str, int]]]:
        """The gradients' graph where these outputs have no cotangent, and what its arguments are."""
        given = [node for node in self.graph.graph.nodes if node.name in self.sources]
        module = cut(self.graph, given, self.slopes)
        places = module.graph.find_nodes(op="placeholder")
        first = next((node for node in module.graph.nodes if node.op != "placeholder"), None)
        for node in places:
            kind, number = self.sources[node.name]
            if kind == "cotangent" and number in absent and node.users and first is not None:
                like = self.outputs[number]
                with module.graph.inserting_before(first):
                    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
                    zeros = module.graph.call_function(torch.ops.aten.full.default, (list(like.shape), 0), options)
                node.replace_all_uses_with(zeros)
        for node in places:
            if not node.users:
                module.graph.erase_node(node)
        module.recompile()
        return module, [self.sources[node.name] for node in module.graph.find_nodes(op="placeholder")]


def trace_joint(
    function: Callable[..., Any], sizes: Sequence[Like], wanted: Sequence[int], recompute: bool = False
) -> Joint:
    """Traces ``function(tensors) -> (list of results, structure)`` for tensors of these sizes, and the gradients of the
    ``wanted`` ones. recompute: keep nothing but the tensors for the backward. Works in the midst of another trace."""
    return _in_a_thread(lambda: _trace(function, sizes, wanted, recompute))


def _in_a_thread(call: Callable[[], Any]) -> Any:
    """What ``call`` returns or raises, run where no transform and no tracing is under way: both belong to threads."""
    found: list[Any] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1

    def run() -> None:
        try:
            with torch.cuda.device(device):
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


def _trace(function: Callable[..., Any], sizes: Sequence[Like], wanted: Sequence[int], recompute: bool) -> Joint:
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
        for node in graph.graph.nodes:
            if _draws(node):
                raise ValueError(f"shared code: wanted a function that draws nothing at random, got {node.target}")
        # torch writes some derivatives in place, and functionalize takes no autograd.Function: hence a second trace.
        graph = make_fx(torch.func.functionalize(graph), decomposition_table=select_decomp_table())(*given)
    return _parted(graph, smooth, like, recompute, structure)


def _draws(node: Node) -> bool:
    """Whether an operation draws at random: attention is marked so, but only does with a dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[place] if place < len(node.args) else argument.default_value
            return bool(node.kwargs.get("dropout_p", given))
    return True


def _fresh(results: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """The results, contiguous, none of them in memory of what was given or of another result."""
    return apart([result.contiguous() for result in results], given)


def _parted(graph: GraphModule, smooth: list[int], like: list[Tensor], recompute: bool, structure: Any) -> Joint:
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
    if not recompute and len(results_of(graph)) > count:
        static = list(range(len(tensors)))
        backward = min_cut_rematerialization_partition(
            graph, None, num_fwd_outputs=count, static_lifetime_input_indices=static
        )[1]
        wanted = {node.name for node in backward.graph.find_nodes(op="placeholder")} - set(sources)
    # The partitioner has put another graph in place of the one it was given: without what was computed twice.
    places = graph.graph.find_nodes(op="placeholder")
    outputs, slopes = results_of(graph)[:count], results_of(graph)[count:]
    saved = _bases([node for node in graph.graph.nodes if node.name in wanted])
    kept = [node for node in saved if node not in outputs]
    forward = cut(graph, [node for node in places if sources[node.name][0] == "tensor"], [*outputs, *kept])
    sources.update({node.name: ("output", count + i) for i, node in enumerate(kept)})
    sources.update({node.name: ("output", outputs.index(node)) for node in saved if node in outputs})
    whole = cut(graph, [*places, *saved], slopes)
    used = {node.name for node in whole.graph.find_nodes(op="placeholder") if node.users}
    sources = {name: source for name, source in sources.items() if name in used}
    made = [Like(tuple(x.shape), x.dtype, x.device) for x in like]
    return Joint(forward, graph, sources, slopes, made, _fresh_nodes(forward, count), structure)


def _bases(nodes: list[Node]) -> list[Node]:
    """The nodes, a view given as what it views: views of one tensor would be kept as so many tensors."""
    found: dict[Node, None] = {}
    for node in nodes:
        while isinstance(node.target, torch._ops.OpOverload) and node.target.is_view and node.all_input_nodes:
            node = node.all_input_nodes[0]
        if node.op != "placeholder":
            found[node] = None
    return list(found)


def _fresh_nodes(forward: GraphModule, count: int) -> list[Like]:
    """Makes what the module returns behind its ``count`` outputs dense and in memory of its own; what it is."""
    end = forward.graph.output_node()
    (results,) = end.args
    assert isinstance(results, (list, tuple))
    seen = {_memory(node) for node in [*forward.graph.find_nodes(op="placeholder"), *results[:count]]}
    kept: list[Node] = []
    values: list[Like] = []
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
        values.append(Like.of(value))
    end.args = ([*results[:count], *kept],)
    forward.recompile()
    return values


def _memory(node: Any) -> int:
    return node.meta["val"].untyped_storage()._cdata
