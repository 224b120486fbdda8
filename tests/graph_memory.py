"""How much memory a compiled graph holds at once, counted on the graph."""

from __future__ import annotations

import torch._dynamo.backends.common
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch.multiprocessing.reductions import StorageWeakRef

from titanfunc.fullgraph import compile_function


def graph_of(function, *args):
    """The graph that a backend is given for ``function(*args)``, without dead code and with what is alike merged."""
    graphs = []

    def record(module, inputs):
        merged = fx_graph_cse(module.graph)
        merged.eliminate_dead_code()
        graphs.append(merged)
        return module.forward

    compile_function(function, torch._dynamo.backends.common.aot_autograd(fw_compiler=record))(*args)
    (graph,) = graphs
    return graph


def count(graph, name):
    """How many calls of operations whose name holds ``name``."""
    return sum(node.op == "call_function" and name in str(node.target) for node in graph.nodes)


def peak(graph):
    """The most bytes that are held at once, beside the inputs, run in order, each buffer freed after its last use."""
    nodes = list(graph.nodes)
    given = {buffer for node in nodes if node.op == "placeholder" for buffer in _buffers(node)}
    last_use: dict[int, int] = {}
    for i, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            last_use.update(dict.fromkeys(_buffers(used), i))
    held: dict[int, int] = {}
    most = 0
    for i, node in enumerate(nodes):
        held.update({buffer: size for buffer, size in _buffers(node).items() if buffer not in given})
        most = max(most, sum(held.values()))
        held = {buffer: size for buffer, size in held.items() if last_use[buffer] > i}
    return most


def _buffers(node):
    """{buffer: bytes} of a node's results; views share a buffer."""
    values = node.meta.get("val")
    tensors = [
        value for value in (values if isinstance(values, list | tuple) else [values]) if isinstance(value, Tensor)
    ]
    return {StorageWeakRef(t.untyped_storage()).cdata: t.untyped_storage().nbytes() for t in tensors}
