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

NOT_FINITE_FILE = "not_finite.json"
NAMED = 5
"""Documents that the line names; the file names all."""
Documents = Callable[[int], list[str]]


def end(error: Exception, run_dir: Path, steps: int, documents: Documents | None = None) -> int:
    """Print why a run of ``steps`` steps in its folder cannot go on, and return its exit status.

    documents: the names of those that the batch of a step was cut from; after Diverged they are told, and all of them
    written into ``not_finite.json``. Raises the error again if it is none that a line could tell (``failures.told``).
    """
    found = told(error)
    if found is None:
        raise error
    status, line = found
    if isinstance(error, Diverged):
        line += _not_finite(error.steps, run_dir, documents)
    print(f"error: {line}; {_saved(run_dir, steps)}", file=sys.stderr)
    return status


def _not_finite(steps: range, run_dir: Path, documents: Documents | None) -> str:
    """What is known of the batches that were skipped."""
    hint = " (a smaller optim.lr may do, if it is not the data)"
    if documents is None:
        return hint
    names = {step: list(documents(step)) for step in steps}
    rows = [{"step": step + 1, "documents": of_step} for step, of_step in names.items()]
    with contextlib.suppress(OSError):  # the line below says the most important of it
        write_text(run_dir / NOT_FINITE_FILE, json.dumps({"skipped": rows}, indent=1) + "\n")
    first = list(dict.fromkeys(names[steps[0]]))
    more = f" and {len(first) - NAMED} more" if len(first) > NAMED else ""
    return f"{hint}; the first of them read {', '.join(first[:NAMED])}{more}: all are in {run_dir / NOT_FINITE_FILE}"


def _saved(run_dir: Path, steps: int) -> str:
    there = checkpoints.checkpoints(run_dir)
    if not there:
        return "no checkpoint was saved"
    newest = int(there[-1].name.rpartition("_")[2])
    if newest >= steps:
        return f"all {steps} steps are done, and {there[-1]} is saved"
    return f"step {newest} is saved: go on from there with train.resume={run_dir}"
