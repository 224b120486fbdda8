"""Ids are read from their files, and what a file does not give is an error that names it."""

import errno
import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.data.tables import TEXTS, write_jsonl
from titanfunc import data
from titanfunc.config.data import DataConfig
from titanfunc.data import stored
from titanfunc.data.stored import StoredTokens
from titanfunc.data.tokens import MappedTokens, TokenArray
from titanfunc.data.windows import Windows
from titanfunc.train.feed import Feed, NoBatch

IDS = np.arange(1000, dtype=np.uint16)


@pytest.fixture
def tokens(tmp_path):
    (tmp_path / "ids").write_bytes(IDS.tobytes())
    return StoredTokens(tmp_path / "ids", IDS.dtype, len(IDS))


def test_ids_are_those_of_the_file(tokens):
    assert len(tokens) == 1000 and np.array_equal(np.asarray(tokens), IDS)
    assert tokens.read(990, 10) == IDS[990:].tobytes() and tokens.read(5, 0) == b""


def test_a_read_that_gives_less_is_gone_on_with(tokens, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, place: pread(handle, min(size, 7), place))
    assert np.array_equal(np.asarray(tokens), IDS)


def test_a_reader_gives_what_is_read(tokens, tmp_path, monkeypatch):
    read = tokens.reader(10)
    assert read(2 * 17) == IDS[17:27].tobytes()
    os.truncate(tokens.path, 50)
    assert len(read(2 * 17)) == 16
    monkeypatch.setattr(stored, "_most_open", lambda: 0)
    with pytest.raises(ValueError, match="wanted at least 54 bytes, got 50"):
        StoredTokens(tokens.path, IDS.dtype, 1000).reader(10)(2 * 17)
    del tokens
    assert len(read(2 * 17)) == 16, "it holds the file"
    gone = StoredTokens(tmp_path / "gone", IDS.dtype, 1000).reader(10)
    with pytest.raises(FileNotFoundError, match="gone"):
        gone(0)


@pytest.mark.parametrize("lost", ["cut", "fails"])
def test_rows_that_a_file_does_not_give_are_told(tmp_path, lost, monkeypatch):
    IDS.tofile(tmp_path / "ids")
    zero = np.zeros(1, dtype=np.int64)
    tokens = MappedTokens([StoredTokens(tmp_path / "ids", IDS.dtype, 1000)], zero, zero, zero, 1000)
    windows = Windows(TokenArray(tokens, np.array([1000])), 8, 4)
    before = [windows.batch(step) for step in range(9)]
    if lost == "cut":
        os.truncate(tmp_path / "ids", 900)
        error = pytest.raises(ValueError, match=r"ids: wanted at least [\d,]+ bytes, got 900; delete it")
    else:
        monkeypatch.setattr(os, "pread", fail)
        windows = Windows(TokenArray(tokens, np.array([1000])), 8, 4)
        error = pytest.raises(OSError, match=r"Input/output error: '.*ids'")
    with error:
        for step in range(9):
            assert torch.equal(windows.batch(step), before[step])


def fail(handle, size, place):
    raise OSError(errno.EIO, "Input/output error")


def test_a_disk_that_fails_is_told(tokens, monkeypatch):
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*ids'"):
        tokens.read(0, 1)
    tokens.path.unlink()
    with pytest.raises(FileNotFoundError, match="ids"):
        StoredTokens(tokens.path, IDS.dtype, 1).read(0, 1)


@pytest.mark.parametrize("most", [0, 2])
def test_files_beyond_the_most_that_stay_open_are_read_too(tmp_path, tokens, monkeypatch, most):
    gc.collect()  # files of tests before, which would be closed in the midst of this one
    before = stored._File.open
    monkeypatch.setattr(stored, "_most_open", lambda: before + most)
    each = [StoredTokens(tokens.path, IDS.dtype, len(IDS)) for _ in range(5)]
    assert all(one.read(i, 2) == IDS[i : i + 2].tobytes() for i in range(3) for one in each)
    assert stored._File.open == before + most
    del each
    assert stored._File.open == before


CUT = """
import os, sys
from pathlib import Path
from titanfunc import data
from titanfunc.config.data import DataConfig
settings = {"seq_len": 16, "batch_size": 4, "validation_fraction": 0.2}
source = data.open_source(DataConfig("files", sys.argv[1], cache_dir=sys.argv[2], **settings), 1)
source.batches(0)
(path,) = Path(sys.argv[2]).glob("tokens-*/shard-00000.tokens")
os.truncate(path, 100)
try:
    for step in range(50):
        source.batches(step)
except ValueError as error:
    print(error)
"""


def test_a_shard_that_is_cut_short_while_it_is_read_does_not_end_the_process(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    command = [sys.executable, "-c", CUT, str(tmp_path / "a.jsonl"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "shard-00000.tokens: wanted at least" in done.stdout and "bytes, got 100; delete it, and" in done.stdout


def test_a_run_is_told_of_it(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    settings = {"seq_len": 16, "batch_size": 4, "validation_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
    source = data.open_source(DataConfig("files", str(tmp_path / "a.jsonl"), **settings), 1)
    (path,) = (tmp_path / "cache").glob("tokens-*/shard-00000.tokens")
    os.truncate(path, 0)
    with (
        Feed(source.batches, 2, 9, torch.device("cpu")) as feed,
        pytest.raises(NoBatch, match=r"^the batch of step 3: .*shard-00000\.tokens: wanted at least [\d,]+ bytes, got"),
    ):
        feed.next()
