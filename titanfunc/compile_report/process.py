"""A variant in a process of its own: a crash or a time limit costs its row, not the report."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

POLL = 0.2  # seconds between two calls of a watch
FAILED = ("failed", "timed out")
WORKER = (sys.executable, "-m", "titanfunc.compile_report.measure")


def failed(row: Mapping[str, Any]) -> bool:
    """Whether a row was to be measured and was not, or was not a second time with filled caches."""
    return row.get("status", "failed" if "error" in row else "") in FAILED or "warm_error" in row


def end_as_interrupted() -> None:
    """From here on SIGTERM ends this process as Ctrl-C does: what it has running is ended too. For the main thread."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def running(command: Sequence[str], **how: Any) -> Iterator[subprocess.Popen[str]]:
    """A process, begun as ``subprocess.Popen`` takes it, in a session of its own; all of that is killed at the end."""
    process = subprocess.Popen(command, start_new_session=True, **how)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # its compile workers too, which are in its session
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def measured(job: Mapping[str, Any], limit: float, worker: Sequence[str] = WORKER) -> dict[str, Any]:
    """The row of a variant: its numbers with empty compile caches, and the compile seconds of a second process.

    ``worker JOB.json`` writes its numbers where the job's ``result`` says. status: "measured", "failed" or "timed out";
    error: what was said. Of eager, which has nothing to cache, there is no second process.
    """
    row: dict[str, Any] = {"variant": job["variant"], "kernels": job["kernels"]}
    with tempfile.TemporaryDirectory() as caches:
        cold = in_process(job, limit, Path(caches), worker)
        row |= cold
        if cold["status"] != "measured":
            return row
        row["compile_seconds_cold"], row["compile_seconds_warm"] = row.pop("compile_seconds"), None
        if job["variant"] != "eager":
            warm = in_process(job, limit, Path(caches), worker)
            row["compile_seconds_warm"] = warm.get("compile_seconds")
            row["first_step_seconds_warm"] = warm.get("first_step_seconds")
            if warm["status"] != "measured":
                row["warm_error"] = f"{warm['status']}: {warm['error']}"
    return row


def in_process(
    job: Mapping[str, Any],
    limit: float,
    caches: Path,
    worker: Sequence[str] = WORKER,
    *,
    watch: Callable[[], float] = lambda: 0.0,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What one process finds, or why it found nothing. caches: the folder of its compile caches.

    watch: called while it runs; how many of its seconds do not count to the limit. What it raises ends the process.
    environment: more variables of the process, over the others.
    """
    place, result = caches / "job.json", caches / "result.json"
    result.unlink(missing_ok=True)
    place.write_text(json.dumps({**job, "result": str(result)}), encoding="utf-8")
    variables = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        **(environment or {}),
    }
    begun = time.perf_counter()
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with running([*worker, str(place)], env=variables, text=True, errors="replace", **pipes) as process:
        said = _last_words(process, begun + limit, watch)
        if said is None:
            return {"status": "timed out", "error": f"stopped after {limit:g} s (time_limit)"}
    if process.returncode:
        return {"status": "failed", "error": _reason(said, process.returncode)}
    found = json.loads(result.read_text(encoding="utf-8"))
    return {"status": "measured", **found, "process_seconds": time.perf_counter() - begun}


def _last_words(process: subprocess.Popen[str], until: float, watch: Callable[[], float]) -> str | None:
    """What the process said on stderr when it ended; None if it had not by then, and by what the watch adds."""
    while (left := until + watch() - time.perf_counter()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=min(left, POLL))[1]
    return None


def _reason(said: str, status: int) -> str:
    """The exception's line, where there is a traceback; else the last that was said, and how the process ended."""
    lines = [line for line in said.splitlines() if line.strip()]
    if "Traceback (most recent call last):" in lines:
        last = len(lines) - 1 - lines[::-1].index("Traceback (most recent call last):")
        after = [line for line in lines[last + 1 :] if not line.startswith(" ")]
        if after:
            return after[0][:500]
    ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"{ended}: {lines[-1].strip()[:500]}" if lines else ended
