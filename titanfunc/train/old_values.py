"""What inductor needs to be told where a step hands on an old value of its state as a new one.

A donated step ends with a copy into each old leaf. Where a new leaf is another old one as it was (the last parameters,
kept beside the new ones), inductor takes a copy made of it to be needless, and reads the old leaf after it was written
over: a silent fault in plain compiled code too (pytorch issue 198131; seen in 2.11 and 2.13). Here such values are
copied where inductor does not look inside.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_COPY = torch.ops.aten.copy_.default


@torch.library.custom_op("titanfunc::copied", mutates_args=())
def copied(value: Tensor) -> Tensor:
    """A copy of a tensor of any shape, which no compiler leaves out."""
    return value.clone()


@copied.register_fake
def _fake(value: Tensor) -> Tensor:
    return torch.empty_like(value)


class KeepOldValues(CustomGraphPass):
    """A pass of inductor's, before its own on the joint graph's results: old values are copied before the first of
    them is written over."""

    def __call__(self, graph: Graph) -> None:
        """Change the graph of a donated step where it hands on an old value, as a new one or as a result."""
        nodes = graph.find_nodes(op="call_function", target=_COPY)
        copies = [node for node in nodes if node.args[0].op == "placeholder"]
        written = {node.args[0] for node in copies}

        def kept(value: Any, place: Node | None = None) -> Any:
            if value is place or _origin(value) not in written:
                return value
            with graph.inserting_before(copies[0]):
                copy = graph.call_function(torch.ops.titanfunc.copied.default, (value,))
            copy.meta["val"] = value.meta["val"].clone()
            return copy

        for node in copies:
            place, value, *rest = node.args
            node.args = (place, kept(value, place), *rest)
        output = graph.output_node()
        results = output.args[0]
        if isinstance(results, (list, tuple)):
            output.args = (type(results)(result if result in copies else kept(result) for result in results),)

    def uuid(self) -> Any:
        """By which inductor's caches know the pass."""
        return get_hash_for_files((__file__,))


def _origin(value: Any) -> Any:
    """The node whose numbers ``value`` may have, unchanged: behind views and what inductor may leave out."""
    from torch._inductor.fx_passes.post_grad import noop_registry

    while isinstance(value, Node) and value.op == "call_function":
        if value.target is operator.getitem:  # of what was split
            value = value.args[0]
        elif not isinstance(value.target, torch._ops.OpOverload):
            break
        elif value.target.is_view:
            value = value.all_input_nodes[0]
        elif value.target in noop_registry:
            place = noop_registry[value.target][1]
            value = value.args[place] if isinstance(place, int) else place(value.args)
        else:
            break
    return value


KEEP_OLD_VALUES = KeepOldValues()
