"""How long a training run takes to its first step, with empty caches of compilers and then with filled ones.

    python benchmarks/start.py --out start.json -- model=mac_168m model.kernels=triton data.batch_size=16

What follows -- goes to scripts/train.py. Each row is a process of its own: ``seconds`` from its start until its first
step is done and its row of metrics written, ``ready_seconds`` of that until it says on what it runs (what it needs is
imported, and its state is there), ``first_step_seconds`` the first step alone, which compiles.
``compiled`` is the run's own line on that, with how many programs inductor's cache held. A run that takes no step ends
this script with status 1; the rows before it are in the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from titanfunc.bench import options
from titanfunc.bench.common import device_of, header, write
from titanfunc.compile_report.process import end_as_interrupted, running

TRAIN = Path(__file__).resolve().parent.parent / "scripts" / "train.py"
POLL = 0.02  # seconds
LAST_WORDS = 2.0  # seconds at most for what the run says of its first step after the row is written
DEVICE, COMPILED = "device", "compiled"  # what its lines begin with: before the first step, and after it


def started(settings: list[str], caches: Path, folder: Path, limit: float) -> dict[str, Any]:
    """The numbers of one process, which is ended after its first step."""
    run, said = folder / "run", folder / "said"
    kept = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TITANFUNC_CACHE": "titanfunc"}
    environment = {**os.environ, **{name: str(caches / place) for name, place in kept.items()}}
    command = [sys.executable, str(TRAIN), *settings, f"train.run_dir={run}", "train.eval_every=0"]
    begun = time.perf_counter()
    with said.open("w") as log, running(command, stdout=log, stderr=log, env=environment) as process:
        ready: float | None = None  # when it tells its device: it has imported what it needs, and begins to compile
        while not (row := first_row(run / "metrics.jsonl")):
            if ready is None and lines(said.read_text(), DEVICE):
                ready = time.perf_counter() - begun
            if process.poll() is not None or time.perf_counter() - begun > limit:
                raise SystemExit(f"no step within {limit:g} s, or the run ended: {said.read_text()[-2000:]}")
            time.sleep(POLL)
        seconds = time.perf_counter() - begun
        while not lines(said.read_text(), COMPILED) and time.perf_counter() - begun < seconds + LAST_WORDS:
            time.sleep(POLL)
    return {
        "seconds": round(seconds, 2), "ready_seconds": round(ready or seconds, 2),
        "first_step_seconds": round(row["compile_seconds"], 2),
        "loss": row["loss"], **told(said.read_text()),
    }  # fmt: skip


def first_row(metrics: Path) -> dict[str, Any] | None:
    """The first whole row of a run's metrics, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        line, end, _ = metrics.read_text().partition("\n")
        if end:
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def told(said: str) -> dict[str, Any]:
    """The run's own lines on its device and on what it compiled, and what the compiler warned of."""
    own = {name: "; ".join(lines(said, name)) or None for name in (DEVICE, COMPILED)}
    return {**own, "warnings": [line for line in said.splitlines() if re.match(r"W\d{4} ", line)]}


def lines(said: str, name: str) -> list[str]:
    """What whole lines say that begin with a word."""
    whole = [line for line in said.splitlines(keepends=True) if line.endswith("\n")]
    return [line.partition(" ")[2].strip() for line in whole if line.startswith(f"{name} ")]


def main() -> None:
    """Reads the arguments, starts a run with empty caches and ``--again`` runs with what it filled."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="for scripts/train.py, behind --")
    parser.add_argument("--again", type=options.count, default=2, help="runs with filled caches")
    parser.add_argument("--caches", type=options.folder, help="an empty or absent folder for the caches, which stays")
    parser.add_argument("--time-limit", type=options.seconds, default=900.0, help="seconds of a run")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=options.new_file, required=True)
    args = parser.parse_args()
    if args.caches and args.caches.exists() and any(args.caches.iterdir()):
        parser.error(f"--caches: wanted an empty folder or none, got {args.caches}, which holds something")
    try:
        measure(args)
    except KeyboardInterrupt:
        print("interrupted: the rows that were measured are in the result", file=sys.stderr)
        sys.exit(130)


def measure(args: argparse.Namespace) -> None:
    """Every row, the result written after each."""
    end_as_interrupted()
    args.device = device_of("auto")
    result = header(args)
    result["PYTHONDONTWRITEBYTECODE"] = os.environ.get("PYTHONDONTWRITEBYTECODE")
    with tempfile.TemporaryDirectory() as folder:
        caches = (args.caches or Path(folder) / "caches").resolve()
        for number in range(1 + args.again):
            own = Path(folder) / str(number)
            own.mkdir()
            row = {"caches": "filled" if number else "empty", **started(args.settings, caches, own, args.time_limit)}
            result["rows"].append(row)
            write(result, args.out)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
