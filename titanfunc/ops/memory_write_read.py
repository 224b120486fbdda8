"""Writing chunks into wide memories and reading them at every token, in one operation.

Letters: B batch, H memory heads, M = B H, N chunks, C tokens a chunk, D head size, F hidden size, L layers (1 or 2).

The same as memory_write and then memory_read, whose histories of W and S are the largest tensors of a model: in one
operation their cotangents, as large again, are never made. A chunk's backward takes them as products of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc.config.rule import OBJECTIVES
from titanfunc.ops._bind import Bound, bind
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless
from titanfunc.ops.memory_write import arguments, check_chunks, settings, write_chunks, written_of
from titanfunc.ops.memory_write_kernels import Outputs, check_wide, check_write, takes_small
from titanfunc.ops.objective import L2, Objective

_NAME = "memory_write_read"
Write = Callable[[list[Tensor], list[int], list[float]], Sequence[Tensor]]
_READ = 4  # q and the gates of reads: the last tensors of the operation


class WrittenRead(NamedTuple):
    """y: reads [B, H, N, C, D] in q's dtype. last_weights, last_momentum, anchor: lists of [B, H, ...], loss and kept:
    [B, H, N, C], as in ops/memory_write.py."""

    y: Tensor
    last_weights: list[Tensor]
    last_momentum: list[Tensor]
    anchor: list[Tensor]
    loss: Tensor
    kept: Tensor


def memory_write_read(
    write: Sequence[Tensor],
    q: Tensor,
    keep_weights: Tensor,
    momentum_to_weights: Tensor,
    to_weights: Tensor,
    *,
    depth: int,
    clip: float,
    objective: Objective = L2,
    first_order: bool = False,
    kernels: str = "reference",
) -> WrittenRead:
    """memory_write of ``write``, its tensors in order (weights, momentum, anchor, k, v, .., refresh), and memory_read
    of q [B, H, N, C, D] with keep_weights, momentum_to_weights [B, H, N, C] and to_weights [B, H, N, C, C].

    kernels: "reference", which is these two, or "triton" for wide memories alone; this raises ValueError for what its
    kernels do not take (ops/memory_write_kernels.py), for small memories, for q that is not like k, and for gates that
    are not float32. Second derivatives are the reference's. Raises ValueError for no chunk.
    """
    tensors, count = [*write, q, keep_weights, momentum_to_weights, to_weights], (len(write) - 9) // 3
    check_chunks(arguments(list(write), count).k)
    ints = [depth, count, OBJECTIVES.index(objective.kind), int(first_order)]
    out = list(implementation(_NAME, kernels)(tensors, ints, [clip, objective.parameter, objective.scale]))
    weights, momentum, anchor = (out[1 + i * count : 1 + (i + 1) * count] for i in range(3))
    return WrittenRead(out[0], weights, momentum, anchor, out[3 * count + 1], out[3 * count + 2])


@implements(_NAME, "triton")
def _triton(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Sequence[Tensor]:
    _check(tensors, ints, floats)
    return _BOUND[ints[0] - 1](tensors, ints, floats)


def _check(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> None:
    write, (q, keep, pace, to_weights) = tensors[:-_READ], tensors[-_READ:]
    check_write(write, ints, floats)
    a = arguments(list(write), ints[1])
    rows = a.k.shape[:4]
    small = takes_small(ints[0], rows[3], a.k.shape[-1], a.weights[0].shape[-1], a.k.dtype)
    refuse_unless(not small, _NAME, "weights", "wide memories", "small ones")
    check_wide(a.k)
    refuse_unless(q.shape == a.k.shape and q.dtype == a.k.dtype, _NAME, "q", f"{tuple(a.k.shape)} in {a.k.dtype}",
                  f"{tuple(q.shape)} in {q.dtype}")  # fmt: skip
    for name, gate, shape in (
        ("keep_weights", keep, rows), ("momentum_to_weights", pace, rows), ("to_weights", to_weights, (*rows, rows[3]))
    ):  # fmt: skip
        refuse_unless(gate.shape == shape and gate.dtype == torch.float32, _NAME, name, f"float32 {tuple(shape)}",
                      f"{gate.dtype} {tuple(gate.shape)}")  # fmt: skip
    check_device(_NAME, k=a.k, q=q, keep_weights=keep, momentum_to_weights=pace, to_weights=to_weights)


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One axis M in place of B and H, contiguous."""
    return [x.contiguous().flatten(0, 1) for x in tensors]


def _as_kernel(tensors: Sequence[Tensor], ints: Sequence[int]) -> tuple[list[Any], Tensor, Any]:
    """The write's arguments, q and the gates of reads, as the kernels take them."""
    from titanfunc_kernels.memory_wide_read import Gates

    flat = _flat(tensors)
    a = arguments(flat[:-_READ], ints[1])
    return [*a[:12]], flat[-_READ], Gates(*flat[-_READ + 1 :])


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import memory_wide, memory_wide_read

    given, q, gates = _as_kernel(tensors, ints)
    write: Callable[..., memory_wide.Outputs] = memory_wide.forward
    out = write(*given, floats[0], q.dtype)
    y, *hidden = memory_wide_read.forward(q, out.weights, out.momentum, out.inputs, out.errors, gates)
    seen = [*out.last_weights, *out.last_momentum, *out.anchor, out.loss, out.kept]
    rows = [*out.weights, *out.momentum, *out.inputs, *out.errors]
    return [x.unflatten(0, tensors[-_READ].shape[:2]) for x in (y, *seen, *rows, *out.residuals, *hidden)]


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    a, depth = arguments(tensors[:-_READ], ints[1]), ints[0]
    k, rows, hidden = a.k, a.k.shape[:4], a.weights[0].shape[-1]
    last = [w.new_empty(w.shape) for w in [*a.weights, *a.momentum, *a.anchor]]
    scalars = [a.weights[0].new_empty(rows) for _ in range(2)]
    past = [k.new_empty((*rows[:3], *w.shape[2:])) for w in [*a.weights, *a.momentum]]
    made = [k.new_empty((*rows, w.shape[side])) for side in (-2, -1) for w in a.weights]
    errors = [a.weights[0].new_empty(k.shape), k.new_empty(k.shape), a.weights[0].new_empty((*rows, 2 * depth))]
    between = [k.new_empty((*rows, hidden)) for _ in range(3 * (depth - 1))]
    return [k.new_empty(k.shape), *last, *scalars, *past, *made, *errors, *between]


def _backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import memory_wide_backward, memory_wide_read

    depth, _, clip, _, first_order = settings(ints, floats)
    given, q, gates = _as_kernel(tensors, ints)
    seen = 3 * depth + 3
    _, *kept = _flat(outputs[:seen])
    rows = _flat(outputs[seen:])
    past, residuals, z = rows[: 2 * depth], rows[4 * depth : 6 * depth + 1], [*rows[6 * depth + 1 :], None][0]
    results = Outputs(
        *written_of([*past, *kept[:-2], *rows[2 * depth : 4 * depth], *kept[-2:]], depth, depth), residuals=residuals
    )
    d_y, *d_states, d_loss, _ = _flat(cotangents)
    d_last = [d_states[i * depth : (i + 1) * depth] for i in range(3)]
    pulled = memory_wide_read.backward(
        q, results.weights, results.momentum, results.inputs, results.errors, gates, z, d_y
    )
    pull: Callable[..., list[Tensor]] = memory_wide_backward.backward
    grads = pull(
        *given, clip, results, [], [], *d_last, pulled.inputs, pulled.errors, d_loss, first_order, pulled.reads
    )
    every = [*grads, torch.zeros_like(given[-1]), pulled.queries, *pulled.gates]
    return [x.unflatten(0, tensors[-_READ].shape[:2]) for x in every]


def _then_read(
    write: Write, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]
) -> Sequence[Tensor]:
    """The same outputs by ``write`` and by memory_read's reference."""
    depth, count, *_ = ints
    q, *gates = tensors[-_READ:]
    out = written_of(write(list(tensors[:-_READ]), list(ints), list(floats)), depth, count)
    rows = [q, *out.weights, *out.momentum, *out.inputs, *out.errors, *gates]
    y = implementation("memory_read", "reference")(rows, [depth, count], [])[0]
    return [y, *out.last_weights, *out.last_momentum, *out.anchor, out.loss, out.kept]


@implements(_NAME, "reference")
def _reference(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Sequence[Tensor]:
    return _then_read(implementation("memory_write", "reference"), tensors, ints, floats)


def _bound(depth: int) -> Bound:
    return bind(
        f"{_NAME}{depth}", _forward, _fake, _backward, residuals=7 * depth, dense=True,
        reference=partial(_then_read, write_chunks),
    )  # fmt: skip


_BOUND = _bound(1), _bound(2)
