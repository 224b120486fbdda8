"""Times the Triton kernels against what torch makes of their references, each row checked first.

    python benchmarks/kernels.py --rows "rms_norm|memory" --out FILE.json

The rows stand in benchmarks/kernel_rows. A row is right where every output and gradient of the kernel (for drawn
cotangents) lies within --tolerance of the largest number of the reference's; one that is not is reported and not timed.
Then three ways are timed, one after the other, inside CUDA graphs: the kernel and the reference, both compiled by
inductor in one graph with their gradients, and the reference eagerly. Times are medians of --rounds replays, in
microseconds; memory is the peak that a call adds.
On a CPU only correctness is looked at.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import header
from timing import furthest, leaves, microseconds


def rows(pattern: str) -> list[dict[str, Any]]:
    """Every row whose name ``pattern`` is found in."""
    import kernel_rows

    found = []
    for module in pkgutil.iter_modules(kernel_rows.__path__):
        found += importlib.import_module(f"kernel_rows.{module.name}").ROWS
    return [row for row in found if re.search(pattern, row["name"])]


def cotangents_of(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Drawn cotangents of the function's floating-point outputs: real ones, so that no compiler can fold them."""
    found = [leaf for leaf in leaves(function(*inputs)) if leaf.is_floating_point()]
    source = torch.Generator(found[0].device).manual_seed(1)
    return [torch.randn(leaf.shape, generator=source, device=leaf.device).to(leaf.dtype) for leaf in found]


def outputs_and_gradients(function: Callable[..., Any], grad: bool) -> Callable[..., list[torch.Tensor]]:
    """(inputs, cotangents) -> the function's tensors and, with ``grad``, its gradients by every float argument."""

    def run(inputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if not grad:
            return leaves(function(*inputs))
        smooth = [i for i, tensor in enumerate(inputs) if tensor.is_floating_point()]

        def of(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            whole = list(inputs)
            for i, tensor in zip(smooth, given, strict=True):
                whole[i] = tensor
            return tuple(leaf for leaf in leaves(function(*whole)) if leaf.is_floating_point())

        out, pull = torch.func.vjp(of, *(inputs[i] for i in smooth))
        return [*out, *pull(tuple(cotangents))]

    return run


def measure(row: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One row of the result."""
    torch._dynamo.reset()
    began = time.perf_counter()
    inputs = row["make"](torch.device(args.device))
    cotangents = cotangents_of(row["reference"], inputs) if row["grad"] else []
    ways = {name: outputs_and_gradients(row[name], row["grad"]) for name in ("kernel", "reference")}
    error = furthest(ways["kernel"](inputs, cotangents), ways["reference"](inputs, cotangents))
    result: dict[str, Any] = {"name": row["name"], "gradients": row["grad"], "furthest": round(error, 6)}
    result["right"] = error <= args.tolerance
    if not result["right"] or torch.device(args.device).type != "cuda":
        return result
    compiled = {name: torch.compile(way, fullgraph=True, dynamic=False) for name, way in ways.items()}
    calls = {
        "kernel": lambda: compiled["kernel"](inputs, cotangents),
        "compiled_reference": lambda: compiled["reference"](inputs, cotangents),
        "eager_reference": lambda: ways["reference"](inputs, cotangents),
    }
    for name, call in calls.items():
        if name == "eager_reference" and args.no_eager:
            continue
        try:
            result[f"{name}_us"], result[f"{name}_gib"] = (round(x, 3) for x in microseconds(call, args.rounds))
        except Exception as error:  # a reference that cannot be captured must not lose the row
            result[f"{name}_error"] = f"{type(error).__name__}: {str(error)[:300]}"
    if "kernel_us" in result:
        seconds = 1e-6 * result["kernel_us"]
        for unit, name in (("bytes", "tb_per_s"), ("flops", "tflops")):
            if unit in row:
                result[name] = round(1e-12 * row[unit](*inputs) / seconds, 3)
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def copy_bandwidth(device: str, rounds: int) -> float:
    """TB/s of an elementwise pass over 2 GiB, read and written: the ceiling for what is bound by memory."""
    source = torch.randn(2**29, device=device)
    target = torch.empty_like(source)
    return round(2 * source.nbytes / microseconds(lambda: torch.neg(source, out=target), rounds)[0] / 1e6, 3)


def main() -> None:
    """Reads the arguments, measures the rows and writes the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="a regular expression found in a row's name")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    chosen = rows(args.rows)
    if not chosen:
        parser.error(f"--rows: wanted an expression found in a row's name, got {args.rows!r}")
    result = header(args)
    if torch.device(args.device).type == "cuda":
        result["copy_tb_per_s"] = copy_bandwidth(args.device, args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for row in chosen:
        try:
            found = measure(row, args)
        except Exception as error:  # one row's failure must not lose the others
            found = {"name": row["name"], "error": f"{type(error).__name__}: {str(error)[:1500]}"}
        result["rows"].append(found)
        print(json.dumps(found), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
