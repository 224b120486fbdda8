"""Where titanfunc keeps what it may lose: times of first steps, and what inductor compiled."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """``$TITANFUNC_CACHE``, or else a folder in the user's cache (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if "TITANFUNC_CACHE" in os.environ:
        return Path(os.environ["TITANFUNC_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "titanfunc"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "titanfunc"


def keep_programs() -> None:
    """Have inductor keep what it compiles in ``folder()/inductor``, whence later runs take it.

    torch's own choice is the folder for temporary files. ``$TORCHINDUCTOR_CACHE_DIR``, if it is set, stays; a folder
    that cannot be made is done without.
    """
    place = folder() / "inductor"
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
