"""Writing chunks into memories with Triton kernels: which of them takes which memories, bound as one operation each.

Letters: B batch, H memory heads, M = B H memories, N chunks, C tokens a chunk, D head size, F hidden size.

Small memories (``takes_small``) have a few programs each, which run through all chunks forward and take a launch a
chunk backward; wide ones take a chain of launches a chunk that fills the device. Both answer what the reference of
ops/memory_write.py does, with two differences: histories come in k's dtype, and second derivatives are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc.ops._bind import Bound, bind
from titanfunc.ops.backend import check_device, refuse_unless
from titanfunc.ops.memory_write import Arguments, arguments, settings, write_chunks, written_of

SMALL_HEADS = (16, 32, 64, 128)
SMALL_CHUNKS = (16, 32, 64, 128)
WIDE_MEMORIES = 65535  # a launch's third axis
SMALL_FLOAT32 = 64 * 64  # numbers of a chunk's keys: beyond, float32 tiles do not fit into shared memory
_NAME = "memory_write"


def takes_small(depth: int, tokens: int, head: int, hidden: int, dtype: torch.dtype) -> bool:
    """Whether memories of this shape, with products in ``dtype``, are written as small ones."""
    fits = depth == 1 or hidden in (head, 2 * head, 4 * head)
    fits = fits and (dtype == torch.bfloat16 or tokens * head <= SMALL_FLOAT32)
    return fits and head in SMALL_HEADS and tokens in SMALL_CHUNKS


def write(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Sequence[Tensor]:
    """The operation of ops/memory_write.py, its tensors [B, H, ...] -> the leaves of Written in order, [B, H, ...].

    Raises ValueError for what the kernels do not take: biases, depth above 2, another objective than the plain squared
    error, documents, weights that are not float32, k and v that are neither float32 nor bfloat16, a CPU.
    """
    check_write(tensors, ints, floats)
    a = arguments(tensors, ints[1])
    depth, (tokens, head) = ints[0], a.k.shape[-2:]
    small = takes_small(depth, tokens, head, a.weights[0].shape[-1], a.k.dtype)
    if not small:
        check_wide(a.k)
    operation = _SMALL if small else _WIDE[depth - 1]
    out = operation(tensors, ints, floats)
    return out[: 5 * ints[1] + 2 * depth + 2]


def check_wide(k: Tensor) -> None:
    """Raises ValueError for no memory, or more of them than one launch of the wide kernels counts; k [B, H, ...]."""
    memories = k.shape[0] * k.shape[1]
    refuse_unless(0 < memories <= WIDE_MEMORIES, _NAME, "k", f"1 to {WIDE_MEMORIES} wide memories", memories)


def check_write(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> None:
    """Raises ValueError for tensors [B, H, ...] and settings that no kernel takes (:func:`write`)."""
    depth, count, clip, objective, _ = settings(ints, floats)
    a = arguments(tensors, count)
    refuse_unless(depth <= 2, _NAME, "depth", "1 or 2 layers", depth)
    refuse_unless(count == depth, _NAME, "weights", "matrices alone", "biases")
    refuse_unless(objective.kind == "l2", _NAME, "objective", "l2", objective.kind)
    refuse_unless(objective.scale == 1, _NAME, "objective", "a sum over features", "a mean")
    refuse_unless(a.restart is None, _NAME, "restart", "no documents", "some")
    refuse_unless(0 <= clip < float("inf"), _NAME, "clip", "a number of at least 0", clip)
    refuse_unless(a.k.ndim == 5 and a.v.shape == a.k.shape, _NAME, "k, v", "one shape [B, H, N, C, D]",
                  f"{tuple(a.k.shape)} and {tuple(a.v.shape)}")  # fmt: skip
    wanted = (torch.float32, torch.bfloat16)
    refuse_unless(a.k.dtype in wanted and a.v.dtype == a.k.dtype, _NAME, "k, v", "float32 or bfloat16, both alike",
                  f"{a.k.dtype} and {a.v.dtype}")  # fmt: skip
    batch, heads, chunks, tokens, head = a.k.shape
    hidden = a.weights[0].shape[-1]
    sizes = [(head, head)] if depth == 1 else [(head, hidden), (hidden, head)]
    for name, leaves in (("weights", a.weights), ("momentum", a.momentum), ("anchor", a.anchor)):
        for leaf, size in zip(leaves, sizes, strict=True):
            refuse_unless(leaf.shape == (batch, heads, *size), _NAME, name, str([batch, heads, *size]),
                          tuple(leaf.shape))  # fmt: skip
            refuse_unless(leaf.dtype == torch.float32, _NAME, name, "float32", leaf.dtype)
    for name, gates, shape in _GATES:
        gate = getattr(a, name)
        want = (batch, heads, chunks, tokens)[:shape]
        refuse_unless(gate.shape == want, _NAME, name, gates, tuple(gate.shape))
        refuse_unless(gate.dtype == torch.float32, _NAME, name, "float32", gate.dtype)
    check_device(_NAME, **{name: given for name, given in a._asdict().items() if given is not None})


_GATES = (
    *((name, "[B, H, N, C]", 4) for name in ("inner_lr", "to_weights", "to_momentum")),
    *((name, "[B, H, N]", 3) for name in ("keep_weights", "momentum_to_weights", "keep_momentum", "refresh")),
)


class Outputs(NamedTuple):
    """What a kernel's backward is given of its forward's results: lists of [M, ...], tensors [M, N, C], residuals."""

    weights: list[Tensor]
    momentum: list[Tensor]
    last_weights: list[Tensor]
    last_momentum: list[Tensor]
    anchor: list[Tensor]
    inputs: list[Tensor]
    errors: list[Tensor]
    loss: Tensor
    kept: Tensor
    residuals: list[Tensor]


def _per_memory(a: Arguments) -> list[Any]:
    """The kernels' arguments in order, contiguous, with one axis M in place of B and H."""

    def one(x: Tensor) -> Tensor:
        return x.contiguous().flatten(0, 1)

    lists = [[one(leaf) for leaf in leaves] for leaves in a[:3]]
    return [*lists, *(one(x) for x in a[3:12])]


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.contiguous().flatten(0, 1) for x in tensors]


def _run(forward: Callable[..., Any], tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    """A kernel's forward, its results in one list with B and H in place of M."""
    a = arguments(tensors, ints[1])
    *lists, loss, kept, residuals = forward(*_per_memory(a), floats[0], a.k.dtype)
    every = [*(leaf for leaves in lists for leaf in leaves), loss, kept, *residuals]
    return [x.unflatten(0, a.k.shape[:2]) for x in every]


def _pull(
    backward: Callable[..., list[Tensor]],
    tensors: list[Tensor],
    outputs: list[Tensor],
    cotangents: list[Tensor],
    ints: list[int],
    floats: list[float],
) -> list[Tensor]:
    """A kernel's backward, likewise."""
    depth, count, clip, _, first_order = settings(ints, floats)
    a = arguments(tensors, count)
    whole, given = _flat(outputs), written_of(_flat(cotangents), depth, count)
    results = Outputs(*written_of(whole, depth, count), residuals=whole[5 * count + 2 * depth + 2 :])
    grads = backward(*_per_memory(a), clip, results, *given[:-1], first_order=first_order)
    return [*(x.unflatten(0, a.k.shape[:2]) for x in grads), torch.zeros_like(a.refresh)]


def _forward_wide(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import memory_wide

    return _run(memory_wide.forward, tensors, ints, floats)


def _forward_small(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import memory_small

    return _run(memory_small.forward, tensors, ints, floats)


def _backward_wide(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import memory_wide_backward

    return _pull(memory_wide_backward.backward, tensors, outputs, cotangents, ints, floats)


def _backward_small(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import memory_small_backward

    return _pull(memory_small_backward.backward, tensors, outputs, cotangents, ints, floats)


def _fake_small(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    a = arguments(tensors, ints[1])
    rows = a.k.shape[:4]
    past = [a.k.new_empty((*rows[:3], *w.shape[2:])) for w in [*a.weights, *a.momentum]]
    last = [w.new_empty(w.shape) for w in [*a.weights, *a.momentum, *a.anchor]]
    inputs = [a.k.new_empty((*rows, w.shape[-2])) for w in a.weights]
    errors = [a.k.new_empty((*rows, w.shape[-1])) for w in a.weights]
    return [*past, *last, *inputs, *errors, *(a.weights[0].new_empty(rows) for _ in range(2))]


def _fake_wide(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    depth, a = ints[0], arguments(tensors, ints[1])
    rows, hidden = a.k.shape[:4], a.weights[0].shape[-1]
    errors = [a.k.new_empty(a.k.shape, dtype=torch.float32), a.k.new_empty(a.k.shape)]
    norms = a.k.new_empty((*rows, 2 * depth), dtype=torch.float32)
    between = [a.k.new_empty((*rows, hidden)) for _ in range(2 * (depth - 1))]
    return [*_fake_small(tensors, ints, floats), *errors, norms, *between]


def _reference(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Sequence[Tensor]:
    """The same outputs [B, H, ...] in plain torch, histories in k's dtype."""
    out, past = write_chunks(list(tensors), list(ints), list(floats)), 2 * ints[1]
    dtype = arguments(tensors, ints[1]).k.dtype
    return [*(x.to(dtype) for x in out[:past]), *out[past:]]


_SMALL: Bound = bind(
    "memory_write_small", _forward_small, _fake_small, _backward_small, dense=True, reference=_reference
)
_WIDE: tuple[Bound, ...] = tuple(
    bind(
        f"memory_write_wide{depth}", _forward_wide, _fake_wide, _backward_wide,
        residuals=2 * depth + 1, dense=True, reference=_reference,
    )
    for depth in (1, 2)
)  # fmt: skip
