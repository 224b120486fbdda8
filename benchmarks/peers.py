"""Times a memory layer with its projections, forward and backward, beside titans-pytorch's NeuralMemory (if installed).

    PYTORCH_JIT=0 python benchmarks/peers.py --out FILE.json

Rows x [B, T, 512] in bfloat16 products. Ours: q, k, v, gates and output are linear, the scan by the per-token rule
with kernels, compiled, in a CUDA graph. Theirs: as its README builds it, with batch_size equal to the chunk size, so
that a chunk's gradients are taken at its own start (the faithful mode; its scripted functions need PYTORCH_JIT=0),
under autocast; it cannot be compiled in one graph (a branch on data). Medians over --rounds; memory is the peak that a
call adds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import header
from timing import microseconds

import titanfunc as tf

DIM = 512
# samples, tokens, heads, chunk
CASES = [(4, 2048, 1, 64), (4, 2048, 1, 256), (4, 2048, 8, 64), (4, 8192, 1, 64), (4, 8192, 8, 64)]


def ours(batch: int, tokens: int, heads: int, chunk: int, kernels: str, device: torch.device) -> Callable[[], Any]:
    """A call that returns y and all gradients."""
    size = DIM // heads
    net = tf.memory.mlp(size, 4 * size)

    def drawn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(device)

    params = {
        "qkv": drawn(DIM, 3 * DIM, seed=0, scale=DIM**-0.5), "gates": drawn(DIM, 3 * heads, seed=1, scale=DIM**-0.5),
        "out": drawn(DIM, DIM, seed=2, scale=DIM**-0.5),
        "w0": drawn(heads, size, 4 * size, seed=3, scale=size**-0.5),
        "w1": drawn(heads, 4 * size, size, seed=4, scale=(4 * size) ** -0.5),
    }  # fmt: skip
    x, dy = (drawn(batch, tokens, DIM, seed=5 + i).bfloat16() for i in range(2))

    def layer(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        rows = (x @ params["qkv"].bfloat16()).unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)
        q, k, v = torch.nn.functional.normalize(rows.float(), dim=-1).bfloat16()
        raw = torch.sigmoid((x @ params["gates"].bfloat16()).float()).unflatten(-1, (3, heads)).permute(2, 0, 3, 1)
        gates = tf.memory.Gates(0.02 * raw[0], 0.9 * raw[1], 0.05 * raw[2])
        state = tf.memory.init_state({"w0": params["w0"], "w1": params["w1"]}, batch)
        y, _ = tf.memory.scan(net, state, q, k, v, gates, chunk, clip=0.5, aligned=True, kernels=kernels)
        return y.transpose(1, 2).flatten(-2) @ params["out"].bfloat16()

    def run(params: dict[str, torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> Any:
        y, pull = torch.func.vjp(layer, params, x)
        return y, pull(dy)

    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    return lambda: compiled(params, x, dy)


def theirs(batch: int, tokens: int, heads: int, chunk: int, device: torch.device) -> Callable[[], Any]:
    """A call that leaves all gradients in its module."""
    from titans_pytorch import NeuralMemory

    memory = NeuralMemory(dim=DIM, chunk_size=chunk, batch_size=chunk, heads=heads, dim_head=DIM // heads).to(device)
    x = torch.randn(batch, tokens, DIM, device=device, requires_grad=True)
    dy = torch.randn(batch, tokens, DIM, device=device)

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = memory(x)
        y.backward(dy.to(y.dtype))

    return run


def events(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median microseconds between device events, and the peak of memory in GiB that a call adds."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return sorted(times)[rounds // 2], (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    """Reads the arguments, measures every case and writes the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("wanted a CUDA device: there is nothing to time elsewhere")
    device, result = torch.device(args.device), header(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for batch, tokens, heads, chunk in CASES:
        size = DIM // heads
        what = f"{batch} x {tokens}, dim {DIM}, {heads} of {size}, hidden {4 * size}, chunk {chunk}"
        row: dict[str, Any] = {"name": what}
        for who, measure in (
            ("titanfunc", lambda: microseconds(ours(batch, tokens, heads, chunk, "triton", device), args.rounds)),  # noqa: B023
            ("titans_pytorch", lambda: events(theirs(batch, tokens, heads, chunk, device), args.rounds)),  # noqa: B023
        ):
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            try:
                row[f"{who}_us"], row[f"{who}_gib"] = (round(x, 3) for x in measure())
            except Exception as error:  # one that does not fit, or is not there, must not lose the rest
                row[f"{who}_error"] = f"{type(error).__name__}: {str(error)[:200]}"
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
