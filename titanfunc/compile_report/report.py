"""The report as a whole: which variants run here, their rows, and the files in its folder."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console

from titanfunc.compile_report import counts
from titanfunc.compile_report.checkout import commit
from titanfunc.compile_report.process import end_as_interrupted, failed, measured
from titanfunc.config.compile_report import PAGE, ROWS, SETTINGS, ReportPlan, to_mapping
from titanfunc.config.files import write_text
from titanfunc.config.runs import make_run_dir
from titanfunc.device import require_kernels_run, require_optimizer_runs, resolve_device
from titanfunc.report.compilation import as_html, as_table


class Setup(NamedTuple):
    """What every row shares. benchmarks: the folder that holds the older way."""

    plan: ReportPlan
    device: torch.device
    benchmarks: Path


def assemble(plan: ReportPlan, benchmarks: Path) -> Setup:
    """Find the device; makes nothing. Raises ValueError where it, or what the optimizer needs of it, is not there."""
    device = resolve_device(plan.config.device, "device")
    require_optimizer_runs(plan.optim, device)
    return Setup(plan, device, benchmarks)


def run(setup: Setup) -> bool:
    """Measure every variant and print the table; the folder's files are written anew after each row.

    Returns whether every variant was measured that can run here.
    """
    end_as_interrupted()  # a variant's process must not outlive this one
    plan = setup.plan
    folder = make_run_dir(plan.out, exact=bool(plan.config.out))
    settings = to_mapping(plan)
    (folder / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    report = {**header(setup), "settings": settings, "rows": []}
    pairs = plan.pairs()
    print(f"report   {folder}\nmodel    {report['what']}\ndevice   {report['device']}", flush=True)
    for number, (variant, kernels) in enumerate(pairs, 1):
        begun = time.perf_counter()
        row = row_of(setup, variant, kernels)
        report["rows"].append(row)
        write_text(folder / ROWS, json.dumps(report, indent=1) + "\n")
        write_text(folder / PAGE, as_html(report))
        name = f"{variant}, {kernels}" if kernels else variant
        error = f" ({row['error']})" if row.get("error") else ""
        took = time.perf_counter() - begun
        print(f"{number}/{len(pairs)}      {name}: {row['status']} in {took:.0f} s{error}", flush=True)
    Console().print(as_table(report["rows"]))
    print(f"written  {ROWS}, {PAGE} in {folder}")
    return not any(failed(row) for row in report["rows"])


def row_of(setup: Setup, variant: str, kernels: str) -> dict[str, Any]:
    """A variant's row; one that cannot run here has the status "not here", and says why."""
    plan, device = setup.plan, setup.device
    settings = {**to_mapping(plan), "out": "", "device": str(device)}
    try:
        if variant == "inductor_cuda_graph" and device.type != "cuda":
            raise ValueError("a CUDA graph needs a CUDA device")
        if variant == "older_way" and not plan.model.memory_at:
            raise ValueError("the older way has a memory, and this model none")
        if kernels:
            model = dataclasses.replace(plan.model, kernels=kernels)
            require_kernels_run(model, device, "kernels")
            settings["model"]["kernels"] = kernels
    except ValueError as error:
        return {"variant": variant, "kernels": kernels, "status": "not here", "error": str(error)}
    job = {"settings": settings, "variant": variant, "kernels": kernels, "benchmarks": str(setup.benchmarks)}
    return measured(job, plan.config.time_limit)


def header(setup: Setup) -> dict[str, Any]:
    """What was measured, where and with what, and what the columns mean there."""
    plan, cuda = setup.plan, setup.device.type == "cuda"
    batch = f"{plan.config.batch_size} x {plan.seq_len} tokens a step"
    parts = f" in {plan.config.accumulate} parts" if plan.config.accumulate > 1 else ""
    name = plan.optim.name if plan.optim.name != "nested" else f"nested({plan.optim.nested.base})"
    return {
        "what": f"{plan.preset}, {plan.model.precision}, {batch}{parts}, {name}",
        "device": torch.cuda.get_device_name(setup.device) if cuda else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "commit": plan.config.commit or commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "columns": counts.ON_CUDA if cuda else counts.ON_CPU,
    }


def _triton() -> str:
    try:
        return __import__("triton").__version__
    except ImportError:
        return "not installed"
