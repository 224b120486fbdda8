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
    ("attention", r"_attend|_by_queries|by_keys|by_prefix|flash|fmha|sdpa"),  # torch's own are named after cutlass, too
    ("matrix products", r"nvjet|gemm|cutlass|xmma|cublas"),
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
REST = "all others together"
PEAK_TFLOPS = 790.0  # of bfloat16 products, as measured on an H200
ROWS = 40


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name))


def profile(call: Callable[[], Any], flops: float, trace: Path | None = None, **least: Any) -> dict[str, Any]:
    """Runs ``call`` once under torch's profiler, after it has run before. flops: of the step's matrix products.

    Returns milliseconds and launches of each kind, the longest kernels, and what :func:`floors` makes of ``flops`` and
    ``least``; ``trace`` gets the trace (Chrome's format). Raises RuntimeError if no kernel was seen.
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
    return summary([(e.name, e.time_range.start, e.time_range.end) for e in on_device], flops, **least)


def floors(
    flops: float, attention: float = 0.0, state_bytes: float = 0.0, copy_tb_per_s: float | None = None
) -> dict[str, float]:
    """The milliseconds that a kind cannot do without, of those whose least work is known.

    Matrix products and attention: their FLOPs at PEAK_TFLOPS. All other kinds together, as the optimizer is fused with
    what stands beside it: the traffic of the state alone, at the bandwidth of a copy (TB/s; None: not known).
    """
    found = {"matrix products": 1e-9 * flops / PEAK_TFLOPS, "attention": 1e-9 * attention / PEAK_TFLOPS}
    if copy_tb_per_s:
        found[REST] = 1e-9 * state_bytes / copy_tb_per_s
    return {kind: round(ms, 3) for kind, ms in found.items() if ms}


def summary(kernels: list[tuple[str, float, float]], flops: float, **least: Any) -> dict[str, Any]:
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
        "floors_ms": floors(flops, **least),
        "copy_tb_per_s": least.get("copy_tb_per_s"),
        "products_at_the_roof_ms": round(1e-9 * flops / PEAK_TFLOPS, 3),
        "kinds": [
            {"kind": kind, "ms": round(1e-3 * sum(times), 3), "launches": len(times)}
            for kind, times in sorted(by_kind.items(), key=lambda item: -sum(item[1]))
        ],
        "kernels": [{"name": n[:100], "ms": round(1e-3 * sum(t), 3), "launches": len(t)} for n, t in longest],
    }


def table(found: dict[str, Any]) -> str:
    """The kinds, a line each, beside what they cannot do without where that is known; and what the latter holds."""
    least = found["floors_ms"]
    lines = [f"{found['step_ms']} ms on the device, {found['launches']} launches", f"  {'ms':>9} {'at least':>9}"]
    for row in found["kinds"]:
        floor = f"{least[row['kind']]:9.3f}" if row["kind"] in least else f"{'':9}"
        lines.append(f"  {row['ms']:9.3f} {floor} {row['launches']:6d} launches  {row['kind']}")
    if REST in least:
        rest = [row for row in found["kinds"] if row["kind"] not in least]
        counts = sum(row["launches"] for row in rest)
        lines.append(f"  {sum(row['ms'] for row in rest):9.3f} {least[REST]:9.3f} {counts:6d} launches  {REST}")
    roof = f"at least: FLOPs of the parameters' products and of attention at {PEAK_TFLOPS:g} TFLOP/s"
    if REST in least:
        roof += f", the state's traffic at {found['copy_tb_per_s']:g} TB/s; not the memory's work nor activations'"
    return "\n".join([*lines, f"  {roof}"])
