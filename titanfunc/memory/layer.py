"""How a layer of a model drives its memory: projections, convolutions, gates, the read's way back.

Letters: B batch, T tokens, D model features, H memory heads, d head size, K taps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from titanfunc.config import MemoryConfig
from titanfunc.memory.network import MemoryNet, mlp
from titanfunc.memory.state import Gates
from titanfunc.nn import init_linear, init_taps, l2_norm, linear

INITIAL_FORGET = 0.01
INITIAL_MOMENTUM_DECAY = 0.9


def memory_net(config: MemoryConfig) -> MemoryNet:
    """The network that a configuration describes: weights [H, ...] for its heads."""
    return mlp(config.head_dim, config.hidden, config.depth, config.bias)


def init_layer(generator: torch.Generator, config: MemoryConfig, dim: int) -> dict[str, Any]:
    """Parameters of the wiring of one memory over a stream of ``dim`` features.

    wq, wk, wv: [D, H d]; taps: q, k, v [H d, K]; gates: weight [D, 3 H], bias [3 H] in the order alpha, eta, theta;
    initial: the memory's learned first weights, leaves [H, ...]. At the start
    the key's convolution passes on the token before, so that a write binds what came before to what comes
    now; queries start as keys; alpha near 0.01, eta near 0.9, theta at ``initial_inner_lr`` of its ceiling.
    """
    inner = config.inner_dim
    wk = init_linear(generator, dim, inner)
    layer: dict[str, Any] = {"wq": wk.clone(), "wk": wk, "wv": init_linear(generator, dim, inner)}
    if config.conv_width:
        lags = {"q": 0, "k": 1, "v": 0}
        layer["taps"] = {n: init_taps(inner, config.conv_width, lag, generator.device) for n, lag in lags.items()}
    forget = _logit((INITIAL_FORGET - config.min_forget) / (1 - config.min_forget))
    decay = _logit(INITIAL_MOMENTUM_DECAY / config.max_momentum)
    bias = torch.tensor([forget, decay, _logit(config.initial_inner_lr)], device=generator.device).repeat_interleave(
        config.heads
    )
    layer["gates"] = {"weight": init_linear(generator, dim, 3 * config.heads, 0.1), "bias": bias}
    layer["initial"] = memory_net(config).init(generator, config.heads)
    return layer


def _logit(p: float) -> float:
    p = min(max(p, 1e-4), 1 - 1e-4)
    return math.log(p / (1 - p))


def gates_of(params: dict[str, Any], config: MemoryConfig, x: Tensor) -> Gates:
    """Gates [B, H, T] in float32 from x [B, T, D].

    alpha in [min_forget, 1], eta in [0, max_momentum], theta in [0, max_inner_lr (1 - eta)]: with a clipped
    gradient these bounds keep the weights finite over any number of tokens.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    raw = torch.sigmoid(linear(params["weight"], x, wide) + params["bias"])
    alpha, eta, theta = raw.mT.split(config.heads, 1)
    eta = config.max_momentum * eta
    return Gates(config.min_forget + (1 - config.min_forget) * alpha, eta, config.max_inner_lr * theta * (1 - eta))


def join(params: dict[str, Any], names: str) -> Tensor:
    """The projections of ``names`` (of q, k, v) side by side, [D, len(names) H d]."""
    return torch.cat([params["w" + name] for name in names], -1)


def taps_of(params: dict[str, Any], names: str) -> Tensor:
    """The taps of ``names`` side by side, [len(names) H d, K]."""
    return torch.cat([params["taps"][name] for name in names], 0)


def heads_of(config: MemoryConfig, names: str, rows: Tensor) -> list[Tensor]:
    """Splits rows [B, T, len(names) H d] into unit vectors [B, H, T, d], one tensor a name; q and k after SiLU."""
    result = []
    for name, part in zip(names, rows.split(config.inner_dim, -1), strict=True):
        heads = rearrange(part, "b t (h d) -> b h t d", h=config.heads)
        result.append(l2_norm(heads if name == "v" else F.silu(heads)))
    return result


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, d] -> [B, T, H d]."""
    return rearrange(x, "b h t d -> b t (h d)")
