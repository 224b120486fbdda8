"""Which commit is measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

import titanfunc

ROOT = Path(titanfunc.__file__).resolve().parents[1]
UNKNOWN = "unknown (no git history here)"


def commit(root: Path = ROOT) -> str:
    """The commit of the checkout that the package lies in, in short, wherever the process was started.

    UNKNOWN where ``root`` is no checkout (an installed package may lie inside one of another project), or has no git.
    """
    if not (root / ".git").exists():
        return UNKNOWN
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return UNKNOWN
    return done.stdout.strip() or UNKNOWN
