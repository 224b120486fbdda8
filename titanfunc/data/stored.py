"""Ids in a file, read as they are asked for.

They are read and not mapped: where a mapped file is cut short or its disk fails, the system ends the process.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from titanfunc.config.failures import Damaged
from titanfunc.data.tokenizers import IntArray

OPEN_FILES = 4096
"""Files that are kept open, at most; the others are opened for each read."""


class StoredTokens:
    """Ids [N] that lie raw in a file; any number of threads and forked processes may read it."""

    def __init__(self, path: Path, dtype: np.dtype[Any], size: int) -> None:
        self.path, self.dtype, self._size, self._width = path, dtype, size, dtype.itemsize
        self._file: _File | None = None

    def __len__(self) -> int:
        return self._size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> IntArray:
        return np.frombuffer(self.read(0, self._size), dtype=self.dtype).astype(dtype or self.dtype)

    def read(self, first: int, count: int) -> bytes:
        """The bytes of ``count`` ids from ``first`` on.

        Raises, naming the file, OSError for one that is gone or a disk that fails, ValueError for one that ends before.
        """
        place, size = first * self._width, count * self._width
        try:
            file = self._open() if self._file is None else self._file
            data = os.pread(file, size, place)
            return data if len(data) == size else self._read_on(file, data, place, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def reader(self, count: int) -> Callable[[int], bytes]:
        """What reads ``count`` ids from a place in bytes on, in as little time as there is to it.

        It may give fewer, or raise OSError without the file's name: ``read`` then tells what is wrong.
        """
        with contextlib.suppress(OSError):
            if self._file is None:
                self._open()
        if self._file is None:  # it cannot be opened, or does not stay so
            return lambda place: self.read(place // self._width, count)
        return functools.partial(os.pread, self._file, count * self._width)

    def _read_on(self, file: _File, data: bytes, place: int, size: int) -> bytes:
        """The rest after what a first read gave, which is 2 GiB at most."""
        while len(data) < size:
            more = os.pread(file, size - len(data), place + len(data))
            if not more:
                there = os.fstat(file).st_size
                raise damaged(self.path, f"wanted at least {place + size:,} bytes, got {there:,}")
            data += more
        return data

    def _open(self) -> _File:
        file = _File(self.path)
        if _File.open <= _most_open():
            self._file = file
        return file


def damaged(path: Path, what: str) -> Damaged:
    """The error for a file of a cache that is not as it was written."""
    return Damaged(f"{path}: {what}; delete it, and the next run makes it anew and keeps the others")


class _File(int):
    """The handle of a file, which is closed when nobody holds it."""

    open = 0
    """How many there are, about."""

    def __new__(cls, path: Path) -> _File:
        made = super().__new__(cls, os.open(path, os.O_RDONLY))
        _File.open += 1
        return made

    def __del__(self) -> None:
        os.close(self)
        _File.open -= 1


@functools.cache
def _most_open() -> int:
    """Half of the files that this process may open are left to others."""
    import resource

    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OPEN_FILES if allowed == resource.RLIM_INFINITY else min(OPEN_FILES, allowed // 2)
