"""Where a step's time goes on a GPU: its kernels by kind, against what the arithmetic alone would take.

A CUDA graph's launches may overlap (a kernel that waits for the one before it counts its wait), so that the kinds may
add up to more than the step; ``step_ms`` is the device's time from the first kernel's start to the last one's end.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The first expression that is found in a kernel's name says its kind.
KINDS = (
    ("matrix products", r"nvjet|gemm|cutlass|xmma|cublas"),
    ("attention", r"_attend|_by_queries|by_keys|by_prefix|flash|fmha|sdpa"),
    (
        "memory",
        r"^_forward$|^_backward$|pull_|trace_kernel|keys_kernel|_update|hidden_kernel|output_kernel|returned|finish"
        r"|scale_kernel|prepare_kernel|memory",
    ),
    ("FP8 casts", r"_cast_|_peak_"),
    ("symmetric products", r"_symmetric"),
    ("copies", r"Memcpy|Memset|copy_|elementwise_kernel.*copy|fill"),
    ("inductor's own", r"^triton_"),
    ("other", r""),
)  # fmt: skip
PEAK_TFLOPS = 790.0  # of bfloat16 products, as measured on an H200
ROWS = 40


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name))


def profile(call: Callable[[], Any], flops: float, trace: Path | None = None) -> dict[str, Any]:
    """Runs ``call`` once under torch's profiler, after it has run before. flops: of the step's matrix products.

    Returns milliseconds and launches of each kind, the longest kernels, and the milliseconds that ``flops`` take at
    PEAK_TFLOPS; ``trace`` gets the trace (Chrome's format). Raises RuntimeError if no kernel was seen.
    """
    activity = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    on_device = [e for e in seen.events() or [] if e.device_type == torch._C._autograd.DeviceType.CUDA]
    if not on_device:
        raise RuntimeError("profile: wanted kernels on a CUDA device, saw none")
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(trace))
    return summary([(e.name, e.time_range.start, e.time_range.end) for e in on_device], flops)


def summary(kernels: list[tuple[str, float, float]], flops: float) -> dict[str, Any]:
    """What :func:`profile` returns, of (name, start, end) in microseconds."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, start, end in kernels:
        by_kind[kind_of(name)].append(end - start)
        by_name[name].append(end - start)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:ROWS]
    whole = max(end for *_, end in kernels) - min(start for _, start, _ in kernels)
    return {
        "step_ms": round(1e-3 * whole, 3),
        "launches": len(kernels),
        "products_at_the_roof_ms": round(1e-9 * flops / PEAK_TFLOPS, 3),
        "kinds": [
            {"kind": kind, "ms": round(1e-3 * sum(times), 3), "launches": len(times)}
            for kind, times in sorted(by_kind.items(), key=lambda item: -sum(item[1]))
        ],
        "kernels": [{"name": n[:100], "ms": round(1e-3 * sum(t), 3), "launches": len(t)} for n, t in longest],
    }


def table(found: dict[str, Any]) -> str:
    """The kinds, a line each."""
    head = f"{found['step_ms']} ms on the device, {found['launches']} launches; matrix products alone would take "
    lines = [head + f"{found['products_at_the_roof_ms']} ms at {PEAK_TFLOPS:g} TFLOP/s"]
    return "\n".join(
        lines + [f"  {row['ms']:9.3f} ms {row['launches']:6d} launches  {row['kind']}" for row in found["kinds"]]
    )
