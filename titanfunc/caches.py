"""Where titanfunc keeps what it may lose: times of first steps, and what inductor and Python compiled."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import stat
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
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_made("inductor"))
    have_one_assembler()
    keep_bytecode()


def keep_bytecode() -> None:
    """Have Python keep in ``folder()/python`` what it compiles of modules, where it would not keep torch's.

    Containers often set $PYTHONDONTWRITEBYTECODE, or have their packages where a user cannot write. Every process then
    compiles the 3,000 modules of torch and what it needs anew, which takes as long again as to import them. Processes
    that this one starts share the folder, which nobody else may write into; each installation of torch has its own.
    ``python -B`` and a folder of one's own, $PYTHONPYCACHEPREFIX, stay as they are, and so does everything where
    torch's bytecode is there or will be. As everywhere, a module's bytecode is taken for the module's by path, size and
    time of change.
    """
    torch = importlib.util.find_spec("torch")
    if not torch or not torch.origin or sys.pycache_prefix:
        return
    asked = os.environ.get("PYTHONDONTWRITEBYTECODE") and not _says_b(sys.orig_argv[1:])
    by_choice = sys.dont_write_bytecode and not asked
    written = not sys.dont_write_bytecode and os.access(Path(torch.origin).parent, os.W_OK)
    if by_choice or written or Path(importlib.util.cache_from_source(torch.origin)).exists():
        return
    with contextlib.suppress(OSError):
        found = Path(torch.origin).stat()
        version = [torch.origin, found.st_ino, found.st_size, found.st_mtime_ns, sys.prefix, sys.version]
        place = _made("python", hashlib.sha256(repr(version).encode()).hexdigest()[:16]).absolute()
        if all(_own(each) for each in (place, place.parent, place.parent.parent)) and os.access(place, os.W_OK):
            os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(place)
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            sys.dont_write_bytecode = False


def _made(*names: str) -> Path:
    """The folder of these names in ``folder()``, one in another; those that are made are this user's alone, as what
    lies there is run."""
    place = folder()
    place.parent.mkdir(parents=True, exist_ok=True)
    for name in ("", *names):
        place /= name
        place.mkdir(mode=0o700, exist_ok=True)
    return place


def _own(place: Path) -> bool:
    """Whether nobody but this user can write into a folder: what lies there is run."""
    found = place.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _says_b(arguments: list[str]) -> bool:
    """Whether Python's own arguments, those before a program's, hold -B, alone or with other letters."""
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-") or argument.startswith("--"):
            return False
        flags, valued, value = re.findall("-([^cmWX]*)([cmWX]?)(.*)", argument, re.DOTALL)[0]
        if "B" in flags:
            return True
        if valued in ("c", "m"):
            return False
        if valued and not value:
            next(rest, None)
    return False


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
