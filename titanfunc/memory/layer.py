"""How a layer of a model drives its memory: projections, convolutions, gates, the read's way back.

Letters: B batch, T tokens, D model features, H memory heads, d head size, K taps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from titanfunc import tree
from titanfunc.config import MemoryConfig
from titanfunc.memory.chunked import write_and_read
from titanfunc.memory.network import MemoryNet, Weights, mlp
from titanfunc.memory.passes import Layout
from titanfunc.memory.slots import Documents
from titanfunc.memory.state import Gates, MemoryState, init_state
from titanfunc.nn import convolve, extend, init_linear, init_taps, l2_norm, linear, of_document

METRICS = ("inner_loss", "forget", "momentum_decay", "inner_lr")


class LayerState(NamedTuple):
    """What a memory layer carries: the MemoryState, and the last rows that its convolutions saw, [B, K - 1, 3 H d]."""

    memory: MemoryState
    tail: Tensor


def memory_net(config: MemoryConfig) -> MemoryNet:
    """The network that a configuration describes: weights [H, ...] for its heads."""
    return mlp(config.head_dim, config.hidden, config.depth, config.bias)


def init_layer(generator: torch.Generator, config: MemoryConfig, dim: int, net: MemoryNet) -> dict[str, Any]:
    """Parameters of the wiring of one memory over a stream of ``dim`` features.

    wq, wk, wv: [D, H d]; taps: q, k, v [H d, K]; gates: weight [D, 3 H], bias [3 H] in the order alpha, eta, theta;
    initial: the memory's learned first weights, leaves [H, ...]. At the start the key's convolution passes
    on the token before, so that a write binds what came before to what comes now; queries start as keys; alpha at
    ``initial_forget``, eta at ``initial_momentum``, theta at ``initial_inner_lr`` of its ceiling.
    """
    inner = config.inner_dim
    wk = init_linear(generator, dim, inner)
    layer: dict[str, Any] = {"wq": wk.clone(), "wk": wk, "wv": init_linear(generator, dim, inner)}
    if config.conv_width:
        lags = {"q": 0, "k": 1, "v": 0}
        layer["taps"] = {n: init_taps(inner, config.conv_width, lag, generator.device) for n, lag in lags.items()}
    forget = _logit((config.initial_forget - config.min_forget) / (1 - config.min_forget))
    decay = _logit(config.initial_momentum / config.max_momentum)
    bias = torch.tensor([forget, decay, _logit(config.initial_inner_lr)], device=generator.device).repeat_interleave(
        config.heads
    )
    layer["gates"] = {"weight": init_linear(generator, dim, 3 * config.heads, 0.1), "bias": bias}
    layer["initial"] = net.init(generator, config.heads)
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


def init_layer_state(params: dict[str, Any], config: MemoryConfig, batch_size: int, dtype: torch.dtype) -> LayerState:
    """A fresh state for ``batch_size`` samples; the tail [B, K - 1, 3 H d] in ``dtype``."""
    memory = init_state(params["initial"], batch_size, config.rule)
    rows = max(config.conv_width - 1, 0)
    return LayerState(memory, memory.position.new_zeros((batch_size, rows, 3 * config.inner_dim), dtype=dtype))


def read_and_write(
    params: dict[str, Any],
    config: MemoryConfig,
    net: MemoryNet,
    x: Tensor,
    state: LayerState,
    *,
    aligned: bool,
    writes: bool,
    documents: Documents | None,
    kernels: str = "reference",
) -> tuple[Tensor, LayerState, Tensor]:
    """One pass of a memory over x [B, T, D]: each token writes, then reads. Returns (reads [B, T, H d], state, sums).

    aligned: the memory stands at a chunk's start. sums: what :func:`metrics_of` divides. kernels: of the write
    (ops/memory_write.py).
    """
    rows, tail = linear(join(params, "qkv"), x, x.dtype), state.tail
    if config.conv_width:
        extended = extend(tail, rows)
        age = None if documents is None else documents.age(torch.full_like(state.memory.position[:, 0], 1 << 30))
        rows = convolve(taps_of(params, "qkv"), extended, age)
        tail = extended[:, extended.shape[1] - tail.shape[1] :]
        if age is not None:
            tail = of_document(tail, age[:, -1])
    q, k, v = heads_of(config, "qkv", rows)
    gates = gates_of(params["gates"], config, x)
    packed = None if documents is None else documents.over_heads(config.heads)
    layout = Layout.of(state.memory.position, x.shape[1], config.chunk_size, aligned, packed, gates.forget.dtype)
    start = None if documents is None else initial_weights(params, x.shape[0])
    written = write_and_read(
        net, state.memory, q, k, v, gates, layout, config.clip or None, config.rule, "inclusive", start, writes, kernels
    )
    reads = layout.take(written.reads)
    sums = sums_of(layout.take(written.loss), gates, layout.take(written.kept))
    return merge_heads(reads), LayerState(written.state, tail), sums


def initial_weights(params: dict[str, Any], batch_size: int) -> Weights:
    """The learned first weights for every sample, leaves [B, H, ...]."""
    return tree.map(lambda leaf: leaf.expand(batch_size, *leaf.shape), params["initial"])


def sums_of(loss: Tensor, gates: Gates, kept: Tensor, ones: Tensor | None = None) -> Tensor:
    """Sums over all tokens, float32 [6], of loss, the gates, dropped writes and tokens: each [B, H, T]; ``ones`` is 1
    where there is a token (None: everywhere)."""
    measured = torch.stack([loss, *gates, 1 - kept, torch.ones_like(kept)]).detach()
    return (measured if ones is None else measured * ones).flatten(1).sum(1).to(torch.float32)


def metrics_of(sums: list[Tensor]) -> dict[str, Tensor]:
    """Means over layers, heads and tokens under ``memory/...``, and the number of dropped writes, from sums [6]."""
    if not sums:
        return {}
    total = torch.stack(sums).sum(0)
    means = {f"memory/{name}": total[i] / total[-1] for i, name in enumerate(METRICS)}
    return {**means, "memory/dropped": total[-2]}
