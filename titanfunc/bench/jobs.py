"""Rows of a table, each in a process of its own, several of them at once."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from titanfunc.bench.turns import follow
from titanfunc.compile_report.process import end_as_interrupted, in_process

Row = dict[str, Any]
STAGES = {"compiling": "compiles", "timing": "is timed"}


def run_all(
    jobs: Mapping[str, Mapping[str, Any]],
    worker: Sequence[str],
    at_once: int,
    limit: float,
    found: Callable[[str, Row], None],
    caches: Path | None = None,
) -> None:
    """Run ``worker JOB.json`` for every job, by its name, ``at_once`` together; ``found`` takes each row as it comes.

    A job is given "lock" and "told", the paths of its Turns, and "began", when its process was started. limit: seconds
    that a process may take, without those that it waits for others. caches: where compilers keep what they made (None:
    every process begins with nothing). Rows that fail say why in "status" and "error". When it is interrupted, so are
    the processes.
    """
    stop = threading.Event()
    end_as_interrupted()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
        lock = Path(folder) / "lock"

        def one(name: str) -> Row:
            with tempfile.TemporaryDirectory(dir=folder) as own:
                told = Path(own) / "told"
                steps = follow(told, lambda stage, seconds: _say(name, stage, seconds))

                def watch() -> float:
                    if stop.is_set():
                        raise InterruptedError(f"{name}: stopped")
                    return steps()

                job = {**jobs[name], "lock": str(lock), "told": str(told), "began": time.time()}
                return in_process(job, limit, Path(own), worker, watch=watch, environment=_kept(caches))

        try:
            running = {pool.submit(one, name): name for name in jobs}
            for done in as_completed(running):
                row, name = done.result(), running[done]
                error = f": {row['error']}" if row["status"] != "measured" else ""
                print(f"{name}: {row['status']}{error}", file=sys.stderr, flush=True)
                found(name, row)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _say(name: str, stage: str, seconds: float) -> None:
    if stage in STAGES:
        print(f"{name}: {STAGES[stage]} ({seconds:.0f} s)", file=sys.stderr, flush=True)


def _kept(caches: Path | None) -> dict[str, str]:
    if caches is None:
        return {}
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(caches.resolve() / "inductor"),
        "TRITON_CACHE_DIR": str(caches.resolve() / "triton"),
    }
