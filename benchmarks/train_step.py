"""Trains presets on real text for some steps, compiled, and records speed, memory, compile time and loss.

    python benchmarks/train_step.py --models mac_168m transformer_168m --batch 16 --seq 1024 --steps 100 --out FILE.json

A model may carry overrides after a colon: ``mac_168m:mac.write=input,memory.chunk_size=128``; so may an optimizer of
``--optims adamw muon nested:nested.base=muon``. Each row holds its command, hardware, versions and commit. Correctness
first: the compiled step's first loss must be the eager reference's. Timing: every step between device synchronisations,
the median after 10. ``--profile DIRECTORY`` adds where a step's time goes (step_profile.py) and leaves a trace.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import time
from pathlib import Path

import torch
from torch._dynamo.utils import counters

import titanfunc as tf
from titanfunc import tree
from titanfunc.bench import step_profile
from titanfunc.bench.common import configuration, header, parsed

WARM_UP = 10
TOLERANCE = 0.01  # of the loss: bfloat16 products in another order


def optimizer(text: str, args: argparse.Namespace):
    """The OptimConfig that an optimizer's text means."""
    name, overrides = parsed(text)
    plain = tf.optim.OptimConfig(lr=args.lr, warmup_steps=args.steps // 10)
    return tf.config.override(plain, {"name": name, **overrides})


def measure(text: str, optim: str, args: argparse.Namespace, corpus) -> dict:
    """One row: train ``args.steps`` steps of the model that ``text`` names with the optimizer that ``optim`` does."""
    torch._dynamo.reset()
    counters.clear()
    cuda = torch.device(args.device).type == "cuda"
    config = configuration(text)
    model = tf.models.build(config)
    tx = tf.optim.from_config(optimizer(optim, args), args.steps)
    state = tf.train.init_state(model, tx, seed=0, device=args.device)
    step = tf.train.compile_step(tf.train.make_train_step(model, tx), args.backend, cuda_graph=not args.no_cuda_graph)
    windows = tf.data.Windows(corpus.train, args.seq, args.batch, seed=0)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    plain = tf.models.build(tf.config.override(config, {"kernels": "reference"}))
    check = {"tokens": windows.batch(0).to(args.device)}
    with torch.no_grad():
        expected = tf.train.make_eval_step(plain)(state.params, check).item()
    losses, seconds = [], []
    for i in range(args.steps):
        batch = {"tokens": windows.batch(i).to(args.device)}
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        state, metrics = step(state, batch)
        loss = metrics["loss"].item()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    if abs(losses[0] - expected) > TOLERANCE * expected:
        raise ValueError(f"first loss: wanted the eager reference's {expected:.4f}, got {losses[0]:.4f}")
    median = statistics.median(seconds[WARM_UP:])
    where = {}
    if args.profile and cuda:
        flops = 6 * tree.size(state.params) * args.batch * args.seq  # of the parameters' products, without attention
        trace = args.profile / f"{re.sub('[^0-9a-zA-Z]+', '_', text)}_{optim}.json"
        where["profile"] = step_profile.profile(lambda: step(state, check), flops, trace)
        print(step_profile.table(where["profile"]), flush=True)
    return {
        **where,
        "model": text,
        "optimizer": optim,
        "parameters": tree.size(state.params),
        "precision": config.precision,
        "batch": args.batch,
        "seq_len": args.seq,
        "steps": args.steps,
        "first_step_seconds": round(seconds[0], 2),
        "step_ms_median": round(1e3 * median, 2),
        "step_ms_min_max": [round(1e3 * f(seconds[WARM_UP:]), 2) for f in (min, max)],
        "tokens_per_second": round(args.batch * args.seq / median),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "skipped_steps": int(state.skipped),
        "loss_first": round(losses[0], 4),
        "loss_first_eager": round(expected, 4),
        "loss_last": round(statistics.mean(losses[-5:]), 4),
        "losses_every_10": [round(loss, 4) for loss in losses[::10]],
    }


def main() -> None:
    """Reads the arguments, measures every model and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--optims", nargs="+", default=["adamw"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-cuda-graph", action="store_true")
    parser.add_argument("--profile", type=Path, help="a directory for traces; profiles a step of each row (CUDA)")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps: wanted more than the {WARM_UP} of the warm-up, got {args.steps}")
    for text in args.models:  # refuse a mistake before any work
        configuration(text)
    for text in args.optims:
        optimizer(text, args)
    corpus = tf.data.load(tf.config.DataConfig(seq_len=args.seq, batch_size=args.batch))
    result = header(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for text, optim in itertools.product(args.models, args.optims):
        try:
            row = measure(text, optim, args, corpus)
        except Exception as error:  # one model's failure must not lose the rows before it
            row = {"model": text, "optimizer": optim, "error": f"{type(error).__name__}: {str(error)[:2000]}"}
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
