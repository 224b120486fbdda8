"""Where titanfunc keeps what it may lose: times of first steps, and what inductor and Python compiled."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
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
    that cannot be made is done without. What Triton keeps is known by one assembler, torch's, in every process.
    """
    place = folder() / "inductor"
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
    have_one_assembler()
    keep_bytecode()


def keep_bytecode() -> None:
    """Have Python keep in ``folder()/python`` what it compiles of modules, where it would not keep torch's.

    Containers often set $PYTHONDONTWRITEBYTECODE, or have their packages where a user cannot write. Every process then
    compiles the 3,000 modules of torch and what it needs anew, which takes as long again as to import them. Processes
    that this one starts share the folder. ``python -B`` and a folder of one's own, $PYTHONPYCACHEPREFIX, stay as they
    are, and so does everything where torch's bytecode is there or will be.
    """
    torch = importlib.util.find_spec("torch")
    if not torch or not torch.origin or sys.pycache_prefix:
        return
    by_choice = sys.flags.dont_write_bytecode and "PYTHONDONTWRITEBYTECODE" not in os.environ
    written = not sys.dont_write_bytecode and os.access(Path(torch.origin).parent, os.W_OK)
    if by_choice or written or Path(importlib.util.cache_from_source(torch.origin)).exists():
        return
    place = folder() / "python"
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(place.absolute())
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False


def have_one_assembler() -> None:
    """Have Triton assemble by torch's ptxas from the start; ``$TRITON_PTXAS_PATH``, if it is set, stays.

    With torch 2.11 inductor's workers do, and a process does once it has compiled a kernel of inductor's by itself.
    Triton knows what it keeps by the version that a process saw first: where that was now its own ptxas's and now
    torch's, a run that took its programs from the cache did not find there what the run that had filled it kept.
    """
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin:
        ptxas = Path(torch.origin).parent / "bin" / "ptxas"
        if ptxas.is_file() and os.access(ptxas, os.X_OK):
            os.environ.setdefault("TRITON_PTXAS_PATH", str(ptxas))
