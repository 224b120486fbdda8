"""A mixture of SwiGLU experts: every token goes to its k likeliest experts, and none is ever dropped.

There is no capacity and no exchange between tokens, so a token's output depends on that token alone: causal.
Router: Shazeer et al., arXiv 1701.06538; load balancing: Fedus et al. (Switch Transformer), arXiv 2101.03961.

Letters: B batch, T tokens, N = B T, D features, F hidden features of an expert, E experts, K choices of a token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from titanfunc import rng
from titanfunc.nn.linear import init_linear

Experts = dict[str, Tensor]


class Balance(NamedTuple):
    """How evenly a batch's tokens went to the experts; all float32 (float64 in a float64 model).

    loss: 0-d, E sum_e f_e P_e (arXiv 2101.03961, eq. 4), with f_e the share of the choices that fell on expert e and
    P_e the mean of its probability: 1 where both are even, up to E / K where the same K experts take all.
    load: [E], f. entropy: 0-d, the mean entropy of a token's probabilities, in nats (at most ln E).
    """

    loss: Tensor
    load: Tensor
    entropy: Tensor


def init_moe(generator: torch.Generator, dim: int, hidden: int, experts: int, gain: float = 1.0) -> dict[str, Any]:
    """Router [D, E] and experts' gate and up [E, D, F], down [E, F, D]; ``gain`` scales what a token receives.

    A token receives a mean of K experts, which is 1 / sqrt(K) the size of one: the caller's gain may make up for it.
    """

    def stack(fan_in: int, fan_out: int, gain: float = 1.0) -> Tensor:
        return rng.normal(generator, (experts, fan_in, fan_out), gain / math.sqrt(fan_in))

    return {
        "router": init_linear(generator, dim, experts),
        "experts": {"gate": stack(dim, hidden), "up": stack(dim, hidden), "down": stack(hidden, dim, gain)},
    }


def moe(
    params: dict[str, Any],
    x: Tensor,
    top_k: int,
    dtype: torch.dtype,
    noise: float = 0.0,
    seed: Tensor | None = None,
    kernel: str = "dense",
) -> tuple[Tensor, Balance]:
    """``sum over a token's K experts of weight * SwiGLU_e(x)``: x [B, T, D] -> (y [B, T, D] in ``dtype``, Balance).

    Router and probabilities are in float32 (or float64). A token's weights are its K largest probabilities divided
    by their sum; for K = 1, where that is always 1 and would teach the router nothing, the probability itself.
    noise, seed: with a seed (0-d int64; another for each layer and step), N(0, noise^2) is added to the logits.
    kernel: "dense" runs every expert on every token, in any dtype, and is the definition; "grouped" sorts the tokens
    by expert and does K / E of that work through torch's grouped product. Their results differ by rounding, and only
    under "dense" are a token's output bits sure to be the same whatever stands beside it.

    Raises ValueError for sizes that do not fit, and for "grouped" where it is not offered: in another dtype than
    bfloat16 (no other compiles), for D or F not a multiple of 8, or on a GPU other than compute capability 9.0 or
    10.x, where torch's grouped product reads its offsets back to the host.
    """
    experts: Experts = params["experts"]
    _check(params, x, top_k, kernel, dtype)
    rows = rearrange(x, "b t d -> (b t) d")
    wide = torch.promote_types(dtype, torch.float32)
    logits = rows.to(wide) @ params["router"].to(wide)
    if seed is not None:
        logits = logits + noise * rng.gaussian(seed, tuple(logits.shape), device=logits.device).to(wide)
    log_probability = torch.log_softmax(logits, -1)
    probability = log_probability.exp()
    weight, choice = probability.topk(top_k)
    if top_k > 1:
        weight = weight / weight.sum(-1, keepdim=True)
    chosen = choice.unsqueeze(-1) == torch.arange(logits.shape[-1], device=x.device)  # [N, K, E]
    counts = chosen.sum((0, 1))
    if kernel == "dense":
        y = _dense(experts, rows.to(dtype), (weight.unsqueeze(-1) * chosen).sum(1))
    else:
        y = _grouped(experts, rows.to(dtype), weight, choice, counts)
    load = counts.to(wide) / choice.numel()
    loss = logits.shape[-1] * (load * probability.mean(0)).sum()
    entropy = -(probability * log_probability).sum(-1).mean()
    return rearrange(y, "(b t) d -> b t d", b=x.shape[0]), Balance(loss, load, entropy)


def _dense(experts: Experts, rows: Tensor, weight: Tensor) -> Tensor:
    """Every expert on every row [N, D], by its weight in [N, E], zero for most; result [N, D]."""
    gate, up, down = (experts[name].to(rows.dtype) for name in ("gate", "up", "down"))
    hidden = F.silu(torch.einsum("nd,edf->nef", rows, gate)) * torch.einsum("nd,edf->nef", rows, up)
    return torch.einsum("nef,efd->nd", (hidden * weight.unsqueeze(-1)).to(rows.dtype), down)


def _grouped(experts: Experts, rows: Tensor, weight: Tensor, choice: Tensor, counts: Tensor) -> Tensor:
    """The same for rows [N, D] by each expert's own: weight and choice [N, K], counts of the choices [E]."""
    top_k = choice.shape[1]
    order = choice.flatten().argsort(stable=True)
    ends = counts.cumsum(0).to(torch.int32)
    # Each row once a choice, then a permutation: its gradient writes every place once, in an order of no matter.
    sorted_rows = rows.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1).index_select(0, order)
    busy = (counts > 0)[:, None, None]

    def product(x: Tensor, name: str) -> Tensor:
        # Without the mask an expert without tokens has garbage for a gradient on a B200 (pytorch issue 172439).
        matrices = experts[name].to(x.dtype)
        return F.grouped_mm(x, torch.where(busy, matrices, torch.zeros_like(matrices)), offs=ends)

    hidden = F.silu(product(sorted_rows, "gate")) * product(sorted_rows, "up")
    hidden = (hidden * weight.flatten().index_select(0, order).unsqueeze(-1)).to(rows.dtype)
    y = product(hidden, "down").index_select(0, order.argsort())
    return rearrange(y, "(n k) d -> n k d", k=top_k).sum(1)


def _check(params: dict[str, Any], x: Tensor, top_k: int, kernel: str, dtype: torch.dtype) -> None:
    experts, dim, hidden = params["experts"]["gate"].shape
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"x: wanted [batch, tokens, {dim}], got {tuple(x.shape)}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: wanted 1 to {experts} of {experts} experts, got {top_k}")
    if kernel not in ("dense", "grouped"):
        raise ValueError(f"kernel: wanted 'dense' or 'grouped', got {kernel!r}")
    if kernel == "grouped":
        if dtype != torch.bfloat16:
            raise ValueError(f"kernel: wanted 'dense' for any dtype but bfloat16, got 'grouped' for {dtype}")
        if dim % 8 or hidden % 8:
            raise ValueError(f"kernel: wanted 'dense' for sizes 8 does not divide, got 'grouped' for {dim} x {hidden}")
        if not _grouped_on(x.device):
            raise ValueError(
                f"kernel: wanted 'dense' on a device without grouped products, got 'grouped' on {x.device}"
            )


@torch.compiler.assume_constant_result
def _grouped_on(device: torch.device) -> bool:
    """Whether torch's grouped product runs there without a host read (torch 2.11 to 2.13: ``_grouped_mm_cuda``)."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return (major, minor) == (9, 0) or major == 10
    return device.type == "cpu"
