from __future__ import annotations

import errno
import os

import pytest

from titanfunc.config.failures import NO_DATA, NO_MEMORY, NOT_WRITTEN, NotWritten, advising, told
from titanfunc.config.files import naming, write_text


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EEXIST", "EPIPE"])
def test_what_comes_of_writing(name):
    number = getattr(errno, name)
    assert told(OSError(number, os.strerror(number), "there")) == (NOT_WRITTEN, f"there: {os.strerror(number)}")


@pytest.mark.parametrize("name", ["ENOENT", "EIO", "ETIMEDOUT", "ECONNRESET", "ESTALE", "ENETUNREACH"])
def test_what_comes_of_reading_unless_it_is_known_better(name, tmp_path):
    number = getattr(errno, name)
    error = OSError(number, os.strerror(number))
    assert told(error) == (NO_DATA, os.strerror(number))
    with pytest.raises(NotWritten) as raised, naming(tmp_path):
        raise error
    assert told(raised.value) == (NOT_WRITTEN, f"{tmp_path}: {os.strerror(number)}")


def test_errors_without_a_number():
    assert told(TimeoutError("timed out")) == (NO_DATA, "timed out")
    assert told(ZeroDivisionError()) is None


def test_a_folder_in_the_files_place(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(NotWritten) as raised:
        write_text(tmp_path / "file", "text")
    assert told(raised.value)[0] == NOT_WRITTEN


def test_the_place_says_what_to_do_where_memory_is_too_small():
    with pytest.raises(MemoryError) as raised, advising("read less"), advising("read much less"):
        raise MemoryError("of all")
    assert told(raised.value, "train less") == (NO_MEMORY, "of all; read much less")
    assert told(MemoryError("of all"), "train less") == (NO_MEMORY, "of all; train less")
    with pytest.raises(ValueError, match="kind") as other, advising("read less"):
        raise ValueError("of another kind")
    assert not hasattr(other.value, "lower")
