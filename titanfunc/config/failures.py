"""What ends a run though its settings are right: told in one line, with an exit status of its own. No torch."""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from collections.abc import Iterator

UNEXPECTED, MISTAKE, NOT_FINITE, NO_DATA, NOT_WRITTEN, NO_MEMORY = 1, 2, 3, 4, 5, 6
"""Exit statuses: an error with its traceback; a mistake of the settings; losses or gradients that are not finite; a
batch that cannot be read; a file that cannot be written, as on a full disk; too little memory. A signal's is 128 and
its number."""

LOWER = "lower data.batch_size, set model.remat=layer, or split the batch with a greater train.accumulate"
"""What to do where a training run needs more memory than there is."""


LOWER_STATE = "weights and optimizer do not fit: lower model.dim, model.ff or model.layers"
LOWER_TEXTS = "keep the tokens on the disk by data.cache_dir, or cut the longest documents of data.path"
"""The same, where the first state is drawn, and where texts are read and tokenized."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of the system that come of writing alone."""
_UNWRITTEN = (*FULL, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EPIPE)
"""Those that can come of reading too, but do so where data are read, which is told as NoData."""


class NotWritten(OSError):
    """A file could not be written."""


class NoData(RuntimeError):
    """The data cannot be read: a file is gone or damaged, or they are exhausted."""

    status = NO_DATA


class Damaged(ValueError):
    """A file of the data is not what its name says, or not what was written; the line names it."""

    status = NO_DATA


class Killed(RuntimeError):
    """A process that this one began was killed, as the system does where memory is too small."""

    status = NO_MEMORY


def told(error: BaseException, lower: str = LOWER) -> tuple[int, str] | None:
    """(exit status, one line) for an end that has a reason outside of the program; None for any other error.

    lower: what to do where memory is too small, unless ``advising`` knows better.
    """
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status, _line(error)
    if out_of_memory(error):
        return NO_MEMORY, f"{_sentence(error)}; {getattr(error, 'lower', lower)}"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename is not None else ""
        written = isinstance(error, NotWritten) or error.errno in _UNWRITTEN
        return NOT_WRITTEN if written else NO_DATA, f"{place}{error.strerror or _line(error)}"
    return None


@contextlib.contextmanager
def advising(lower: str) -> Iterator[None]:
    """What ``told`` says to do where memory is too small for what is done in here."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error) and not hasattr(error, "lower"):
            error.lower = lower  # type: ignore[attr-defined]
        raise


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """What goes wrong with texts and tokens that are read in here: an error of the system is told as NoData, unless it
    comes of writing their cache, and memory that is too small with what to do about that."""
    try:
        with advising(LOWER_TEXTS):
            yield
    except OSError as error:
        if isinstance(error, NotWritten) or error.errno in FULL:
            raise
        raise NoData(_line(error)) from error


def tell(error: BaseException, lower: str = LOWER) -> int:
    """Print ``told``'s line on stderr, or the traceback of an error that nobody expected; returns the exit status."""
    found = told(error, lower)
    if found is None:
        traceback.print_exception(error)
        return UNEXPECTED
    print(f"error: {found[1]}", file=sys.stderr)
    return found[0]


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, is that memory was too small: the machine's or a device's."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _sentence(error: BaseException) -> str:
    """How much was wanted, which torch says in the first two sentences of many."""
    sentences = _line(error).split(". ")
    return ". ".join(sentences[:2]).rstrip(".") if out_of_memory(error) else _line(error)
