"""A MAC-like language model written the usual way: modules, an inner gradient by autograd.grad, loss.backward().

What a memory's write needs, the gradient of its loss, is taken with ``torch.autograd.grad(create_graph=True)`` while
the forward runs, so that ``loss.backward()`` goes through it a second time. By default torch.compile does not trace
that call, and what it compiles has no second derivative (left to itself Dynamo breaks the graph there, and the call
then raises, as what it differentiates was made inside of a compiled piece); so the write stands outside of what is
compiled (``torch.compiler.disable``), and the graph breaks at every one.

The same as in ours, from the same configuration: dim, layers, attention heads, feed-forward, segments, persistent
tokens, vocabulary, tied embeddings; memory heads, head size, hidden features, depth, chunk; momentum, forgetting and a
step size as gates of the input; bfloat16 products (here by autocast) with float32 parameters and memory.

What differs: it writes once a chunk, with the gates' mean over it, where ours by default writes every token; a
segment's context is read with the weights before it, and what gates a chunk's output with those before that chunk;
rates have fixed ranges, no gradient is clipped, nothing is convolved, attention has no rotary positions, memories and
feed-forwards of other kinds are read as plain ones, and the attention's output is written (``mac.write=attention``)
whatever the configuration says. The optimizer is torch's AdamW at the configured learning rate. So speed and memory
can be set beside ours; the losses are another model's.

Letters: B batch, T tokens, S tokens of a segment, D features, H memory heads, d memory head size, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = tuple[Tensor, ...]
State = tuple[Weights, Weights]


@dataclass(frozen=True)
class Sizes:
    """What is taken from a ModelConfig of this library."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    ff: int
    segment: int
    persistent: int
    memory_heads: int
    memory_dim: int
    memory_hidden: int
    memory_depth: int
    chunk: int
    tied: bool = True
    bf16: bool = False

    @classmethod
    def of(cls, model: Any) -> Sizes:
        """Those of a ModelConfig; a family without segments is read as one whose segment is its window, or 128."""
        memory = model.memory
        segment = model.mac.segment if model.family == "mac" else model.window or 128
        return cls(
            model.vocab_size, model.dim, model.layers, model.heads, model.ff, segment, model.persistent,
            memory.heads, memory.head_dim, memory.hidden, memory.depth, memory.chunk_size,
            model.tie_embeddings, model.precision != "fp32",
        )  # fmt: skip


class Memory(nn.Module):
    """SiLU MLPs, one a head, that learn by gradient steps while they read."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.chunk = sizes.memory_heads, sizes.chunk
        inner = sizes.memory_heads * sizes.memory_dim
        self.q, self.k, self.v = (nn.Linear(sizes.dim, inner, bias=False) for _ in range(3))
        self.gates = nn.Linear(sizes.dim, 3 * sizes.memory_heads)
        self.out = nn.Linear(inner, sizes.dim, bias=False)
        widths = [sizes.memory_dim, *[sizes.memory_hidden] * (sizes.memory_depth - 1), sizes.memory_dim]
        self.initial = nn.ParameterList(
            torch.randn(self.heads, rows, columns) * rows**-0.5 for rows, columns in pairwise(widths)
        )

    def fresh(self, batch: int) -> State:
        """Weights [B, H, ., .] of a text's start, and no momentum."""
        weights = tuple(w.expand(batch, *w.shape) for w in self.initial)
        return weights, tuple(torch.zeros_like(w) for w in weights)

    def split(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """x [B, T, D] -> unit vectors by head [B, H, T, d], float32."""
        rows = layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return F.normalize(rows.float(), dim=-1)

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """What the memory says to x [B, T, D]: [B, T, D]."""
        return self.merge(run(weights, self.split(x, self.q)))

    def merge(self, read: Tensor) -> Tensor:
        """What was read by head [B, H, T, d] -> [B, T, D]."""
        return self.out(read.transpose(1, 2).flatten(-2))

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What x [B, T, D] asks and writes: q, k, v [B, H, T, d], and rates [B, 3, H, T] in (0, 1)."""
        rates = torch.sigmoid(self.gates(x).float()).transpose(1, 2).unflatten(1, (3, self.heads))
        return self.split(x, self.q), self.split(x, self.k), self.split(x, self.v), rates


def run(weights: Weights, x: Tensor) -> Tensor:
    """The MLPs with weights [B, H, ., .] on x [B, H, T, d], in float32."""
    with torch.autocast(x.device.type, enabled=False):
        for i, w in enumerate(weights):
            x = (F.silu(x) if i else x) @ w
    return x


@partial(torch.compiler.disable, reason="torch.autograd.grad in the forward")
def write(state: State, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, chunk: int) -> tuple[Tensor, State]:
    """A gradient step a chunk, over k, v [B, H, T, d] with rates [B, 3, H, T].

    Returns what each chunk's q [B, H, T, d] read before its own step, as [B, H, T, d], and the state after all.
    """
    read = []
    for at in range(0, k.shape[2], chunk):
        here = slice(at, at + chunk)
        read.append(run(state[0], q[:, :, here]))
        state = step(state, k[:, :, here], v[:, :, here], rates[..., here].mean(-1)[..., None, None])
    return torch.cat(read, 2), state


def step(state: State, k: Tensor, v: Tensor, rates: Tensor) -> State:
    """One step on k, v [B, H, C, d] with rates [B, 3, H, 1, 1]; outer gradients go through it."""
    weights, momentum = state
    inner_lr, keep, forget = 0.1 * rates[:, 0], 0.9 * rates[:, 1], 0.05 * rates[:, 2]
    here = tuple(w.view_as(w) for w in weights)  # k may hang on the weights too, by what was read: not this gradient
    loss = (run(here, k) - v).square().sum() / k.shape[2]
    grads = torch.autograd.grad(loss, here, create_graph=True)
    momentum = tuple(keep * m - inner_lr * g for m, g in zip(momentum, grads, strict=True))
    return tuple((1 - forget) * w + m for w, m in zip(weights, momentum, strict=True)), momentum


class Block(nn.Module):
    """A segment attends to what it retrieved, to persistent tokens and to itself; what comes out is written."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.segment = sizes.heads, sizes.segment
        self.norm, self.norm_memory, self.norm_ff = (nn.RMSNorm(sizes.dim) for _ in range(3))
        self.memory = Memory(sizes)
        self.qkv = nn.Linear(sizes.dim, 3 * sizes.dim, bias=False)
        self.out = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.persistent = nn.Parameter(0.02 * torch.randn(sizes.persistent, sizes.dim))
        self.up = nn.Linear(sizes.dim, 2 * sizes.ff, bias=False)
        self.down = nn.Linear(sizes.ff, sizes.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> the same."""
        state, outputs = self.memory.fresh(x.shape[0]), []
        for piece in x.split(self.segment, 1):
            y, state = self.one_segment(piece, state)
            outputs.append(y)
        return self.feed_forward(x, torch.cat(outputs, 1))

    # Without a loop each: where a graph breaks inside of one, Dynamo leaves the whole function eager.

    def one_segment(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B, S, D] and the memory before it -> y [B, S, D] and the memory after it."""
        u = self.norm(x)
        y = self.attend(u, self.memory.read(state[0], u))
        written = self.norm_memory(y)
        read, state = write(state, *self.memory.rows(written), self.memory.chunk)
        return y * 2 * torch.sigmoid(self.memory.merge(read)), state

    def feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, T, D] and what attention and memory made of it -> the block's output [B, T, D]."""
        x = x + self.out(y)
        gate, value = self.up(self.norm_ff(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)

    def attend(self, piece: Tensor, context: Tensor) -> Tensor:
        """piece and context [B, S, D] -> [B, S, D]; a token sees the context of tokens up to itself."""
        batch, tokens, _ = piece.shape
        first = self.persistent.to(piece.dtype).expand(batch, -1, -1)
        rows = self.qkv(torch.cat([first, context.to(piece.dtype), piece], 1))
        q, k, v = rows.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=piece.device).tril()
        mask = torch.cat([causal.new_ones(tokens, first.shape[1]), causal, causal], 1)
        return F.scaled_dot_product_attention(q[:, :, -tokens:], k, v, mask).transpose(1, 2).flatten(-2)


class OlderWay(nn.Module):
    """Tokens int64 [B, T] -> logits [B, T, V]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.dim)
        nn.init.normal_(self.embedding.weight, std=sizes.dim**-0.5)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.dim)
        self.head = nn.Linear(sizes.dim, sizes.vocab_size, bias=False)
        if sizes.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> logits [B, T, V]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_step(
    sizes: Sizes, device: torch.device, backend: Any = "inductor", *, fullgraph: bool = False, lr: float = 1e-3
) -> tuple[OlderWay, Callable[[Tensor], Tensor]]:
    """The model, and a training step on tokens int64 [B, T + 1] that returns the loss (0-d) and moves the model.

    backend: of torch.compile, or None to leave it eager. fullgraph: as torch.compile's; where it is set, the first
    call raises.
    """
    torch.manual_seed(0)
    model = OlderWay(sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=device.type == "cuda")
    forward = model if backend is None else torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=False)

    def train_step(tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=sizes.bf16):
            logits = forward(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, train_step
