"""What a network does to a file that is read over it."""

import gzip
import json

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from tests.data.tables import TEXTS, write_parquet
from titanfunc.data import parts, remote
from titanfunc.data.parts import Unreadable
from titanfunc.data.remote import lasting, open_remote


class ReadTimeout(Exception):
    """As of a client of HTTP: no OSError."""


class Refused(Exception):
    def __init__(self, status):
        super().__init__(f"Client error '{status}'\nFor more information ...")
        self.response = type("Response", (), {"status_code": status})


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were waited, which none are."""
    waited = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    return waited


@pytest.fixture
def fail(monkeypatch):
    """``fail(error, first, count)``: reads from number ``first`` on raise the error, ``count`` of them."""
    read, reads = MemoryFile.read, [0]

    def begin(error, first, count):
        def failing(file, *args):
            reads[0] += 1
            if first < reads[0] <= first + count:
                raise error
            return read(file, *args)

        monkeypatch.setattr(MemoryFile, "read", failing)

    return begin


@pytest.fixture
def addresses(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_BUFFER", 256)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    write_parquet(tmp_path / "a.parquet", TEXTS)
    contents = {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "parquet": (tmp_path / "a.parquet").read_bytes()}
    for ending, content in contents.items():
        with fsspec.open(f"memory://remote/a.{ending}", "wb") as file:
            file.write(content)
    return {ending: f"memory://remote/a.{ending}" for ending in contents}


def read_all(address):
    return [text for part in parts.cut([address], "", "text") for _, text in parts.read(part)]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("error", [ReadTimeout("The read operation timed out"), Refused(503), ConnectionError()])
def test_a_read_that_fails_for_a_while_is_tried_again_and_nothing_is_lost(addresses, pauses, fail, ending, error):
    fail(error, 2, 3)
    assert read_all(addresses[ending]) == TEXTS
    assert pauses == [1, 2, 4]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_a_network_that_stays_away_is_told_in_one_line(addresses, pauses, fail, ending):
    fail(ReadTimeout("The read\noperation timed out"), 1, 10**9)
    with pytest.raises(Unreadable, match=r"memory://remote/a\..*ReadTimeout: The read operation timed out") as error:
        read_all(addresses[ending])
    assert "\n" not in str(error.value)
    assert pauses == [1, 2, 4, 8, 16]


def test_what_would_come_again_is_not_tried_again(addresses, pauses, fail):
    fail(Refused(403), 0, 10**9)
    with pytest.raises(Unreadable, match=r"a\.jsonl: cannot be read \(Refused: Client error '403' For more"):
        read_all(addresses["jsonl"])
    with pytest.raises(Unreadable, match=r"b\.parquet: cannot be read \(FileNotFoundError"):
        read_all("memory://remote/b.parquet")
    assert pauses == []
    assert lasting(Refused(404)) and not lasting(Refused(429)) and not lasting(ReadTimeout())


def test_a_remote_file_is_sought_in(addresses):
    whole = fsspec.open(addresses["jsonl"], "rb").open().read()
    with open_remote(addresses["jsonl"]) as file:
        assert file.seek(-10, 2) == len(whole) - 10 and file.read() == whole[-10:]
        assert file.seek(5) == 5 and file.read(3) == whole[5:8] and file.seek(2, 1) == 10
        assert file.readline() == whole[10 : whole.index(b"\n") + 1]
