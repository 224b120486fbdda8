"""Computing a function once more in the backward pass, instead of keeping what it made on the way.

torch.utils.checkpoint and a compiler's partitioner both work where a forward ends and a backward begins. A step that
calls torch.func.grad inside of one graph has no such place: there, what is computed again has to be kept apart from
what was computed first, which is what the barrier does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from titanfunc import tree
from titanfunc.fullgraph import plain
from titanfunc.ops.barrier import barrier

Tree = Any
ATTENTION_KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}
"""Whether each may be used where it is asked: what is computed again has to take those of the first time."""


def rematerialize(function: Callable[[Tree, Tree], Tree]) -> Callable[[Tree, Tree], Tree]:
    """``function(stream, rest) -> tree of tensors`` with the same values and derivatives, of which only the arguments
    are kept for the backward pass; that calls it again (as jax.checkpoint; Chen et al., arXiv 1604.06174).

    stream: a tree of tensors; what is computed from them is what is not kept. rest: any tree, of tensors too (weights,
    states, positions) and of constants: a compiler still keeps what is computed from these alone, such as weights in
    another precision. Shapes are any; the results' leaves are tensors or None. ``function`` must be pure, the same each
    time, and closes over no tensor. Right under torch.func's grad, vjp and vmap in any order, and in a compiled graph,
    where ``rematerialize`` itself is called outside of what is compiled. Memory is saved in compiled graphs and under
    ``Tensor.backward``: eager torch.func.grad keeps all it computes, for derivatives of its own.

    >>> sine = rematerialize(lambda x, rest: torch.sin(x * rest["scale"]))
    >>> torch.func.grad(lambda x: sine(x, {"scale": 2}))(torch.zeros(()))
    tensor(2.)
    """

    @torch.compiler.allow_in_graph  # Dynamo would differentiate the Function's forward, and keep everything
    def by_place(places: Tree, stream: Tree, rest: Tree) -> tuple[Tensor, ...]:
        found = dict(
            zip(tree.leaves(plain(places)), tree.leaves(_run(function, plain(stream), plain(rest))), strict=True)
        )
        return tuple(found[place] for place in range(len(found)))

    def rematerialized(stream: Tree, rest: Tree) -> Tree:
        if not torch.compiler.is_dynamo_compiling():
            return _run(function, stream, rest)
        # Dynamo takes no dict from what it does not read: it learns the structure by a call whose values nothing uses.
        numbers = itertools.count()
        places = tree.map(lambda leaf: next(numbers), function(stream, rest))
        leaves = by_place(places, stream, rest)
        return tree.map(lambda place: leaves[place], places)

    return rematerialized


def _run(function: Callable[[Tree, Tree], Tree], stream: Tree, rest: Tree) -> Tree:
    call = _Call(function, stream, rest)
    leaves = _Rematerialized.apply(call, call.streams, *call.tensors)
    return optree.tree_unflatten(call.outputs, leaves)


class _Call:
    """A call of ``function`` as a function of the tensors among its arguments' leaves, the stream's first."""

    def __init__(self, function: Callable[[Tree, Tree], Tree], stream: Tree, rest: Tree) -> None:
        leaves, structure = optree.tree_flatten((stream, rest))
        self._function, self._structure = function, structure
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.streams = structure.child(0).num_leaves
        self.outputs: Any = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if constant is None else constant for constant in self._constants]
        results, self.outputs = optree.tree_flatten(self._function(*optree.tree_unflatten(self._structure, leaves)))
        return tuple(results)


class _Rematerialized(torch.autograd.Function):
    """(function of tensors, so many of them are the stream, tensors) -> its results."""

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], streams: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        seen = {id(tensor) for tensor in tensors}
        results = []
        for result in function(*tensors):
            # What a Function returns must be neither its argument nor twice the same.
            results.append(result.view_as(result) if id(result) in seen else result)
            seen.add(id(results[-1]))
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.function, ctx.streams, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.attention_kernels = [kernel for kernel, allowed in ATTENTION_KERNELS.items() if allowed()]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(result for result in output if not result.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        tensors, function = list(ctx.saved_tensors), ctx.function
        by_result = {i: cotangent for i, cotangent in enumerate(cotangents) if cotangent is not None}
        given, pulled = list(by_result), list(by_result.values())
        tensors[: ctx.streams] = barrier(tensors[: ctx.streams], pulled)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]

        def again(*moving: Tensor) -> tuple[Tensor, ...]:
            whole = list(tensors)
            for i, leaf in zip(wanted, moving, strict=True):
                whole[i] = leaf
            results = function(*whole)
            return tuple(results[i] for i in given)

        gradients: list[Tensor | None] = [None] * len(tensors)
        if given and wanted:
            with sdpa_kernel(ctx.attention_kernels):
                found = torch.func.vjp(again, *(tensors[i] for i in wanted))[1](tuple(pulled))
            for i, gradient in zip(wanted, found, strict=True):
                gradients[i] = gradient
        return None, None, *gradients

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Callable[..., Any], streams: int, *tensors: Tensor) -> Any:
        mapped = torch.func.vmap(function, in_dims[2:], randomness="error")
        results = _Rematerialized.apply(mapped, streams, *tensors)
        return results, (0,) * len(results)
