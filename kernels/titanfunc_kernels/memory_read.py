"""Reading memories of one or two layers for all chunks at once, forward: one program a chunk of a memory.

Letters: R chunks of all memories, C tokens a chunk, D head size, F hidden size. ``titanfunc.ops.memory_read`` says what
is computed. With beta, f [C] beside rows and G [C, C], a chunk's queries q [C, D] are read by

    z = beta (q W1) + f (q S1) - (G o (q X1^T)) E1      h = silu(z)
    y = beta (h W2) + f (h S2) - (G o (h X2^T)) E2      (one layer: y = z, of E1 [C, D])

The hidden features come in blocks; what is summed over them (h W2, h S2 and P2 = h X2^T) stays in registers, and leaves
the program for the backward, which else would need those registers. beta q and f q are rounded once to the products'
type: the three products of z then share one sum.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from titanfunc_kernels.launch import on_device
from titanfunc_kernels.memory_small_common import MIXED, dot, mixes, refusal


class Read(NamedTuple):
    """The tensors of a read, all of them contiguous.

    q: [R, C, D]. weights, momentum: one matrix [R, D, D], or two, [R, D, F] and [R, F, D]. inputs: X_l [R, C, d_in],
    errors: Delta_l [R, C, d_out], in q's type. keep_weights (beta), momentum_to_weights (f): [R, C]; to_weights (G):
    [R, C, C]; float32.
    """

    q: Tensor
    weights: list[Tensor]
    momentum: list[Tensor]
    inputs: list[Tensor]
    errors: list[Tensor]
    keep_weights: Tensor
    momentum_to_weights: Tensor
    to_weights: Tensor

    def in_order(self) -> list[Tensor]:
        """Both layers' tensors as the kernels name them; the only layer's twice where there is one."""
        layers = [tensor[-1] for tensor in self[1:5]]
        return [self.q, *(tensor[0] for tensor in self[1:5]), *layers, *self[5:]]


class Sums(NamedTuple):
    """What a two-layer read keeps for its backward, in q's type: h W2 and h S2 [R, C, D], P2 [R, C, C]."""

    by_weights: Tensor
    by_momentum: Tensor
    alike: Tensor


class Blocks(NamedTuple):
    """Hidden features of a block, warps of a program and stages of its loop's loads."""

    width: int
    warps: int
    stages: int


# By the bytes of a product's factors. 64 features of bfloat16 and 4 warps fill wgmma and leave room for two programs on
# a multiprocessor; float32 takes no matrix units, and 16 features keep its tiles in registers.
FORWARD = {2: Blocks(64, 4, 2), 4: Blocks(16, 8, 1)}
LONGEST = 64  # tokens a chunk: beyond, what the backward keeps of scores does not fit into shared memory


def launch_sizes(read: Read, table: dict[int, Blocks], blocks: Blocks | None) -> dict[str, int]:
    """The constants of a launch and how its programs run. ValueError for what the kernels do not take."""
    (tokens, size), hidden = read.q.shape[-2:], read.weights[0].shape[-1]
    depth, product = len(read.weights), read.q.dtype
    reason = refusal(depth, size, hidden, tokens, product, read.weights[0].dtype)
    if not reason and tokens > LONGEST:
        reason = f"chunk size: wanted at most {LONGEST}, got {tokens}"
    if reason:
        raise ValueError(f"memory_read: {reason}")
    cut = blocks or table[product.itemsize]
    if not blocks and mixes(tokens, size, product):
        cut = Blocks(*MIXED, 1)
    return {
        "DEPTH": depth, "C": tokens, "D": size, "F": hidden, "FB": min(cut.width, hidden),
        "num_warps": cut.warps, "num_stages": cut.stages,
    }  # fmt: skip


@triton.jit
def _forward(
    q_in, w1_in, s1_in, x1_in, e1_in, w2_in, s2_in, x2_in, e2_in, beta_in, f_in, g_in,
    y_out, by_w2_out, by_s2_out, alike_out,
    DEPTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FB: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    token, state, hidden0 = r * (C * D), r * (D * F), r * (C * F)
    rows, dims, cols = tl.arange(0, C), tl.arange(0, D), tl.arange(0, FB)
    by_token = rows[:, None] * D + dims[None, :]  # of a [C, D]
    pairs = rows[:, None] * C + rows[None, :]  # of a [C, C]
    tile1 = dims[:, None] * F + cols[None, :]  # a block of a [D, F], from its first feature j on
    tile2 = cols[:, None] * D + dims[None, :]  # of a [F, D], from j * D on
    hidden = rows[:, None] * F + cols[None, :]  # of a [C, F], from j on
    product = q_in.dtype.element_ty
    q = tl.load(q_in + token + by_token)
    x1 = tl.load(x1_in + token + by_token)
    g = tl.load(g_in + r * (C * C) + pairs)
    beta, f = tl.load(beta_in + r * C + rows)[:, None], tl.load(f_in + r * C + rows)[:, None]
    scores = (-g * dot(q, tl.trans(x1))).to(product)
    beta_q, f_q = (beta * q.to(tl.float32)).to(product), (f * q.to(tl.float32)).to(product)
    by_weights, by_momentum = tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32)
    alike = tl.zeros((C, C), tl.float32)  # h X2^T
    for b in range(F // FB):
        j = b * FB
        w1, s1 = tl.load(w1_in + state + j + tile1).to(product), tl.load(s1_in + state + j + tile1).to(product)
        z = dot(beta_q, w1)
        z += dot(f_q, s1)
        z += dot(scores, tl.load(e1_in + hidden0 + j + hidden))
        if DEPTH == 1:
            tl.store(y_out + hidden0 + j + hidden, z.to(product))
        else:
            h = (z * tl.sigmoid(z)).to(product)
            alike += dot(h, tl.trans(tl.load(x2_in + hidden0 + j + hidden)))
            by_weights += dot(h, tl.load(w2_in + state + j * D + tile2).to(product))
            by_momentum += dot(h, tl.load(s2_in + state + j * D + tile2).to(product))
    if DEPTH == 2:
        e2 = tl.load(e2_in + token + by_token)
        y = beta * by_weights + f * by_momentum - dot((g * alike).to(product), e2)
        tl.store(y_out + token + by_token, y.to(product))
        tl.store(by_w2_out + token + by_token, by_weights.to(product))
        tl.store(by_s2_out + token + by_token, by_momentum.to(product))
        tl.store(alike_out + r * (C * C) + pairs, alike.to(product))


def forward(read: Read, blocks: Blocks | None = None) -> tuple[Tensor, Sums | None]:
    """y [R, C, D] in q's type, and of two layers what the backward needs.

    blocks: how the hidden features are cut up (default: by sizes). ValueError for chunks of more than 64 tokens and for
    sizes and types that ``memory_small_common.refusal`` names.
    """
    sizes = launch_sizes(read, FORWARD, blocks)
    q, square = read.q, read.to_weights.shape
    y = q.new_empty(q.shape)
    sums = Sums(q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(square)) if len(read.weights) == 2 else None
    with on_device(y):
        if len(y):
            _forward[(len(y),)](*read.in_order(), y, *(sums or (y, y, y)), **sizes)
    return y, sums
