"""Calls of the memory write's raw kernels, of small and of wide memories: they have one signature.

Letters: M memories, N chunks, C tokens a chunk, D head size, F hidden size (0: depth 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tuning.case import Calls, draw, like


def arguments(m: int, n: int, c: int, d: int, f: int, device: torch.device) -> list[Any]:
    """What forward takes up to refresh: lists of weights, momentum and anchor, bfloat16 k and v, gates."""
    shapes = [(m, d, f), (m, f, d)] if f else [(m, d, d)]
    weights = [w * w.shape[1] ** -0.5 for w in draw(device, *shapes)]
    rows = draw(device, (m, n, c, d), (m, n, c, d), seed=1)
    k, v = (torch.nn.functional.normalize(t, dim=-1).bfloat16() for t in rows)
    theta, g, s = (torch.sigmoid(t) for t in draw(device, *[(m, n, c)] * 3, seed=2))
    factors = [torch.sigmoid(t) for t in draw(device, *[(m, n)] * 3, seed=3)]
    momentum = [0.1 * w for w in weights]
    return [weights, momentum, [w.clone() for w in weights], k, v, 3.2 / c * theta, g, s, *factors,
            torch.ones(m, n, device=device)]  # fmt: skip


def calls(
    forward: Callable[..., Any], backward: Callable[..., Any], sizes: Sequence[int], clip: float, first_order: bool,
    device: torch.device,
) -> Calls:  # fmt: skip
    """forward and backward of memories of ``sizes`` (M, N, C, D, F). Cotangents are drawn in the first backward."""
    given = arguments(*sizes, device)
    drawn: list[Any] = []

    def pull(scan: Any) -> list[Tensor]:
        if not drawn:
            lists = (scan.weights, scan.momentum, scan.last_weights, scan.last_momentum, scan.anchor, scan.inputs,
                     scan.errors)  # fmt: skip
            drawn.extend(like(each, seed=100 + i) for i, each in enumerate(lists))
            drawn.extend(like([scan.loss], seed=99))
        return backward(*given, clip, scan, *drawn, first_order)

    return Calls(lambda: forward(*given, clip, torch.bfloat16), pull)
