"""One row of a table of training steps, measured in this process: ``python -m titanfunc.bench.step JOB.json``.

Correctness first: the first loss must be the eager reference's (a peer's, which has none, that of a guess), every loss
finite, and the loss has to fall on real text. Then times: each step between synchronisations, its loss read back.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import titanfunc as tf
from titanfunc.bench import step_profile, timing, trained, trained_peers
from titanfunc.bench.step_row import TITANS, TORCH, StepRow
from titanfunc.bench.turns import Turns
from titanfunc.compile_report import counts

WORKER = (sys.executable, "-m", "titanfunc.bench.step")
WARM_UP = 10
TOLERANCE = 0.01  # of the loss: bfloat16 products in another order
GUESS = 1.0  # nats that a fresh model's loss may be away from that of a guess
LAST = 5  # steps whose mean is the last loss
WITHIN_DOCUMENTS = 8192  # longer windows run over documents' ends: most addresses are not as long
BUILDERS = {
    TITANS: trained_peers.titans_pytorch_mac, TORCH: trained_peers.torch_transformer, "ours": trained.ours,
}  # fmt: skip


def measure(job: dict[str, Any], turns: Turns) -> dict[str, Any]:
    """The numbers of a job's row; see scripts/bench_step.py for what they are."""
    row = StepRow(**job["row"])
    device = torch.device(job["device"])
    how = trained.How(device, job["steps"], job["lr"], job["backend"], job["cuda_graph"])
    batches = _batches(row, device)
    with turns.among_others("compiling"):
        run = BUILDERS[row.kind](row, how)
        expected = run.reference(batches(0)) if run.reference else None
        first = _timed(run.step, batches(0))
        start_seconds = time.time() - job["began"] - turns.waited
        graphs = counts.graphs()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for those that are timed meanwhile
    with turns.alone("timing"):
        alone_since = time.time()
        held = _reset_memory(device)
        rest = [_timed(run.step, batches(i)) for i in range(1, job["steps"])]
        peak = counts.peak_memory(device) if device.type == "cuda" else None
        replayed = device.type == "cuda" and replays(lambda: run.step(batches(0)))
        where = {}
        if job["profile"] is not None:
            where["profile"] = _profile(run, batches(0), row, device, job["profile"])
        alone_until = time.time()
    losses = [loss for _, loss in (first, *rest)]
    check(losses, expected, run.vocabulary)
    seconds = [each for each, _ in (first, *rest)][WARM_UP:]
    median = statistics.median(seconds)
    return {
        "parameters": run.parameters,
        "precision": run.precision,
        "batch": row.batch,
        "seq_len": row.seq_len,
        "steps": job["steps"],
        "start_seconds": round(start_seconds, 2),
        "first_step_seconds": round(first[0], 2),
        "step_ms_median": round(1e3 * median, 2),
        "step_ms_min_max": [round(1e3 * f(seconds), 2) for f in (min, max)],
        "tokens_per_second": round(row.batch * row.seq_len / median),
        "peak_memory_gib": None if peak is None else round(peak, 3),
        "memory_before_steps_gib": None if held is None else round(held, 3),
        "graphs": graphs,
        "graph_breaks": counts.breaks()["graph_breaks"],
        "recompiles": counts.graphs() - graphs,
        "cuda_graph": replayed,
        "skipped_steps": run.skipped(),
        "loss_first": round(losses[0], 4),
        "loss_first_eager": None if expected is None else round(expected, 4),
        "loss_last": round(statistics.mean(losses[-LAST:]), 4),
        "losses_every_10": [round(loss, 4) for loss in losses[::10]],
        "alone": [alone_since, alone_until],
        **where,
    }


def check(losses: list[float], expected: float | None, vocabulary: int) -> None:
    """Raises ValueError unless the losses are right: the first one, that all are numbers, and that they fall."""
    first, last = losses[0], statistics.mean(losses[-LAST:])
    if not all(math.isfinite(loss) for loss in losses):
        raise ValueError(f"loss: wanted finite ones, got {losses}")
    if expected is not None and abs(first - expected) > TOLERANCE * expected:
        raise ValueError(f"first loss: wanted the eager reference's {expected:.4f}, got {first:.4f}")
    if expected is None and abs(first - math.log(vocabulary)) > GUESS:
        raise ValueError(f"first loss: wanted a guess's {math.log(vocabulary):.2f} within {GUESS}, got {first:.4f}")
    if last >= first:
        raise ValueError(f"loss: wanted it to fall, got {first:.4f} at first and {last:.4f} at last")


def replays(call: Callable[[], Any]) -> bool:
    """Whether a call replays a CUDA graph."""
    count, plain = 0, torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal count
        count += 1
        plain(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", counted):
        call()
    return count > 0


def _batches(row: StepRow, device: torch.device) -> Callable[[int], Tensor]:
    corpus = tf.data.load(tf.config.DataConfig(seq_len=row.seq_len, batch_size=row.batch))
    windows = tf.data.Windows(corpus.train, row.seq_len, row.batch, 0, row.seq_len <= WITHIN_DOCUMENTS)
    return lambda i: windows.batch(i).to(device)


def _timed(step: Callable[[Tensor], Tensor], tokens: Tensor) -> tuple[float, float]:
    """Seconds and loss."""
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
    begun = time.perf_counter()
    loss = step(tokens).item()
    return time.perf_counter() - begun, loss


def _reset_memory(device: torch.device) -> float | None:
    """GiB that are held between steps; from here on the peak is that of steps, recording a CUDA graph and all."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**30


def _profile(run: trained.Trained, tokens: Tensor, row: StepRow, device: torch.device, folder: str) -> dict[str, Any]:
    """Where the time of a step goes, on a GPU; folder: for its trace, which the result then names ("": no trace)."""
    name = f"{re.sub('[^0-9a-zA-Z]+', '_', row.name)}_{row.batch}x{row.seq_len}.json"
    trace = Path(folder) / name if folder else None
    found = step_profile.profile(
        lambda: run.step(tokens), run.work.products, trace,
        attention=run.work.attention, state_bytes=run.work.state_bytes,
        copy_tb_per_s=timing.copy_bandwidth(str(device), 10, 2**27),
    )  # fmt: skip
    return found if trace is None else {**found, "trace": str(trace)}


def main(place: Path) -> None:
    """Do a job's work and write its numbers; an exception ends the process with its own message."""
    job = json.loads(place.read_text(encoding="utf-8"))
    found = measure(job, Turns(Path(job["lock"]), Path(job["told"])))
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
