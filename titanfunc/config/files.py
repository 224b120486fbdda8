"""Where files can be written, and writing them so that an error names them and leaves what was there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from titanfunc.config._check import require
from titanfunc.config.failures import NotWritten


def require_folder(path: Path, field: str) -> None:
    """Raise ``ValueError`` unless ``path`` is a folder that can be written into, or can be made; makes nothing."""
    there = path.expanduser().absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    ok = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    require(ok, field, "a folder that can be made and written into", str(path))


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
