"""How the benchmarks compare results and time calls."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Cycles that the device spins, some 100 us, before a timed replay: meanwhile the host has put all of it into the queue.
# Else a short graph's time would hold the host's launching it.
SPIN = 200_000


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors (of any shapes) of a tensor, or of sequences or dicts of them; None is none."""
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for each in (value.values() if isinstance(value, dict) else value) for leaf in leaves(each)]


def furthest(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest difference of any tensor (of any shape), as a share of its reference's largest number.

    inf where one is NaN.
    """
    worst = 0.0
    for ours, theirs in zip(got, want, strict=True):
        if not ours.is_floating_point() or not ours.numel():
            continue
        error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1e-30)
        worst = max(worst, float(error) if torch.isfinite(error) else float("inf"))
    return worst


def microseconds(run: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """(median time of a replay from a CUDA graph, GiB that the graph holds)."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    del kept
    return statistics.median(times), memory


def microseconds_eager(run: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """(median time of a call between device events, GiB that it adds), for what no CUDA graph can hold."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**30


def copy_bandwidth(device: str, rounds: int, count: int = 2**29) -> float:
    """TB/s of an elementwise pass over ``count`` floats, read and written: the ceiling for what is bound by memory."""
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return round(2 * source.nbytes / microseconds(lambda: torch.neg(source, out=target), rounds)[0] / 1e6, 3)
