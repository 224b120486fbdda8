"""How long a training run takes to its first step, with empty caches of compilers and then with filled ones.

    python benchmarks/start.py --out start.json -- model=mac_168m model.kernels=triton data.batch_size=16

What follows -- goes to scripts/train.py. Each row is a process of its own: ``seconds`` from its start until its first
step is done and its row of metrics written, ``first_step_seconds`` of that the first step alone, which compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from titanfunc.bench.common import Parser, header, write

TRAIN = Path(__file__).resolve().parent.parent / "scripts" / "train.py"
POLL = 0.02  # seconds
LAST_WORDS = 0.5  # seconds for what the run says of its first step
OWN = ("device", "compiled")  # what lines of a run begin with


def started(settings: list[str], caches: Path, folder: Path, limit: float) -> dict[str, Any]:
    """The numbers of one process, which is ended after its first step."""
    run, said = folder / "run", folder / "said"
    kept = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TITANFUNC_CACHE": "titanfunc"}
    environment = {**os.environ, **{name: str(caches / place) for name, place in kept.items()}}
    command = [sys.executable, str(TRAIN), *settings, f"train.run_dir={run}", "train.eval_every=0"]
    begun = time.perf_counter()
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            while not (row := first_row(run / "metrics.jsonl")):
                if process.poll() is not None or time.perf_counter() - begun > limit:
                    raise SystemExit(f"no step within {limit:g} s, or the run ended: {said.read_text()[-2000:]}")
                time.sleep(POLL)
            seconds = time.perf_counter() - begun
            time.sleep(LAST_WORDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # its compile workers too, which are in its session
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {
        "seconds": round(seconds, 2), "first_step_seconds": round(row["compile_seconds"], 2),
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
    lines = said.splitlines()
    own = {name: [line.partition(" ")[2].strip() for line in lines if line.startswith(name)] for name in OWN}
    warned = [line for line in lines if re.match(r"W\d{4} ", line)]
    return {**{name: found[0] if found else None for name, found in own.items()}, "warnings": warned}


def main() -> None:
    """Reads the arguments, starts a run with empty caches and ``--again`` runs with what it filled."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="for scripts/train.py, behind --")
    parser.add_argument("--again", type=int, default=2, help="runs with filled caches")
    parser.add_argument("--caches", type=Path, help="an empty or absent folder for the caches, which stays")
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds of a run")
    parser.add_argument("--commit", default="", help="written into the result where there is no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.again < 1:
        parser.error(f"--again: wanted at least 1, got {args.again}")
    if args.caches and args.caches.exists() and any(args.caches.iterdir()):
        parser.error(f"--caches: wanted an empty folder or none, got {args.caches}, which holds something")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    result = header(args)
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
