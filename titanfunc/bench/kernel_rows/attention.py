"""Rows of the attention over a window and over a MAC's segments.

Letters: B batch, H heads, T tokens, D head size, W window, S tokens of a segment, P prefix.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from titanfunc.nn import WindowCache, rotary_table, rotate
from titanfunc.nn import window_attention as block_by_block
from titanfunc.ops.segment_attention import segment_attention
from titanfunc.ops.window_attention import window_attention


def _draw(device, *shapes):
    source = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=source, device=device).bfloat16() for shape in shapes]


def _ages(b, t, filled, device):
    return (filled + torch.arange(t, device=device)).expand(b, t).contiguous()


def _window_inputs(b, h, t, w, d, p, filled, device):
    """Queries, keys and values of new tokens and of the cache, not rotated; ages; the prefix."""
    rows, cache, prefix = (b, h, t, d), (b, h, w, d), (h, p, d)
    q, k, v, old_k, old_v, *fixed = _draw(device, *[rows] * 3, *[cache] * 2, *[prefix] * (2 if p else 0))
    return q, k, v, old_k, old_v, _ages(b, t, filled, device), *fixed


def _window(q, k, v, old_k, old_v, age, *fixed):
    """What a model does: joins the cache, rotates, attends."""
    keys, values = torch.cat([old_k, k], -2), torch.cat([old_v, v], -2)
    table = rotary_table(torch.arange(keys.shape[-2], device=q.device), q.shape[-1], q.dtype)
    here = type(table)(*(x[old_k.shape[-2] :] for x in table))
    prefix = (q, *fixed) if fixed else None
    return window_attention(rotate(q, here), rotate(keys, table), values, age, prefix, kernels="triton")


def _block_by_block(q, k, v, old_k, old_v, age, *fixed):
    cache = WindowCache(old_k, old_v, age[:, 0])
    return block_by_block(q, k, v, cache, age, fixed or None)[0]


def _alone_inputs(b, h, t, w, d, p, filled, device):
    """What the operation takes."""
    shapes = [(b, h, t, d), *[(b, h, w + t, d)] * 2, *([(b, h, t, d), (h, p, d), (h, p, d)] if p else [])]
    q, keys, values, *prefix = _draw(device, *shapes)
    return q, keys, values, _ages(b, t, filled, device), *prefix


def _alone(kernels, q, keys, values, age, *prefix):
    return window_attention(q, keys, values, age, prefix or None, kernels=kernels)


def _segment_inputs(b, h, t, d, p, context, device):
    return _draw(device, *[(b, h, t, d)] * (5 if context else 3), *[(h, p, d)] * (2 if p else 0))


def _segments(kernels, segment, context, q, keys, values, *rest):
    read, prefix = (rest[:2], rest[2:]) if context else (None, rest)
    return segment_attention(q, keys, values, segment, read, prefix or None, kernels=kernels)


def _by_torch_window(q, keys, values, age):
    """The same by torch's own attention under a mask. It knows no prefix, which is asked by queries of its own."""
    tokens, length = q.shape[2], keys.shape[2]
    window = length - tokens
    distance = torch.arange(window, length, device=q.device).unsqueeze(-1) - torch.arange(length, device=q.device)
    mask = (distance >= 0) & (distance < window) & (distance <= age.unsqueeze(-1))
    return F.scaled_dot_product_attention(q, keys, values, mask.unsqueeze(1))


def _by_torch_segments(segment, context, q, keys, values, *rest):
    b, _, t, _ = q.shape
    parts = [(keys, values)] + ([rest[:2]] if context else [])
    prefix = rest[2 * context :]
    whole = [[x.unflatten(2, (-1, segment)).movedim(2, 1).flatten(0, 1) for x in part] for part in parts]
    past = torch.ones(segment, segment, dtype=torch.bool, device=q.device).tril()
    masks = [past] * len(parts)
    if prefix:
        whole.append([x.expand(b * (t // segment), *x.shape) for x in prefix])
        masks.append(past.new_ones(segment, prefix[0].shape[1]))
    keys, values = (torch.cat(each, -2) for each in zip(*whole, strict=True))
    rows = q.unflatten(2, (-1, segment)).movedim(2, 1).flatten(0, 1)
    y = F.scaled_dot_product_attention(rows, keys, values, torch.cat(masks, -1))
    return y.unflatten(0, (b, -1)).movedim(1, 2).flatten(2, 3)


def _flops(pairs, grad, q, *_):
    """Two products of a query's seen keys forward (``pairs`` of each row), five more backward."""
    b, h, _, d = q.shape
    return (14 if grad else 4) * b * h * pairs * d


def _row(name, make, kernel, reference, pairs, grad):
    return {
        "name": f"{name}{' forward' * (not grad)}", "make": make, "kernel": kernel, "reference": reference,
        "flops": partial(_flops, pairs, grad), "grad": grad,
    }  # fmt: skip


ROWS = []
for _grad in (False, True):
    for _b, _h, _t, _w, _d, _p, _filled in (
        (16, 16, 1024, 512, 64, 0, 512), (16, 16, 1024, 512, 64, 16, 512), (16, 16, 1024, 512, 64, 16, 0),
        (8, 12, 2048, 512, 64, 16, 512),
    ):  # fmt: skip
        _size = f"B{_b} H{_h} T{_t} W{_w} D{_d} P{_p}{' fresh' * (not _filled)}"
        _shape = (_b, _h, _t, _w, _d, _p, _filled)
        _pairs = sum(min(_filled + t + 1, _w) for t in range(_t)) + _t * _p
        _alone_row = partial(_alone, "triton"), partial(_alone, "reference")
        ROWS += [
            _row(f"window {_size}", partial(_window_inputs, *_shape), _window, _block_by_block, _pairs, _grad),
            _row(f"window alone {_size}", partial(_alone_inputs, *_shape), *_alone_row, _pairs, _grad),
        ]
        if not _p:
            _name, _beside = f"window against torch's attention {_size}", (_alone_row[0], _by_torch_window)
            ROWS.append(_row(_name, partial(_alone_inputs, *_shape), *_beside, _pairs, _grad))
    for _b, _h, _t, _s, _d, _p, _context in (
        (16, 16, 1024, 512, 64, 16, True), (16, 16, 1024, 512, 64, 16, False), (8, 12, 2048, 512, 64, 16, True),
        (32, 4, 1024, 64, 32, 4, True),
    ):  # fmt: skip
        _size = f"B{_b} H{_h} T{_t} S{_s} D{_d} P{_p}{' with context' * _context}"
        _pairs = _t * ((1 + _context) * (_s + 1) / 2 + _p)
        _make = partial(_segment_inputs, _b, _h, _t, _d, _p, _context)
        _kernel, _plain = (partial(_segments, kernels, _s, _context) for kernels in ("triton", "reference"))
        _theirs = partial(_by_torch_segments, _s, _context)
        ROWS += [
            _row(f"segments {_size}", _make, _kernel, _plain, _pairs, _grad),
            _row(f"segments against torch's attention {_size}", _make, _kernel, _theirs, _pairs, _grad),
        ]
