"""What is counted of a step: graphs and breaks, and what one step runs and launches."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
ON_CUDA = {
    "kernel_count": "kernels that the device ran in one step, by torch.profiler",
    "launches": "calls of one step that put kernels or a whole CUDA graph into the device's queue, by torch.profiler",
    "peak_memory_gib": "the most that torch held of the device's memory after the first step, which compiles",
}
ON_CPU = {
    "kernel_count": "eager: operations that one step dispatches; aot_eager: operations in the graphs; others: loops "
    "that inductor generated, without library calls and what runs eagerly",
    "launches": "nothing is launched on a CPU",
    "peak_memory_gib": "the most that the process held, torch, compiler and all",
}


def graphs() -> int:
    """Graphs that Dynamo has compiled so far."""
    return counters["stats"]["unique_graphs"]


def breaks() -> dict[str, Any]:
    """graph_breaks; reasons, a count each, the most frequent first; left_eager: functions in whose loops it broke.

    Of these Dynamo compiles nothing, and does not count them among the breaks.
    """
    found = counters["graph_break"]
    reasons: dict[str, int] = {}
    for text, count in found.items():
        said = [line.strip() for line in text.splitlines() if line.strip()]
        reason = re.sub(r" at 0x[0-9a-f]+", "", " ".join(said[:2]))
        reasons[reason] = reasons.get(reason, 0) + count
    skipped = [re.search(r"frame skipped: (\w+) \(.*?(\w+\.py line \d+)", text) for text in counters["unimplemented"]]
    return {
        "graph_breaks": sum(found.values()),
        "reasons": dict(sorted(reasons.items(), key=lambda pair: -pair[1])),
        "left_eager": sorted({f"{match[1]} ({match[2]})" for match in skipped if match}),
    }


def on_cuda(run: Callable[[], Any]) -> dict[str, Any]:
    """kernel_count, launches and cuda_graph of one run, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    events = profile.events() or []
    device = torch._C._autograd.DeviceType.CUDA
    names = [event.name for event in events if event.device_type != device]
    ran = [
        event
        for event in events
        if event.device_type == device
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return {
        "kernel_count": len(ran),
        "launches": sum(name in LAUNCHES for name in names),
        "cuda_graph": "cudaGraphLaunch" in names,
    }


def on_cpu(run: Callable[[], Any], variant: str, nodes: list[int]) -> dict[str, Any]:
    """The same where there is no device: see ON_CPU. nodes: operations of each graph of aot_eager."""
    if variant == "eager":
        with _Counting() as mode:
            run()
        count = mode.count
    elif variant == "aot_eager":
        count = sum(nodes)
    else:
        from torch._inductor import metrics  # slow to import where inductor has not been called

        count = metrics.generated_kernel_count
    return {"kernel_count": count, "launches": None, "cuda_graph": False}


def peak_memory(device: torch.device) -> float:
    """GiB: of a device since its peak was last reset, else of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _Counting(TorchDispatchMode):
    """Counts the operations that are dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
