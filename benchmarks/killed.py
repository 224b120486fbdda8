"""Kills training again and again, each time goes on, and compares what comes of it with a run that nobody killed.

    python benchmarks/killed.py --kills 20 --out FILE.json model=mac_24gb data.batch_size=16 train.steps=200 \
        train.checkpoint_every=10 train.deterministic=true

What follows the options are settings of scripts/train.py. A kill is SIGKILL at a random moment (``--seed``): anywhere
in a process's life, after a few rows of metrics, or while a checkpoint is being written. Among them, two for three of
them, come SIGTERM and SIGINT, which ask a run to save and end: not before a process's first row, as there is no run to
stop before, and whatever it imports makes an error of its own of them. A run that is finished before all kills are done
is followed by another. FILE.json gets every kill and stop, and for every run whether its rows of metrics (but for what
is measured in seconds and bytes), its last checkpoint's tensors and its sample are those of the straight run, bit for
bit (for which a GPU needs train.deterministic). Exit status 1 if any differs. What happens is told on the way, on
standard error. ``--fork`` imports torch once and forks for every attempt, for a CPU alone. ``--forget`` deletes a
folder before each run begins, such as data.cache_dir, so that runs are killed while they make what lies in it too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titanfunc.bench import options
from titanfunc.bench.common import device_of, header, write
from titanfunc.compile_report.process import end_as_interrupted
from titanfunc.config import checkpoints
from titanfunc.config.runs import CURVES

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("tokens_per_second", "compile_seconds", "data_wait_seconds", "peak_memory_gib")
KINDS = ("anywhere", "running", "saving")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL)
"""In turn; there are five, so that each comes at each of the three kinds of moments."""
POLL = 0.0005


class Attempt:
    """A process that trains, forked or begun anew, killed where a ``with`` ends. Its output is appended to a file."""

    def __init__(self, settings: list[str], log: Path, fork: bool) -> None:
        self.begun = time.monotonic()
        self._status: int | None = None
        self.pid = _forked(settings, log) if fork else _begun(settings, log)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def ended(self) -> bool:
        """Whether it has ended by itself, or been killed."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    def wait(self) -> int:
        """Its exit status."""
        while not self.ended():
            time.sleep(POLL)
        assert self._status is not None
        return self._status

    def end(self, number: signal.Signals) -> bool:
        """Send it a signal and wait; False if it was over before, or ended as if none had come."""
        if self.ended():
            return False
        os.kill(self.pid, number)
        return self.wait() in (-number, 128 + number)


def _begun(settings: list[str], log: Path) -> int:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *settings]
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": path})
    process.returncode = 0  # it is waited for here, and by nobody else
    return process.pid


def _forked(settings: list[str], log: Path) -> int:
    stops = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    pid = os.fork()
    if not pid:
        for number in stops:  # until there is a run to stop: what reads its settings may make another error of them
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    if pid:
        return pid
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from scripts import train

        sys.argv = ["train.py", *settings]
        train.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
    raise AssertionError


def wait_until(
    attempt: Attempt, kind: str, run_dir: Path, draw: random.Random, life: float, number: signal.Signals
) -> None:
    """Until the moment for a signal has come, or the process has ended. life: seconds that one lives, unless killed."""
    before = _lines(run_dir)
    if kind == "anywhere":
        end = attempt.begun + draw.uniform(0, life)
        if number != signal.SIGKILL:
            _poll(attempt, 600, lambda: _lines(run_dir) > before)
        _poll(attempt, end - time.monotonic(), lambda: False)
        return
    wanted = draw.randint(1, 4)
    _poll(attempt, 600, lambda: _lines(run_dir) >= before + wanted)
    if kind == "saving":
        _poll(attempt, 600, lambda: any((run_dir / checkpoints.CHECKPOINTS).glob(".writing_*")))
        _poll(attempt, draw.choice((0, 0, 0.001, 0.002, 0.005)), lambda: False)
    else:
        _poll(attempt, draw.uniform(0, 0.1), lambda: False)


def _poll(attempt: Attempt, seconds: float, come: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not attempt.ended() and not come():
        time.sleep(POLL)


def _lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest_step(run_dir: Path) -> int:
    """The step of a run's newest checkpoint, or -1."""
    found = checkpoints.checkpoints(run_dir)
    return (checkpoints.step_of(found[-1]) or 0) if found else -1


def begin(args: argparse.Namespace, run_dir: Path) -> Attempt:
    """An attempt to finish a run: from its newest checkpoint, or from the start where it has none."""
    resumed = newest_step(run_dir) >= 0
    if not resumed:
        shutil.rmtree(run_dir, ignore_errors=True)
    where = f"train.resume={run_dir}" if resumed else f"train.run_dir={run_dir}"
    return Attempt([*args.settings, where], run_dir.with_suffix(".log"), args.fork)


def forget(args: argparse.Namespace) -> None:
    """Delete what a run has made outside its folder."""
    if args.forget:
        shutil.rmtree(args.forget, ignore_errors=True)


def killed(kills: list[dict[str, Any]]) -> int:
    """How many of them were by SIGKILL."""
    return sum(kill["signal"] == "SIGKILL" for kill in kills)


def _is_unfinished(run_dir: Path) -> bool:
    """Whether a run's newest checkpoint is in the midst of an interval of metrics."""
    found = checkpoints.checkpoints(run_dir)
    return bool(found) and checkpoints.SUMS in checkpoints.read_metadata(found[-1])


def kill_often(
    args: argparse.Namespace, folder: Path, steps: int, life: float
) -> tuple[list[dict[str, Any]], list[Path]]:
    """The kills and stops, and the runs that they befell, each of them finished in the end."""
    draw, run_dirs = random.Random(args.seed), [folder / "killed_0"]
    kills: list[dict[str, Any]] = []
    forget(args)
    while True:
        run_dir = run_dirs[-1]
        kind = KINDS[(KINDS.index(args.first) + len(kills)) % len(KINDS)]
        number, ended = SIGNALS[len(kills) % len(SIGNALS)], False
        with begin(args, run_dir) as attempt:
            if killed(kills) < args.kills:
                wait_until(attempt, kind, run_dir, draw, life, number)
                ended = attempt.end(number)
            if ended:
                left = list((run_dir / checkpoints.CHECKPOINTS).glob(".writing_*"))
                seconds = round(time.monotonic() - attempt.begun, 3)
                kill = {"run": run_dir.name, "signal": number.name, "kind": kind, "seconds": seconds}
                kill |= {"saving": bool(left), "unfinished": _is_unfinished(run_dir)}
                kills.append({**kill, "checkpoint": newest_step(run_dir), "rows": _lines(run_dir)})
                print(json.dumps(kills[-1]), file=sys.stderr, flush=True)
            status = attempt.wait()
        if status and not ended:
            raise SystemExit(f"{run_dir.with_suffix('.log')}: exit status {status}")
        if newest_step(run_dir) < steps or not (run_dir / CURVES).exists():  # the last file of all
            continue
        if killed(kills) >= args.kills:
            return kills, run_dirs
        run_dirs.append(folder / f"killed_{len(run_dirs)}")
        forget(args)


def differences(straight: Path, other: Path) -> list[str]:
    """What of a run is not, bit for bit, as of the straight one."""
    found = []
    rows, others = (_rows(path / "metrics.jsonl") for path in (straight, other))
    if [row["step"] for row in rows] != [row["step"] for row in others]:
        found.append(f"rows of the steps {[row['step'] for row in rows]} and {[row['step'] for row in others]}")
    found += [
        f"row of step {row['step']}: {row} and {their}"
        for row, their in zip(rows, others, strict=False)
        if row != their
    ]
    places, theirs = ({place.name: place for place in checkpoints.checkpoints(path)} for path in (straight, other))
    if max(places) != max(theirs):
        found.append(f"the last checkpoints, {max(places)} and {max(theirs)}")
    for name in sorted(places.keys() & theirs):  # one killed while it dropped old ones may have more of them
        checkpoints.check(theirs[name])
        if (places[name] / checkpoints.TENSORS).read_bytes() != (theirs[name] / checkpoints.TENSORS).read_bytes():
            found.append(f"the tensors of {name}")
    samples = [path / "sample.txt" for path in (straight, other)]
    if any(path.exists() for path in samples):
        missing = [str(path) for path in samples if not path.exists()]
        if missing:
            found.append(f"{missing[0]} is missing")
        elif samples[0].read_bytes() != samples[1].read_bytes():
            found.append("the sample")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def main() -> None:
    """Run it."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=options.count, default=20, help="by SIGKILL; stops come among them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", choices=KINDS, default=KINDS[0], help="the kind of the first kill")
    parser.add_argument("--fork", action="store_true")
    parser.add_argument("--within", type=options.seconds, help="seconds in which a kill falls (default: a run's)")
    parser.add_argument("--forget", type=Path, help="a folder that each run makes for itself")
    parser.add_argument("--commit", default="")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: a folder that is deleted)")
    parser.add_argument("--out", type=options.new_file)
    args, args.settings = parser.parse_known_args()
    named = [setting.removeprefix("train.device=") for setting in args.settings if setting.startswith("train.device=")]
    folder = args.folder or Path(tempfile.mkdtemp(prefix="killed_"))
    folder.mkdir(parents=True, exist_ok=True)
    if args.fork:
        import titanfunc.job  # torch, once for all
        import titanfunc.report  # noqa: F401 (matplotlib)
    end_as_interrupted()
    begun = time.monotonic()
    settings = [*args.settings, f"train.run_dir={folder / 'straight'}"]
    with Attempt(settings, folder / "straight.log", args.fork) as attempt:
        status = attempt.wait()
    if status:
        raise SystemExit(f"{(folder / 'straight.log').read_text()}\nexit status {status}")
    life, steps = time.monotonic() - begun, newest_step(folder / "straight")
    print(f"the straight run took {life:.0f} s", file=sys.stderr, flush=True)
    kills, run_dirs = kill_often(args, folder, steps, args.within or life)
    runs = {run_dir.name: differences(folder / "straight", run_dir) for run_dir in run_dirs}
    seconds = {"straight_seconds": round(life, 1), "seconds": round(time.monotonic() - begun, 1)}
    if not args.folder:
        shutil.rmtree(folder)
    told = {
        "kills": killed(kills),
        "stops": len(kills) - killed(kills),
        "while_saving": sum(kill["saving"] for kill in kills),
        "runs": len(runs),
    }
    same = not any(runs.values())
    print(json.dumps({**told, **seconds, "same": same, "differences": runs}, indent=1))
    if args.out:
        args.device = device_of(named[-1] if named else "auto")
        write({**header(args), **told, **seconds, "same": same, "differences": runs, "rows": kills}, args.out)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # or SIGTERM
        sys.exit(130)
