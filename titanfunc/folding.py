"""A function in two parts: what it makes of parameters alone, which may stay from call to call, and the rest."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from titanfunc.fullgraph import kinds_of
from titanfunc.ops.graphs import cut, results_of

_ATEN = torch.ops.aten
_MOVES = (_ATEN.cat.default, _ATEN.stack.default, _ATEN.clone.default, _ATEN._to_copy.default)


class Folded(NamedTuple):
    """``function(params, *others)`` in two parts.

    before: leaves of params -> what it makes of them, beside those that it reads as they are. made: which of these
    are made. after: these and the leaves of others -> leaves of the results, of the structure ``outputs``. others:
    shapes, dtypes and devices of the leaves for which this holds.
    """

    before: GraphModule
    made: list[bool]
    after: GraphModule
    outputs: Any
    others: tuple[Any, ...]

    def __call__(self, values: list[Tensor], *others: Any) -> Any:
        """The function's results (any shapes) from what ``before`` returned; ValueError for others of other shapes."""
        leaves = optree.tree_leaves(others)
        if kinds_of(leaves) != self.others:
            raise ValueError("memory, token: wanted the shapes, dtypes and device that parameters were read for")
        return optree.tree_unflatten(self.outputs, self.after(*values, *leaves))


def fold(function: Callable[..., Any], params: Any, *others: Any) -> Folded:
    """``function`` with what only moves or rounds parameters apart from the rest.

    params, others: pytrees of tensors (any shapes). function: pure; it is run once, on tensors without data. What is
    made of parameters alone by joining, copying and converting them is made beforehand: these give the same bits
    however they are compiled. What computes with them stays in the rest.
    """
    leaves, structure = optree.tree_flatten((params, *others))
    count = structure.child(0).num_leaves
    outputs: Any = None

    def flat(*given: Tensor) -> list[Tensor]:
        nonlocal outputs
        results, outputs = optree.tree_flatten(function(*optree.tree_unflatten(structure, given)))
        return results

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        # One for each leaf, also where two leaves are one tensor: the next call's may not be.
        given = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in leaves]
        # What is written in place is nobody's result, and would be lost; functionalize takes no autograd.Function.
        graph = make_fx(torch.func.functionalize(make_fx(flat)(*given), remove="mutations"))(*given)
    places = graph.graph.find_nodes(op="placeholder")
    read = _read(graph, places[:count])
    before, after = cut(graph, places[:count], read), cut(graph, [*read, *places[count:]], results_of(graph))
    return Folded(before, [node.op != "placeholder" for node in read], after, outputs, kinds_of(leaves[count:]))


def _read(graph: GraphModule, parameters: list[Node]) -> list[Node]:
    """What the rest reads: parameters as they are, and what is made of them alone. Views are left to the rest."""
    alone = dict.fromkeys(parameters)
    read: dict[Node, None] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            continue
        inputs = node.all_input_nodes
        if inputs and (node.target in _MOVES or _is_view(node)) and all(each in alone for each in inputs):
            alone[node] = None
            continue
        for each in inputs:
            while _is_view(each) and each in alone:
                each = each.all_input_nodes[0]
            if each in alone:
                read[each] = None
    return list(read)


def _is_view(node: Node) -> bool:
    return node.target is operator.getitem or getattr(node.target, "is_view", False)
