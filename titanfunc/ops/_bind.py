"""The one place that glues an opaque operation to autograd, vmap and compilation.

Why it takes three layers (each of the shorter ways is wrong somewhere):

1. the computation is a ``torch.library.custom_op`` with a shape function and *no* autograd, so that a
   compiler sees one node however many chunks the implementation loops over;
2. an ``autograd.Function`` (``setup_context`` form, with a vmap rule) calls it; its backward calls the
   backward operation, which is bound the same way, so second derivatives exist as well;
3. a plain function under ``torch.compiler.allow_in_graph`` calls ``.apply``. Without it Dynamo traces the
   forward and silently differentiates that instead of using the backward; ``register_autograd``
   on the operation would raise under ``torch.func.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Forward = Callable[[list[Tensor], list[int], list[float]], list[Tensor]]
Backward = Callable[[list[Tensor], list[Tensor], list[Tensor], list[int], list[float]], list[Tensor]]
Reference = Callable[[Sequence[Tensor], Sequence[int], Sequence[float]], Sequence[Tensor]]
Bound = Callable[[Sequence[Tensor], Sequence[int], Sequence[float]], tuple[Tensor, ...]]

_SCHEMA = "(Tensor[] tensors, int[] ints, float[] floats) -> Tensor[]"


def bind(
    name: str,
    forward: Forward,
    fake: Forward,
    backward: Backward,
    *,
    vmap: Literal["fold", "each"] = "fold",
    residuals: int = 0,
    dense: bool = False,
    reference: Reference | None = None,
) -> Bound:
    """A function ``(tensors, ints, floats) -> tuple of tensors``, right under grad, vmap and fullgraph compile.

    ``forward(tensors, ints, floats)`` returns fresh contiguous tensors of any shapes; ``fake`` returns empty
    ones of the same shapes. ``backward(tensors, outputs, cotangents, ints, floats)`` returns one gradient for
    each of ``tensors``, of its shape and dtype; what it returns for one of whole numbers or bools is not looked at.
    A third derivative raises.

    vmap: "fold" where every tensor, in and out, has a leading batch axis over which the operation acts independently
    (vmap folds its own axis into that one); "each" calls the operation once for each sample.
    residuals: so many of the last outputs are there for the backward alone: they carry no gradient, and
    ``cotangents`` has none of them.
    dense: tensors and cotangents reach the operation contiguous. An operation that copies its arguments itself
    copies them again in its backward, and in kernels that a compiler cannot make part of what came before.
    reference: the same function in plain torch (without the residuals), from which the second derivative then comes;
    else it comes from ``torch.func.vjp`` of ``backward``, which a raw kernel does not have.
    """

    def run_backward(flat: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        *rest, inputs, outputs = ints
        primals = flat[:inputs]
        grads = backward(primals, flat[inputs : inputs + outputs], flat[inputs + outputs :], rest, floats)
        return [
            grad.contiguous() if primal.is_floating_point() else torch.empty_like(primal)
            for grad, primal in zip(grads, primals, strict=True)
        ]

    def run_double_backward(flat: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        *ints, inputs, outputs, count = ints
        primals, cotangents = flat[:-count], flat[-count:]
        smooth = [i for i, primal in enumerate(primals) if primal.is_floating_point()]

        def pulled(*leaves: Tensor) -> tuple[Tensor, ...]:
            whole = list(primals)
            for i, leaf in zip(smooth, leaves, strict=True):
                whole[i] = leaf
            if reference is None:
                grads = run_backward(whole, [*ints, inputs, outputs], floats)
            else:
                grads = _pull(reference, whole[:inputs], whole[inputs + outputs :], ints, floats)
            return tuple(grad for grad, primal in zip(grads, primals, strict=False) if primal.is_floating_point())

        given = tuple(c for c, primal in zip(cotangents, primals, strict=False) if primal.is_floating_point())
        with _outside_every_transform():
            pull = torch.func.vjp(pulled, *(primals[i] for i in smooth))[1]
            found = dict(zip(smooth, pull(given), strict=True))
            # A copy: what comes out of an operation must not be what went in.
            return [
                found[i].clone(memory_format=torch.contiguous_format) if i in found else torch.empty_like(p)
                for i, p in enumerate(primals)
            ]

    def fake_backward(flat: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in flat[: ints[-2]]]

    def fake_double_backward(flat: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in flat[: -ints[-1]]]

    first = _operation(name, forward, fake)
    second = _operation(f"{name}_backward", run_backward, fake_backward)
    third = _operation(f"{name}_double_backward", run_double_backward, fake_double_backward)

    def refuse(ctx: Any, cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        raise RuntimeError(f"{name}: third derivatives are not offered")

    thrice = _function(f"{name}_double_backward", third, refuse, vmap)

    def pull_twice(ctx: Any, cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return thrice.apply((*ctx.ints, len(cotangents)), ctx.floats, *ctx.saved_tensors, *cotangents)

    twice = _function(f"{name}_backward", second, pull_twice, vmap)

    def pull_once(ctx: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor]:
        outputs = len(cotangents)
        inputs = len(ctx.saved_tensors) - outputs
        made = ctx.saved_tensors[inputs : inputs + outputs - residuals]
        given = [torch.zeros_like(y) if c is None else c for y, c in zip(made, cotangents, strict=False)]
        given = [c.contiguous() for c in given] if dense else given
        return twice.apply((*ctx.ints, inputs, outputs), ctx.floats, *ctx.saved_tensors, *given)

    once = _function(name, first, pull_once, vmap, save_outputs=True, residuals=residuals)

    @torch.compiler.allow_in_graph
    def apply(ints: tuple[int, ...], floats: tuple[float, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        return once.apply(ints, floats, *tensors)

    def bound(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> tuple[Tensor, ...]:
        return apply(tuple(ints), tuple(floats), *(t.contiguous() if dense else t for t in tensors))

    return bound


def _pull(
    reference: Reference, primals: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    """The gradients of ``reference`` for each of ``primals`` (itself, where it has none)."""
    smooth = [i for i, primal in enumerate(primals) if primal.is_floating_point()]

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        whole = list(primals)
        for i, leaf in zip(smooth, leaves, strict=True):
            whole[i] = leaf
        return tuple(reference(whole, ints, floats))

    pull = torch.func.vjp(outputs, *(primals[i] for i in smooth))[1]
    found = dict(zip(smooth, pull(tuple(cotangents)), strict=True))
    return [found.get(i, primal) for i, primal in enumerate(primals)]


_DEFAULT_KEYS = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def _outside_every_transform() -> Any:
    """An implementation runs below functorch, whose dispatch keys are then excluded: a transform begun there would
    do nothing but fail. This restores the thread's keys as they were when titanfunc was imported."""
    return torch._C._ForceDispatchKeyGuard(*_DEFAULT_KEYS)


def _operation(name: str, implementation: Forward, fake: Forward) -> Any:
    """Registers ``titanfunc::name``, opaque to a compiler, with its shapes given by ``fake``."""
    operation = torch.library.custom_op(f"titanfunc::{name}", implementation, mutates_args=(), schema=_SCHEMA)
    operation.register_fake(fake)
    return getattr(torch.ops.titanfunc, name)


def _function(
    name: str,
    operation: Any,
    pull: Callable[..., Sequence[Tensor]],
    vmap_rule: str,
    save_outputs: bool = False,
    residuals: int = 0,
) -> Any:
    """An autograd.Function around ``operation`` whose backward is ``pull(ctx, cotangents)``."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ints: Any, floats: Any, *tensors: Any) -> Any:
            return tuple(operation(list(tensors), list(ints), list(floats)))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.ints, ctx.floats, *tensors = inputs
            ctx.save_for_backward(*tensors, *(output if save_outputs else ()))
            if residuals:
                ctx.mark_non_differentiable(*output[-residuals:])
                ctx.set_materialize_grads(False)  # else eager autograd fills a cotangent of zeros for each of them

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            grads = pull(ctx, cotangents)
            return None, None, *(grad if grad.is_floating_point() else None for grad in grads)

        @staticmethod
        def vmap(info: Any, in_dims: Any, ints: Any, floats: Any, *tensors: Any) -> Any:
            size, dims = info.batch_size, in_dims[2:]
            if vmap_rule == "each":
                rows = [
                    Function.apply(
                        ints, floats, *(t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True))
                    )
                    for i in range(size)
                ]
                stacked = tuple(torch.stack(leaves) for leaves in zip(*rows, strict=True))
                return stacked, (0,) * len(stacked)
            folded = [
                (tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).flatten(0, 1)
                for tensor, dim in zip(tensors, dims, strict=True)
            ]
            outputs = Function.apply(ints, floats, *folded)
            return tuple(output.unflatten(0, (size, -1)) for output in outputs), (0,) * len(outputs)

    Function.__name__ = Function.__qualname__ = f"titanfunc_{name}"
    return Function
