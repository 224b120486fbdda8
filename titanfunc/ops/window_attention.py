"""Attention over a sliding window: each token sees the last W tokens of its own document, itself among them.

Rotary positions are the caller's, on q and keys alike: they depend on differences alone, so any common origin will do.
A block of keys is read by (W + block) / block blocks of queries in each of three kernels; rotated beforehand, once, it
can be loaded straight into the matrix products. A prefix has no position, so it is asked by the queries as they were
before their rotation.

Letters: B batch, H heads, T tokens, D head size, W window in tokens, P prefix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from titanfunc.ops._bind import bind
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless

HEAD_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)


def window_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    age: Tensor,
    prefix: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    kernels: str = "reference",
) -> Tensor:
    """Softmax attention with scores / sqrt(D), taken in float32: y [B, H, T, D] for q [B, H, T, D].

    keys, values: [B, H, W + T, D], the W tokens before the first (whatever stands where there were none), then the T
    new ones. age: int64 [B, T], at least 0, how many tokens of its own document come before each token. Token t sees
    token s where 0 <= t - s < W and t - s <= age[t]. prefix: (queries [B, H, T, D] without position, keys, values
    [H, P, D]) that every token sees.

    kernels: "reference", or "triton" for bfloat16 and float32 with head sizes 16, 32, 64, 128. Raises ValueError where
    shapes do not fit together. Source of the prefix: Titans (arXiv 2501.00663), section 3.3 and figure 3.
    """
    _check_shapes(q, keys, values, age, prefix)
    if prefix is not None and not prefix[1].shape[-2]:
        prefix = None
    tensors = [q, keys, values, age]
    if prefix is not None:
        tensors += [prefix[0], *(x.expand(q.shape[0], *x.shape) for x in prefix[1:])]
    y: Tensor = implementation("window_attention", kernels)(tensors)
    return y


def check_kernel(operation: str, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless the kernels of attention take ``tensors``, by name, each [..., D]."""
    first = next(iter(tensors.values()))
    refuse_unless(first.shape[-1] in HEAD_SIZES, operation, "head size", f"one of {HEAD_SIZES}", first.shape[-1])
    for name, tensor in tensors.items():
        refuse_unless(tensor.dtype in DTYPES, operation, f"dtype of {name}", "float32 or bfloat16", tensor.dtype)
        refuse_unless(tensor.dtype == first.dtype, operation, f"dtype of {name}", f"{first.dtype}", tensor.dtype)
    check_device(operation, **tensors)


def _check_shapes(
    q: Tensor, keys: Tensor, values: Tensor, age: Tensor, prefix: tuple[Tensor, Tensor, Tensor] | None
) -> None:
    def require(ok: bool, argument: str, wanted: str, got: object) -> None:
        if not ok:
            raise ValueError(f"window_attention: {argument}: wanted {wanted}, got {got}")

    require(q.ndim == 4 and q.shape[2] > 0, "q", "[B, H, T, D] of at least one token", tuple(q.shape))
    batch, heads, tokens, size = q.shape
    ok = keys.ndim == 4 and keys.shape == (batch, heads, keys.shape[2], size) and keys.shape[2] > tokens
    require(ok, "keys", f"[{batch}, {heads}, W + {tokens}, {size}] with W of at least 1", tuple(keys.shape))
    require(values.shape == keys.shape, "values", f"{tuple(keys.shape)}, as keys", tuple(values.shape))
    require(age.shape == (batch, tokens), "age", f"[{batch}, {tokens}]", tuple(age.shape))
    require(age.dtype == torch.int64, "age", "int64", age.dtype)
    if prefix is not None:
        queries, fixed, seen = prefix
        require(queries.shape == q.shape, "prefix[0]", f"{tuple(q.shape)}, as q", tuple(queries.shape))
        ok = fixed.ndim == 3 and fixed.shape == (heads, fixed.shape[1], size)
        require(ok, "prefix[1]", f"[{heads}, P, {size}]", tuple(fixed.shape))
        require(seen.shape == fixed.shape, "prefix[2]", f"{tuple(fixed.shape)}, as prefix[1]", tuple(seen.shape))


@implements("window_attention", "reference")
def _reference(tensors: Sequence[Tensor]) -> Tensor:
    q, keys, values, age, *prefix = tensors
    tokens, length = q.shape[2], keys.shape[2]
    window = length - tokens
    distance = torch.arange(window, length, device=q.device).unsqueeze(-1) - torch.arange(length, device=q.device)
    mask = (distance >= 0) & (distance < window) & (distance <= age.unsqueeze(-1))
    scores = wide(q @ keys.mT).masked_fill(~mask.unsqueeze(1), float("-inf"))
    if prefix:
        scores = torch.cat([wide(prefix[0] @ prefix[1].mT), scores], -1)
        values = torch.cat([prefix[2], values], -2)
    return torch.softmax(scores / math.sqrt(q.shape[-1]), -1).to(values.dtype) @ values


def wide(x: Tensor) -> Tensor:
    """x of any shape in float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@implements("window_attention", "triton")
def _triton(tensors: Sequence[Tensor]) -> Tensor:
    q, keys, values, age, *prefix = tensors
    named = {"q": q, "keys": keys, "values": values}
    check_kernel("window_attention", named | {f"prefix[{i}]": x for i, x in enumerate(prefix)})
    check_device("window_attention", q=q, age=age)
    return _bound(tensors, (), ())[0]


def _arguments(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """What the kernels are launched with."""
    q, keys, values, age, *prefix = tensors
    if not prefix:
        return q, keys, values, None, None, None, age, 0
    return q, keys, values, None, (prefix[1], prefix[2]), prefix[0], age, 0


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import attention

    return list(attention.forward(*_arguments(tensors)))  # type: ignore[arg-type]


def fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    """y [B, H, T, D] and the log-sum-exp of the scores, float32 [B, H, T], empty, for tensors that begin with q."""
    q = tensors[0]
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return [y, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)]


def _backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import attention_backward

    grads = list(attention_backward.backward(*_arguments(tensors), *outputs, *cotangents))  # type: ignore[arg-type]
    return [*grads[:3], tensors[3], *grads[3:]]


_bound = bind(
    "window_attention", _forward, fake, _backward,
    residuals=1, dense=True, reference=lambda tensors, ints, floats: [_reference(tensors)],
)  # fmt: skip
