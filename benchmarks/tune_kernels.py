"""Sweeps the kernels' constants: each candidate checked against the constants as they are, forward and backward timed.

    python benchmarks/tune_kernels.py --kernels memory_small memory_wide --out FILE.json --seconds 60

Cases and candidates stand in benchmarks/tuning. Each kernel has --seconds. For at most --compile of these, --workers
processes compile its candidates, the most promising of all cases first, into Triton's cache on disk; then this process
times, case by case, those that are compiled. Times are of the raw launches, each pass in a CUDA graph of its own:
medians of --rounds replays, in microseconds. A candidate is right where all it returns, gradients with it, lies within
--tolerance of the largest number of what the constants as they are return. With every candidate stand its kernels'
registers, spills and shared memory; last of all, for each case, a table of its launches (name, calls, mean
microseconds), which a worker makes: the profiler would slow the timed process down.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tuning.case import Calls, Case, Settings
from tuning.settings import changed

from titanfunc.bench.common import header
from titanfunc.bench.timing import furthest, leaves, microseconds

KERNELS = ("memory_small", "memory_wide", "single_write", "attention", "norm", "gate", "symmetric")
PROFILE_SECONDS = 30
WORKERS = 14  # at most; a worker holds its inputs and what a call returns, up to 4 GB


def cases_of(kernel: str) -> list[Case]:
    """The kernel's cases, which import Triton."""
    return importlib.import_module(f"tuning.{kernel}").CASES


def settings_of(case: Case) -> list[Settings]:
    """The constants as they are, then the candidates."""
    return [{}, *case.candidates]


@contextlib.contextmanager
def launches(compile_only: bool = False) -> Iterator[dict[str, Any]]:
    """Every Triton kernel called while it is entered, by its function's name; compiled alone, or launched as well."""
    from triton.runtime.jit import JITFunction

    found: dict[str, Any] = {}
    run = JITFunction.run

    def recorded(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        found[self.__name__] = run(self, *args, warmup=warmup or compile_only, **options)
        return found[self.__name__]

    with mock.patch.object(JITFunction, "run", recorded):
        yield found


@functools.lru_cache(maxsize=1)  # one case's inputs at a time
def calls_of(kernel: str, index: int, device: str) -> Calls:
    """The calls of a kernel's case."""
    return cases_of(kernel)[index].make(torch.device(device))


def compile_candidate(kernel: str, index: int, settings: Settings, device: str, until: float) -> str | None:
    """Compiles what a candidate launches, in a worker: what went wrong, or ""; None after ``until``."""
    if time.time() > until:
        return None
    try:
        calls = calls_of(kernel, index, device)
        with changed(settings), launches(compile_only=True):
            made = calls.forward()
            if calls.backward:
                calls.backward(made)
    except Exception as error:  # a candidate that does not compile is a result
        return message(error)
    finally:
        torch.cuda.empty_cache()
    return ""


def message(error: Exception) -> str:
    """What a row says of an error."""
    return f"{type(error).__name__}: {str(error)[:500]}"


def compiled(pool: Any, kernel: str, cases: dict[int, Case], device: str, seconds: float) -> dict[tuple[int, int], str]:
    """(case, place of a candidate) -> what went wrong or "", of those that the workers finished in time."""
    jobs = sorted((place, i) for i, case in cases.items() for place in range(len(settings_of(case))))
    until = time.time() + seconds
    waiting = {
        (i, place): pool.apply_async(compile_candidate, (kernel, i, settings_of(cases[i])[place], device, until))
        for place, i in jobs
    }
    found: dict[tuple[int, int], str] = {}
    while waiting and time.time() < until:
        ready = [job for job, result in waiting.items() if result.ready()]
        found |= {job: waiting.pop(job).get() for job in ready}
        time.sleep(0.05)
    return {job: wrong for job, wrong in found.items() if wrong is not None}


def table(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Kernels of one call, longest first: name, calls, mean microseconds."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    spent = {
        event.key: (event.count, event.self_device_time_total)
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total
    }
    ordered = sorted(spent.items(), key=lambda item: -item[1][1])
    return [{"name": key[:80], "calls": n, "mean_us": round(total / n, 2)} for key, (n, total) in ordered]


def profiled(kernel: str, index: int, device: str) -> dict[str, Any]:
    """In a worker: the tables of a case's passes with the constants as they are, or what went wrong."""
    try:
        ways = passes(calls_of(kernel, index, device))
        for way in ways.values():
            way()
        return {"launches": {name: table(way) for name, way in ways.items()}}
    except Exception as error:  # a machine may forbid profiling
        return {"error": message(error)}


def passes(calls: Calls, made: Any = None) -> dict[str, Callable[[], Any]]:
    """The calls by their pass; backward of ``made``, or of what forward returns now."""
    if calls.backward is None:
        return {"forward": calls.forward}
    made = calls.forward() if made is None else made
    return {"forward": calls.forward, "backward": functools.partial(calls.backward, made)}


def measure(calls: Calls, settings: Settings, want: list[torch.Tensor] | None, args: argparse.Namespace):
    """(what a candidate returns, its row): ``want`` is what the constants as they are return, None for themselves."""
    row: dict[str, Any] = {}
    timed = torch.device(args.device).type == "cuda"
    with changed(settings):
        with launches() if timed else contextlib.nullcontext({}) as kernels:
            made = calls.forward()
            pulled = calls.backward(made) if calls.backward else None
        got = [*leaves(made), *leaves(pulled)]
        row["furthest"] = round(furthest(got, got if want is None else want), 6)
        row["right"] = row["furthest"] <= args.tolerance
        if not timed:
            return got, row
        row["kernels"] = {
            name: {"registers": k.n_regs, "spills": k.n_spills, "shared": k.metadata.shared}
            for name, k in kernels.items()
        }
        if row["right"]:
            for name, way in passes(calls, made).items():
                row[f"{name}_us"] = round(microseconds(way, args.rounds)[0], 2)
    return got, row


def sweep(kernel: str, args: argparse.Namespace, pool: Any = None) -> Iterator[dict[str, Any]]:
    """Rows of every candidate of the kernel's cases that ``args.shapes`` names; ``pool`` compiles beforehand."""
    began = time.perf_counter()
    cases = {i: case for i, case in enumerate(cases_of(kernel)) if re.search(args.shapes, case.shape)}
    ready = None
    if pool is not None:
        ready = compiled(pool, kernel, cases, args.device, args.compile * args.seconds)
    for index, case in cases.items():
        calls = want = None
        for place, settings in enumerate(settings_of(case)):
            row = {"kernel": kernel, "shape": case.shape, "settings": settings}
            late = time.perf_counter() - began > args.seconds
            # Without the constants as they are there is nothing to check against: they are compiled here if need be.
            if late or (ready is not None and settings and (index, place) not in ready):
                yield row | {"skipped": "no time left" if late else "not compiled in time"}
                continue
            if settings and ready is not None and ready[index, place]:
                yield row | {"error": ready[index, place]}
                continue
            try:
                if calls is None:
                    calls = case.make(torch.device(args.device))
                got, found = measure(calls, settings, want, args)
                want = got if want is None else want
                yield row | found
            except Exception as error:  # one candidate's failure must not lose the others
                yield row | {"error": message(error)}
                if torch.device(args.device).type == "cuda":
                    torch.cuda.synchronize()  # raises where the device is lost to this process
                if want is None:
                    break
    for index, case in cases.items() if pool else ():
        row = {"kernel": kernel, "shape": case.shape}
        try:
            yield row | pool.apply_async(profiled, (kernel, index, args.device)).get(PROFILE_SECONDS)
        except multiprocessing.TimeoutError:
            yield row | {"error": "no table of launches in time"}


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case and pass, the fastest right settings beside the constants as they are."""
    found = []
    for kernel, shape in dict.fromkeys((row["kernel"], row["shape"]) for row in rows):
        of_case = [row for row in rows if (row["kernel"], row["shape"]) == (kernel, shape)]
        for unit in ("forward_us", "backward_us"):
            timed = [row for row in of_case if unit in row]
            if len(timed) > 1:
                as_it_is = next(row[unit] for row in timed if not row["settings"])
                fastest = min(timed, key=lambda row: row[unit])
                found.append(
                    {"kernel": kernel, "shape": shape, "pass": unit[:-3], "as_it_is_us": as_it_is,
                     "best_us": fastest[unit], "settings": fastest["settings"]}
                )  # fmt: skip
    return found


def main() -> None:
    """Reads the arguments, sweeps the kernels and writes the result after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--shapes", default="", help="a regular expression found in a case's shape")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each kernel, its tables of launches aside")
    parser.add_argument("--compile", type=float, default=0.7, help="share of --seconds that compiling may take")
    parser.add_argument("--workers", type=int, default=min(WORKERS, max(1, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("wanted a CUDA device: there is nothing to time elsewhere")
    result = header(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")

    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        pool.apply(torch.cuda.is_available)  # the workers have started: that is not to count
        for kernel in args.kernels:
            for row in sweep(kernel, args, pool):
                result["rows"].append(row)
                short = {key: value for key, value in row.items() if key != "kernels"}
                print(json.dumps(short, default=str), flush=True)
                save()
            result["best"] = best(result["rows"])
            save()
    for row in best(result["rows"]):
        print(json.dumps(row, default=str))


if __name__ == "__main__":
    main()
