"""Paths of the settings, where files can be written, and writing them so that an error names them and leaves what was
there."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titanfunc.config._check import require
from titanfunc.config.failures import NotWritten

LONGEST_NAME, LONGEST_PATH = 255, 3072
"""Bytes of a path's longest name, and of all of it: what systems take, less room for the names below it."""


def expanded(text: str) -> Path:
    """A path of the settings, in which ~ at the beginning is the user's folder."""
    return Path(os.path.expanduser(text))


def require_path(value: Any, field: str) -> None:
    """Raise ``ValueError`` unless a value is text that can be a path, or empty; nothing is looked at."""
    require(isinstance(value, str), field, "a path, as text", value)
    try:
        whole = os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        whole = b"\0"
    fits = len(whole) <= LONGEST_PATH and max(map(len, whole.split(b"/"))) <= LONGEST_NAME and b"\0" not in whole
    wanted = f"a path of at most {LONGEST_PATH} bytes and of names of at most {LONGEST_NAME}"
    require(fits, field, wanted, value if len(value) <= 60 else f"{value[:60]}...")


def require_folder(path: Path, field: str) -> None:
    """Raise ``ValueError`` unless ``path`` is a folder that can be written into, or can be made. A folder is made there
    and removed at once: what a system says of rights is not all that it refuses. A full disk passes."""
    try:
        _try_folder(Path(os.path.abspath(os.path.expanduser(path))))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # which is no mistake, and told where files are written
            return
        why = error.strerror or type(error).__name__
        raise ValueError(
            f"{field}: wanted a folder that can be made and written into, got {str(path)!r} ({why})"
        ) from None


def _try_folder(path: Path) -> None:
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    for name in path.relative_to(there).parts:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(there / name)  # a name that is too long is refused here
    os.rmdir(tempfile.mkdtemp(prefix=".titanfunc-", dir=there))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that comes of writing ``path`` says so, as NotWritten: the system tells the name only where a file is
    opened."""
    try:
        yield
    except OSError as error:
        raise NotWritten(error.errno, error.strerror or str(error), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a file aside and put it in its place: what stood there stays until all of the new one is on the disk.

    Raises OSError, which names the file, where it cannot be written; nothing is left of it then.
    """
    aside = path.with_name(path.name + ".writing")
    with naming(path):
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
