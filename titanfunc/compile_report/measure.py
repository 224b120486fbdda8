"""One variant, measured in this process: ``python -m titanfunc.compile_report.measure JOB.json``, which report.py runs.

The job names the settings, the variant and where the numbers go. The process is a fresh one, so that its counters and
its memory are the variant's own; its compile caches are where the environment says.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from titanfunc.compile_report import counts, variants
from titanfunc.config.compile_report import ReportPlan, prepare
from titanfunc.device import require_kernels_run, require_optimizer_runs, resolve_device

Batch = dict[str, torch.Tensor]


def measure(plan: ReportPlan, variant: str, kernels: str, benchmarks: Path) -> dict[str, Any]:
    """The numbers of a variant. compile_seconds: what its warm-up took beyond as many steps of the median's time."""
    config, nodes = plan.config, []  # type: tuple[Any, list[int]]
    device = resolve_device(config.device, "device")
    if variant == "older_way":
        step = variants.older_way(plan, benchmarks, device)
    else:
        require_kernels_run(plan.model, device, "kernels")
        require_optimizer_runs(plan.optim, device)
        step = variants.make(plan, variant, kernels, device, nodes)
    batches = [_batch(plan, config.seed + i, device) for i in range(2)]

    def timed(i: int) -> tuple[float, float]:
        _wait(device)
        begun = time.perf_counter()
        loss = step(batches[i % 2]).item()
        return time.perf_counter() - begun, loss

    first = timed(0)
    graphs = counts.graphs()
    if (
        device.type == "cuda"
    ):  # what compiling tried out does not count; what a CUDA graph holds, from its recording on, does
        torch.cuda.reset_peak_memory_stats(device)
    warm_up = [first, *(timed(i) for i in range(1, config.warm_up))]
    rest = [timed(i) for i in range(config.warm_up, config.warm_up + config.steps)]
    median = statistics.median(seconds for seconds, _ in rest)
    memory = counts.peak_memory(device)
    beyond = sum(seconds for seconds, _ in warm_up) - len(warm_up) * median
    found = {
        "graphs": graphs,
        **counts.breaks(),
        "recompiles": counts.graphs() - graphs,
        "first_step_seconds": first[0],
        "compile_seconds": None if variant == "eager" else max(beyond, 0.0),
        "step_ms": 1e3 * median,
        "tokens_per_second": config.batch_size * plan.seq_len / median,
        "peak_memory_gib": memory,
        "losses": [loss for _, loss in [*warm_up, *rest]],
    }
    again = lambda: step(batches[0])  # noqa: E731
    found |= counts.on_cuda(again) if device.type == "cuda" else counts.on_cpu(again, variant, nodes)
    if variant == "older_way":
        found["fullgraph_error"] = _first_line(lambda: _whole(plan, benchmarks, device, batches[0]))
    return found


def _batch(plan: ReportPlan, seed: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def tokens(*lead: int) -> torch.Tensor:
        shape = (*lead, plan.config.batch_size, plan.seq_len + 1)
        return torch.randint(plan.model.vocab_size, shape, generator=generator).to(device)

    return {"tokens": tokens()} | ({"held_out": tokens(plan.optim.held_out)} if plan.optim.held_out else {})


def _whole(plan: ReportPlan, benchmarks: Path, device: torch.device, batch: Batch) -> None:
    torch._dynamo.reset()
    variants.older_way(plan, benchmarks, device, fullgraph=True)(batch)


def _first_line(run: Callable[[], None]) -> str:
    """Of what a call raises; "" where it raises nothing."""
    try:
        run()
    except Exception as error:  # whatever it is, it is what the report shows
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(job: Path) -> None:
    """Do a job's work and write its numbers; an exception ends the process with its own message."""
    given = json.loads(job.read_text(encoding="utf-8"))
    plan = prepare(given["settings"])
    found = measure(plan, given["variant"], given["kernels"], Path(given["benchmarks"]))
    Path(given["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
