"""How a run that cannot go on says why, in one line, and where it can be taken up again."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from titanfunc.config import checkpoints
from titanfunc.config.failures import told
from titanfunc.config.files import write_text
from titanfunc.train.loop import Diverged
from titanfunc.train.saver import OLDER, SaveFailed

NOT_FINITE_FILE = "not_finite.json"
NAMED = 5
"""Documents that the line names; the file names all."""
Documents = Callable[[int], list[str]]


def end(error: Exception, run_dir: Path, steps: int, documents: Documents | None = None) -> int:
    """Print why a run of ``steps`` steps in its folder cannot go on, and return its exit status.

    documents: the names of those that the batch of a step was cut from, or none where they are not known; after
    Diverged they end the line, and all of them are written into ``not_finite.json``. Raises the error again if it is
    none that a line could tell (``failures.told``).
    """
    found = told(error)
    if found is None:
        raise error
    status, line = found
    if isinstance(error, SaveFailed):
        line = line.removesuffix(OLDER)  # the rest of the line says which is there
    if isinstance(error, Diverged):
        line += " (a smaller optim.lr may do, if it is not the data)"
    print(f"error: {line}; {_saved(run_dir, steps)}", end="", file=sys.stderr, flush=True)  # to name them may take long
    try:
        if isinstance(error, Diverged) and documents is not None:
            print(_read_by(error.steps, run_dir, documents), end="", file=sys.stderr)
    finally:
        print(file=sys.stderr)
    return status


def _read_by(steps: range, run_dir: Path, documents: Documents) -> str:
    """What is known of the batches that were skipped."""
    try:
        names = {step: list(dict.fromkeys(documents(step))) for step in steps}
    except Exception as error:  # whatever reading them raises: the run has ended for another reason
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"; the documents of these steps cannot be named ({reason})"
    known = [step for step in steps if names[step]]
    if not known:
        return ""
    first = names[known[0]]
    more = f" and {len(first) - NAMED} more" if len(first) > NAMED else ""
    line = f"; step {known[0] + 1}, the first of them, read {', '.join(first[:NAMED])}{more}"
    rows = [{"step": step + 1, "documents": of_step} for step, of_step in names.items()]
    with contextlib.suppress(OSError):  # the line says the most important of it
        write_text(run_dir / NOT_FINITE_FILE, json.dumps({"skipped": rows}, indent=1) + "\n")
        return f"{line}: all are in {run_dir / NOT_FINITE_FILE}"
    return line


def _saved(run_dir: Path, steps: int) -> str:
    there = checkpoints.checkpoints(run_dir)
    if not there:
        return "no checkpoint was saved"
    newest = int(there[-1].name.rpartition("_")[2])
    if newest >= steps:
        return f"all {steps} steps are done, and {there[-1]} is saved"
    return f"step {newest} is saved: go on from there with train.resume={run_dir}"
