"""Files on the hub, read over a network that may fail for a while."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try."""
_LASTING = (
    FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError, LookupError, AttributeError,
    ImportError,
)  # fmt: skip
_SOON = (408, 425, 429)
_BUFFER = 1 << 20
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def open_remote(address: str) -> IO[bytes]:
    """The file of an address, such as hf://..., to be read and sought in; a read that fails is tried again.

    Raises OSError, here and where it is read, for whatever the libraries below raise at last.
    """
    return io.BufferedReader(_Remote(address), _BUFFER)


def lasting(error: BaseException) -> bool:
    """Whether an error would come again: not one of the network, or of a server that is overloaded."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status < 500 and status not in _SOON
    return isinstance(error, _LASTING)


class _Remote(io.RawIOBase):
    """A file that is opened anew, and gone on with where it was, after an error that may pass."""

    def __init__(self, address: str) -> None:
        self._address, self._place = address, 0
        self._file: Any = None
        self._try(lambda file: None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += self._try(lambda file: int(file.seek(0, io.SEEK_END)))
        self._place = offset + (self._place if whence == io.SEEK_CUR else 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        def read(file: IO[bytes]) -> bytes:
            file.seek(self._place)
            return file.read(len(buffer))

        data = self._try(read)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
        super().close()

    def _try(self, do: Callable[[Any], _T]) -> _T:
        import fsspec

        for pause in (*PAUSES, None):
            try:
                if self._file is None:
                    self._file = fsspec.open(self._address, "rb").open()
                return do(self._file)
            except Exception as error:  # of many libraries below, not all of them OSErrors
                self._file = None
                why = " ".join(str(error).split())[:200]
                line = f"{type(error).__name__}: {why}" if why else type(error).__name__
                if pause is None or lasting(error):
                    raise OSError(line) from error
                _logger.warning("%s: %s; trying again in %.0f s", self._address, line, pause)
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")
