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
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[list[Tensor], list[int], list[float]], list[Tensor]]
Backward = Callable[[list[Tensor], list[Tensor], list[Tensor], list[int], list[float]], list[Tensor]]
Bound = Callable[[Sequence[Tensor], Sequence[int], Sequence[float]], tuple[Tensor, ...]]

_SCHEMA = "(Tensor[] tensors, int[] ints, float[] floats) -> Tensor[]"


def bind(name: str, forward: Forward, fake: Forward, backward: Backward) -> Bound:
    """A function ``(tensors, ints, floats) -> tuple of tensors``, right under grad, vmap and fullgraph compile.

    ``forward(tensors, ints, floats)`` returns fresh contiguous tensors of any shapes; ``fake`` returns empty
    ones of the same shapes. ``backward(tensors, outputs, cotangents, ints, floats)`` returns one gradient for
    each of ``tensors``; its own derivative comes from ``torch.func.vjp``, a third one raises. Every
    tensor, in and out, has a leading batch axis over which the operation acts independently: vmap
    folds its own axis into that one.
    """

    def run_backward(flat: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        *rest, inputs = ints
        count = (len(flat) - inputs) // 2
        grads = backward(flat[:inputs], flat[inputs : inputs + count], flat[inputs + count :], rest, floats)
        return [grad.contiguous() for grad in grads]

    def run_double_backward(flat: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        *ints, count = ints
        primals, cotangents = flat[:-count], flat[-count:]
        with _outside_every_transform():
            pull = torch.func.vjp(lambda *leaves: tuple(run_backward(list(leaves), ints, floats)), *primals)[1]
            return [grad.contiguous() for grad in pull(tuple(cotangents))]

    def fake_backward(flat: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in flat[: ints[-1]]]

    def fake_double_backward(flat: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in flat[: -ints[-1]]]

    first = _operation(name, forward, fake)
    second = _operation(f"{name}_backward", run_backward, fake_backward)
    third = _operation(f"{name}_double_backward", run_double_backward, fake_double_backward)

    def refuse(ctx: Any, cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        raise RuntimeError(f"{name}: third derivatives are not offered")

    thrice = _function(f"{name}_double_backward", third, refuse, save_outputs=False)

    def pull_twice(ctx: Any, cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return thrice.apply((*ctx.ints, len(cotangents)), ctx.floats, *ctx.saved_tensors, *cotangents)

    twice = _function(f"{name}_backward", second, pull_twice, save_outputs=False)

    def pull_once(ctx: Any, cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs = len(ctx.saved_tensors) - len(cotangents)
        return twice.apply((*ctx.ints, inputs), ctx.floats, *ctx.saved_tensors, *cotangents)

    once = _function(name, first, pull_once, save_outputs=True)

    @torch.compiler.allow_in_graph
    def apply(ints: tuple[int, ...], floats: tuple[float, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        return once.apply(ints, floats, *tensors)

    def bound(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> tuple[Tensor, ...]:
        return apply(tuple(ints), tuple(floats), *tensors)

    return bound


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


def _function(name: str, operation: Any, pull: Callable[..., Sequence[Tensor]], save_outputs: bool) -> Any:
    """An autograd.Function around ``operation`` whose backward is ``pull(ctx, cotangents)``."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ints: Any, floats: Any, *tensors: Any) -> Any:
            return tuple(operation(list(tensors), list(ints), list(floats)))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.ints, ctx.floats, *tensors = inputs
            ctx.save_for_backward(*tensors, *(output if save_outputs else ()))

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            return None, None, *pull(ctx, cotangents)

        @staticmethod
        def vmap(info: Any, in_dims: Any, ints: Any, floats: Any, *tensors: Any) -> Any:
            size = info.batch_size
            folded = [
                (tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).flatten(0, 1)
                for tensor, dim in zip(tensors, in_dims[2:], strict=True)
            ]
            outputs = Function.apply(ints, floats, *folded)
            return tuple(output.unflatten(0, (size, -1)) for output in outputs), (0,) * len(outputs)

    Function.__name__ = Function.__qualname__ = f"titanfunc_{name}"
    return Function
