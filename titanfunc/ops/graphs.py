"""Parts of recorded graphs."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node


def results_of(graph: GraphModule) -> list[Node]:
    """The nodes of the tensors (any shapes) that a graph returns, in order; one may come more than once."""
    return list(torch.utils._pytree.arg_tree_leaves(*graph.graph.output_node().args))


def cut(graph: GraphModule, arguments: list[Node], outputs: list[Node]) -> GraphModule:
    """A module (``arguments``) -> ``outputs`` of the graph's operations between them."""
    part = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    for node in arguments:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = node.meta
    needed, rest = set(), [node for node in outputs if node not in copies]
    while rest:
        node = rest.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            rest.extend(node.all_input_nodes)
    for node in graph.graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, lambda given: copies[given])
    part.output([copies[node] for node in outputs])
    return GraphModule(graph, part)
