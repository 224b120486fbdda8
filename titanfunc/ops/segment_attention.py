"""Attention inside segments, with the memory's context and persistent tokens beside them: MAC's mask.

Letters: B batch, H heads, T tokens, R segments, S tokens of a segment, D head size, P prefix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from titanfunc.ops._bind import bind
from titanfunc.ops.backend import implementation, implements
from titanfunc.ops.window_attention import check_kernel, fake, wide


def segment_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    segment: int,
    context: tuple[Tensor, Tensor] | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    *,
    kernels: str = "reference",
) -> Tensor:
    """Softmax attention with scores / sqrt(D), taken in float32: y [B, H, T, D] for q [B, H, T, D], T = R S.

    The token at slot i of a segment of S = ``segment`` tokens sees the prefix (keys, values [H, P, D]), the first i + 1
    of the segment's context tokens (keys, values [B, H, T, D]) and the first i + 1 of the segment's own (``keys``,
    ``values`` [B, H, T, D]). Rotary positions are the caller's; the prefix is asked by the same q as the others.

    kernels: "reference", or "triton" for bfloat16 and float32 with head sizes 16, 32, 64, 128. Raises ValueError where
    shapes do not fit together. Source: Titans (arXiv 2501.00663), equations 21 to 23 and figure 3a.
    """
    _check_shapes(q, keys, values, segment, context, prefix)
    if prefix is not None and not prefix[0].shape[-2]:
        prefix = None
    tensors = [q, keys, values, *(context or ()), *(x.expand(q.shape[0], *x.shape) for x in prefix or ())]
    ints = (segment, int(context is not None))
    y: Tensor = implementation("segment_attention", kernels)(tensors, ints)
    return y


def _check_shapes(
    q: Tensor, keys: Tensor, values: Tensor, segment: int,
    context: tuple[Tensor, Tensor] | None, prefix: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    def require(ok: bool, argument: str, wanted: str, got: object) -> None:
        if not ok:
            raise ValueError(f"segment_attention: {argument}: wanted {wanted}, got {got}")

    require(q.ndim == 4 and q.shape[2] > 0, "q", "[B, H, T, D] of at least one token", tuple(q.shape))
    ok = isinstance(segment, int) and segment > 0 and q.shape[2] % segment == 0
    require(ok, "segment", f"a divisor of the {q.shape[2]} tokens", segment)
    named = {"keys": keys, "values": values}
    if context is not None:
        named |= {"context[0]": context[0], "context[1]": context[1]}
    for name, x in named.items():
        require(x.shape == q.shape, name, f"{tuple(q.shape)}, as q", tuple(x.shape))
    if prefix is not None:
        ok = prefix[0].ndim == 3 and prefix[0].shape == (q.shape[1], prefix[0].shape[1], q.shape[3])
        require(ok, "prefix[0]", f"[{q.shape[1]}, P, {q.shape[3]}]", tuple(prefix[0].shape))
        same = prefix[1].shape == prefix[0].shape
        require(same, "prefix[1]", f"{tuple(prefix[0].shape)}, as prefix[0]", tuple(prefix[1].shape))


Pair = tuple[Tensor, Tensor]


def _split(tensors: Sequence[Tensor], has_context: int) -> tuple[Pair | None, Pair | None]:
    """The context's and the prefix's keys and values among what comes after q, keys and values."""
    rest = list(tensors[3:])
    context = (rest.pop(0), rest.pop(0)) if has_context else None
    return context, (rest[0], rest[1]) if rest else None


@implements("segment_attention", "reference")
def _reference(tensors: Sequence[Tensor], ints: Sequence[int]) -> Tensor:
    segment, has_context = ints
    context, prefix = _split(tensors, has_context)
    # [B, H, R, S, D]
    q, keys, values = (x.unflatten(2, (-1, segment)) for x in tensors[:3])
    hidden = torch.ones(segment, segment, dtype=torch.bool, device=q.device).triu(1)

    def causal(keys: Tensor) -> Tensor:
        return wide(q @ keys.mT).masked_fill(hidden, float("-inf"))

    scores, seen = [causal(keys)], [values]
    if context is not None:
        scores.insert(0, causal(context[0].unflatten(2, (-1, segment))))
        seen.insert(0, context[1].unflatten(2, (-1, segment)))
    if prefix is not None:
        scores.insert(0, wide(q @ prefix[0].unsqueeze(2).mT))
        seen.insert(0, prefix[1].unsqueeze(2).expand(*q.shape[:3], *prefix[1].shape[2:]))
    weights = torch.softmax(torch.cat(scores, -1) / math.sqrt(q.shape[-1]), -1)
    return (weights.to(values.dtype) @ torch.cat(seen, -2)).flatten(2, 3)


@implements("segment_attention", "triton")
def _triton(tensors: Sequence[Tensor], ints: Sequence[int]) -> Tensor:
    context, prefix = _split(tensors, ints[1])
    named = dict(zip(("q", "keys", "values"), tensors, strict=False))
    for name, pair in (("context", context), ("prefix", prefix)):
        named |= {f"{name}[{i}]": x for i, x in enumerate(pair or ())}
    check_kernel("segment_attention", named)
    return _bound(tensors, ints, ())[0]


def _arguments(tensors: Sequence[Tensor], ints: Sequence[int]) -> tuple[object, ...]:
    """What the kernels are launched with."""
    context, prefix = _split(tensors, ints[1])
    return *tensors[:3], context, prefix, None, None, ints[0]


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import attention

    return list(attention.forward(*_arguments(tensors, ints)))  # type: ignore[arg-type]


def _backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import attention_backward

    return list(attention_backward.backward(*_arguments(tensors, ints), *outputs, *cotangents))  # type: ignore[arg-type]


_bound = bind(
    "segment_attention", _forward, fake, _backward,
    residuals=1, dense=True, reference=lambda tensors, ints, floats: [_reference(tensors, ints)],
)  # fmt: skip
