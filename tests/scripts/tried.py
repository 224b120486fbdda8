"""Tries command lines: ``python tests/scripts/tried.py < lines.json``, each in a process forked from this one.

A line is [name of a script, words...]. The scripts are imported once, so that a line costs what its ``main`` does, and
nothing else is shared; two are tried at once. Prints a list of {status, out, err, seconds (of the CPU), torch (whether
it was imported)}.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

AT_ONCE, LIMIT = 2, 5  # processes, and seconds of the CPU for each


def run(line: list[str], place: Path) -> None:
    """The forked process: the script's own ``main``, with streams and a folder of its own, and ended if it is long."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    gc.disable()  # what was imported before is not looked through again for every line
    work = place / "work"
    work.mkdir()
    os.chdir(work)
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(place / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, number)
    sys.argv = [f"{line[0]}.py", *line[1:]]
    status = 0
    try:
        importlib.import_module(f"scripts.{line[0]}").main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what Python itself would do with it
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    left = [path.name for path in work.iterdir()]
    (place / "told").write_text(json.dumps({"status": status, "torch": "torch" in sys.modules, "left": left}))
    os._exit(0)


def collect(place: Path, seconds: float) -> dict:
    """What a process told."""
    told = place / "told"
    found = json.loads(told.read_text()) if told.exists() else {"status": None, "torch": None, "left": None}
    return {**found, "seconds": seconds, **{name: (place / name).read_text() for name in ("out", "err")}}


def main() -> None:
    """Try all lines."""
    lines = json.load(sys.stdin)
    for name in {line[0] for line in lines}:
        importlib.import_module(f"scripts.{name}")
    results: dict[int, dict] = {}
    running: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder:

        def wait() -> None:
            child, _, used = os.wait4(-1, 0)
            number = running.pop(child)
            results[number] = collect(Path(folder) / str(number), used.ru_utime + used.ru_stime)

        for number, line in enumerate(lines):
            place = Path(folder) / str(number)
            place.mkdir()
            if len(running) == AT_ONCE:
                wait()
            child = os.fork()
            if not child:
                run(line, place)
            running[child] = number
        while running:
            wait()
    json.dump([results[number] for number in range(len(lines))], sys.stdout)


if __name__ == "__main__":
    main()
