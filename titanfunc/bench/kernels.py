"""Kernels against what torch makes of their references: rows, each checked first and then timed on a GPU.

A row is a dict. name; make: a device -> the inputs, tensors; kernel, reference: the same function of these inputs both
ways, which returns tensors; grad: whether its gradients are looked at too; bytes or flops, if it has them: of the
inputs, the least traffic or the work; tolerance: one of its own, where it has to be larger than that of the others. A
row of :mod:`titanfunc.bench.peers` has ``peer`` besides: another project's layer, to be timed beside ours.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import pkgutil
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from titanfunc.bench import kernel_rows, peers
from titanfunc.bench.timing import furthest, leaves, microseconds, microseconds_eager

Row = dict[str, Any]


def all_rows() -> list[Row]:
    """Every row there is; those beside peers come last."""
    found: list[Row] = []
    for module in pkgutil.iter_modules(kernel_rows.__path__):
        found += importlib.import_module(f"{kernel_rows.__name__}.{module.name}").ROWS
    return found + peers.rows()


def chosen(pattern: str) -> list[Row]:
    """Every row whose name ``pattern`` is found in; re.error for what is no regular expression."""
    wanted = re.compile(pattern)
    return [row for row in all_rows() if wanted.search(row["name"])]


def cotangents_of(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Drawn cotangents of the function's floating-point outputs, of their shapes: real ones, so that no compiler can
    fold them."""
    found = [leaf for leaf in leaves(function(*inputs)) if leaf.is_floating_point()]
    source = torch.Generator(found[0].device).manual_seed(1)
    return [torch.randn(leaf.shape, generator=source, device=leaf.device).to(leaf.dtype) for leaf in found]


def outputs_and_gradients(function: Callable[..., Any], grad: bool) -> Callable[..., list[Tensor]]:
    """(inputs, cotangents) -> the function's tensors, of any shapes, and, with ``grad``, its gradients by every float
    argument."""

    def run(inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
        if not grad:
            return leaves(function(*inputs))
        smooth = [i for i, tensor in enumerate(inputs) if tensor.is_floating_point()]

        def of(*given: Tensor) -> tuple[Tensor, ...]:
            whole = list(inputs)
            for i, tensor in zip(smooth, given, strict=True):
                whole[i] = tensor
            return tuple(leaf for leaf in leaves(function(*whole)) if leaf.is_floating_point())

        out, pull, *_ = torch.func.vjp(of, *(inputs[i] for i in smooth))
        return [*out, *pull(tuple(cotangents))]

    return run


def measured(row: Row, args: argparse.Namespace) -> Row:
    """What is found of one row; an exception is what it says, so that no row loses the others."""
    try:
        return _measure(row, args)
    except Exception as error:
        return {"name": row["name"], "error": f"{type(error).__name__}: {str(error)[:1500]}"}


def _measure(row: Row, args: argparse.Namespace) -> Row:
    torch._dynamo.reset()
    began = time.perf_counter()
    device = torch.device(args.device)
    peer = row.get("peer")
    if peer and not peers.installed():
        return {"name": row["name"], "status": f"{peers.PACKAGE} is not installed"}
    inputs = row["make"](device)
    cotangents = cotangents_of(row["reference"], inputs) if row["grad"] else []
    ways = {name: outputs_and_gradients(row[name], row["grad"]) for name in ("kernel", "reference")}
    error = furthest(ways["kernel"](inputs, cotangents), ways["reference"](inputs, cotangents))
    result: Row = {"name": row["name"], "gradients": row["grad"], "furthest": round(error, 6)}
    result["right"] = error <= max(args.tolerance, row.get("tolerance", 0.0))
    their_call = _tried(result, peer, device) if peer else None
    if not result["right"] or device.type != "cuda":
        return result
    compiled = {name: torch.compile(way, fullgraph=True, dynamic=False) for name, way in ways.items()}
    ours = lambda: compiled["kernel"](inputs, cotangents)  # noqa: E731
    if peer:
        _time(result, "titanfunc", ours, microseconds, args.rounds)
        if their_call is not None:
            _time(result, "titans_pytorch", their_call, microseconds_eager, args.rounds)
    else:
        _time(result, "kernel", ours, microseconds, args.rounds)
        reference = lambda: compiled["reference"](inputs, cotangents)  # noqa: E731
        _time(result, "compiled_reference", reference, microseconds, args.rounds)
        if not args.no_eager:
            eager = lambda: ways["reference"](inputs, cotangents)  # noqa: E731
            _time(result, "eager_reference", eager, microseconds, args.rounds)
    if "kernel_us" in result:
        seconds = 1e-6 * result["kernel_us"]
        for unit, name in (("bytes", "tb_per_s"), ("flops", "tflops")):
            if unit in row:
                result[name] = round(1e-12 * row[unit](*inputs) / seconds, 3)
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def _tried(result: Row, peer: Callable[..., Any], device: torch.device) -> Callable[[], Any] | None:
    """A peer's call, made once, and in the result whether it gave numbers; where it fails why, and its memory is given
    back: ours must not be lost for it."""
    call = None
    try:
        call = peer(device)
        result["peer_finite"] = all(bool(torch.isfinite(leaf).all()) for leaf in call())
        return call
    except Exception as error:
        result["titans_pytorch_error"] = _said(error)
    del call
    gc.collect()
    torch.cuda.empty_cache()
    return None


def _time(result: Row, name: str, call: Callable[[], Any], clock: Callable[..., Any], rounds: int) -> None:
    """Put a call's microseconds and GiB into the result, or why there are none: that must not lose the others."""
    try:
        result[f"{name}_us"], result[f"{name}_gib"] = (round(x, 3) for x in clock(call, rounds))
    except Exception as error:
        result[f"{name}_error"] = _said(error)
    torch.cuda.empty_cache()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
