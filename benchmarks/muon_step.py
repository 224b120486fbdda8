"""Times one step of our compiled Muon+AdamW against torch.optim.Muon and a fused torch.optim.AdamW.

    python benchmarks/muon_step.py --models mac_168m mac_24gb mac_tiny --out FILE.json

Both move the same parameters by the same gradients: each hidden matrix by Muon, the rest by AdamW. torch's Muon takes
single matrices, so that stacked leaves are cut for it. Correctness first: after one step the two must agree as far as
bfloat16 lets them. Then the two take turns; times are between CUDA events (wall time on a CPU), medians of --rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import titanfunc as tf
from titanfunc import rng, tree
from titanfunc.bench.common import configuration, header
from titanfunc.bench.torch_optim import muon_and_adamw

LR, ADAM_LR, DECAY = 0.02, 0.002, 0.1


def timed(call, cuda: bool) -> float:
    """Milliseconds of one call."""
    if not cuda:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(text: str, args: argparse.Namespace) -> dict:
    """One row: both optimizers on the parameters of the model that ``text`` names."""
    torch._dynamo.reset()
    cuda = torch.device(args.device).type == "cuda"
    model = tf.models.build(configuration(text))
    params = tree.map(lambda leaf: leaf.to(args.device), model.init(rng.generator(0)))
    generator = rng.generator(1, args.device)
    grads = tree.map(lambda p: 1e-3 * torch.randn(p.shape, generator=generator, device=p.device), params)
    tx = tf.optim.muon(LR, ADAM_LR, weight_decay=DECAY, b1=0.9, b2=0.95)

    def update(state, batch):
        updates, opt_state = tx.update(batch["grads"], state[1], state[0])
        return (tf.optim.apply_updates(state[0], updates), opt_state), {}

    theirs = muon_and_adamw(params, lr=LR, adam_lr=ADAM_LR, weight_decay=DECAY)
    theirs.give(grads)
    state = tree.map(lambda leaf: leaf.clone(), (params, tx.init(params)))
    ours = tf.train.compile_step(update, args.backend)
    start = time.perf_counter()
    state, _ = ours(state, {"grads": grads})
    compile_seconds = time.perf_counter() - start
    theirs.step()
    apart, moved = (
        torch.stack([(a - b).norm() for a, b in zip(tree.leaves(left), tree.leaves(right), strict=True)]).norm().item()
        for left, right in ((state[0], theirs.params), (params, theirs.params))
    )
    if not apart < 0.03 * moved:
        raise AssertionError(f"after one step the two are {apart / moved:.3f} of its length apart")
    for _ in range(5):
        ours(state, {"grads": grads})
        theirs.step()
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(args.rounds):
        times["ours"].append(timed(lambda: ours(state, {"grads": grads}), cuda))
        times["torch"].append(timed(theirs.step, cuda))
    ours_ms, theirs_ms = (statistics.median(times[name]) for name in ("ours", "torch"))
    return {
        "model": text,
        "parameters": tree.size(params),
        "apart_after_one_step": round(apart / moved, 5),
        "compile_seconds": round(compile_seconds, 1),
        "ours_ms": round(ours_ms, 3),
        "torch_ms": round(theirs_ms, 3),
        "ratio": round(theirs_ms / ours_ms, 2),
        "ours_ms_min_max": [round(f(times["ours"]), 3) for f in (min, max)],
        "torch_ms_min_max": [round(f(times["torch"]), 3) for f in (min, max)],
    }


def main() -> None:
    """Reads the arguments, measures every model and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for text in args.models:
        configuration(text)
    result = header(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for text in args.models:
        row = measure(text, args)
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
