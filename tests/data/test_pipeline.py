"""The whole way from a configuration to both splits."""

import contextlib
import dataclasses
import gzip
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
import torch

from tests.data.tables import write_jsonl, write_parquet
from titanfunc import data
from titanfunc.config.data import DataConfig
from titanfunc.data import parts, pipeline
from titanfunc.data.tokenizers import train_bpe


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"document {i}: " + "é" * i)
    return DataConfig(corpus="text_folder", path=str(folder), validation_fraction=0.2)


def texts(split, tokenizer):
    pieces = np.split(np.asarray(split.tokens), split.ends[:-1])
    assert all(piece[-1] == tokenizer.separator for piece in pieces)
    return [tokenizer.decode(piece[:-1]) for piece in pieces]


def equal(one, two):
    return all(
        np.array_equal(np.asarray(mine.tokens), np.asarray(theirs.tokens)) and np.array_equal(mine.ends, theirs.ends)
        for mine, theirs in ((getattr(one, split), getattr(two, split)) for split in ("train", "validation"))
    )


def test_every_document_is_in_one_split_whole(config):
    corpus = data.load(config)
    train = texts(corpus.train, corpus.tokenizer)
    validation = texts(corpus.validation, corpus.tokenizer)
    expected = data.load_documents(config)["text"][:]
    assert sorted(train + validation) == sorted(expected)
    assert 0.1 < sum(map(len, validation)) / sum(map(len, expected)) < 0.3
    assert equal(corpus, data.load(config))
    assert not equal(corpus, data.load(dataclasses.replace(config, seed=1)))


def test_bytes_per_token_counts_separators_as_tokens_without_text(config):
    corpus = data.load(config)
    held_out = texts(corpus.validation, corpus.tokenizer)
    size = sum(len(text.encode()) for text in held_out)
    assert corpus.bytes_per_token == size / (size + len(held_out))


def test_sotu():
    corpus = data.load(DataConfig())
    assert len(corpus.train.ends) + len(corpus.validation.ends) == 249
    sizes = [len(corpus.train.tokens), len(corpus.validation.tokens)]
    assert sum(sizes) > 11_000_000
    assert sizes[1] / sum(sizes) == pytest.approx(0.1, abs=0.005)
    assert corpus.train.tokens.dtype == np.uint8
    assert data.Windows(corpus.train, 256, 8).batch(0).shape == (8, 257)


def test_the_cache_changes_nothing(config, tmp_path):
    cached = dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))
    for seed in range(3):
        plain = data.load(dataclasses.replace(config, seed=seed))
        kept = data.load(dataclasses.replace(cached, seed=seed))
        assert equal(kept, plain)
        assert kept.bytes_per_token == plain.bytes_per_token
        for split in ("train", "validation"):
            mine, theirs = getattr(kept, split), getattr(plain, split)
            assert [mine.name(i) for i in range(len(mine.ends))] == [theirs.name(i) for i in range(len(theirs.ends))]
        assert plain.train.name(0) in ("00.txt", "01.txt", "02.txt")
        batches = [data.Windows(each.train, 5, 4).batch(7) for each in (kept, plain)]
        assert torch.equal(*batches)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_corpus_of_many_parts_in_memory(config, tmp_path, monkeypatch):
    one = data.load(config)
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    told = []

    @contextlib.contextmanager
    def record(wanted):
        assert len(wanted) > 5 and all(part.files for part in wanted)
        yield lambda number, tokens: told.append((number, tokens))

    monkeypatch.setattr(pipeline, "progress", record)
    many = data.load(config)
    assert equal(one, many) and one.train.name(3) == many.train.name(3)
    assert isinstance(many.train.tokens, np.ndarray) and many.bytes_per_token == one.bytes_per_token
    assert [number for number, _ in told] == list(range(len(told))) and len(told) > 5
    assert sum(tokens for _, tokens in told) == len(one.train.tokens) + len(one.validation.tokens)


def test_bpe_is_trained_once_and_kept(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, tokenizer="bpe", bpe_size=265, cache_dir=str(tmp_path / "cache"))
    calls = []
    monkeypatch.setattr(pipeline, "train_bpe", lambda *a: calls.append(a) or train_bpe(*a))
    first = data.load(config)
    assert sorted(texts(first.train, first.tokenizer) + texts(first.validation, first.tokenizer)) == sorted(
        data.load_documents(config)["text"][:]
    )
    assert first.bytes_per_token > 1.2 and first.tokenizer.vocab_size == 265
    assert equal(data.load(config), first) and len(calls) == 1
    assert data.load(dataclasses.replace(config, bpe_size=260)).tokenizer.vocab_size == 260 and len(calls) == 2
    (tmp_path / "texts" / "00.txt").write_text("another text")
    edited = data.load(config)
    assert "another text" in texts(edited.train, first.tokenizer) and len(calls) == 2
    assert edited.tokenizer.fingerprint == first.tokenizer.fingerprint  # a model goes on with the ids that it learned
    for path in (tmp_path / "cache").glob("bpe-265-*.json"):
        path.write_text("{}")
    with pytest.raises(ValueError, match=r"^data.tokenizer: .*bpe-265-.*\.json cannot be read .*; delete it$"):
        data.load(config)


def test_two_corpora_of_one_relative_path_have_a_tokenizer_each(tmp_path, monkeypatch):
    found = []
    for name, word in (("one", "alpha "), ("two", "omega ")):
        folder = tmp_path / name / "texts"
        folder.mkdir(parents=True)
        for i in range(10):
            (folder / f"{i}.txt").write_text(f"{i} {word * 5}")
        monkeypatch.chdir(tmp_path / name)
        settings = {"tokenizer": "bpe", "bpe_size": 260, "cache_dir": str(tmp_path / "cache"), "seq_len": 8}
        config = DataConfig("text_folder", "texts", batch_size=1, **settings)
        found.append(data.load(config))
        absolute = data.load(dataclasses.replace(config, path=str(folder)))
        assert absolute.tokenizer_file == found[-1].tokenizer_file
        assert str(found[-1].tokenizer_file) in data.open_source(config, 1).summary
    assert found[0].tokenizer.fingerprint != found[1].tokenizer.fingerprint


def test_a_single_document_is_refused(tmp_path):
    (tmp_path / "only.txt").write_text("text")
    (tmp_path / "blank.txt").write_text("\n")
    message = rf"^data\.path: wanted at least 2 documents .* in {tmp_path}, got 1; cut it into several files$"
    with pytest.raises(ValueError, match=message):
        data.load(DataConfig(corpus="text_folder", path=str(tmp_path)))


def test_a_single_row_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["text", " "])
    message = r"^data\.path: wanted at least 2 .*/a\.jsonl, got 1; a row is a document: cut it into several$"
    with pytest.raises(ValueError, match=message):
        data.load(DataConfig(corpus="files", path=str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(("tokenizer", "kept"), [("bytes", False), ("bytes", True), ("bpe", True)])
@pytest.mark.parametrize("name", ["blank.txt", "empty.jsonl", "empty.jsonl.gz", "empty.parquet"])
def test_no_text_at_all_is_refused(tmp_path, name, kept, tokenizer):
    path = tmp_path / "texts" / name
    path.parent.mkdir()
    if name.endswith(".parquet"):
        write_parquet(path, pyarrow.array([], type=pyarrow.string()))
    else:
        path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"\n" if name.endswith(".txt") else b"")
    corpus, path = ("text_folder", path.parent) if name.endswith(".txt") else ("files", path)
    cache = {"cache_dir": str(tmp_path / "cache")} if kept else {}
    with pytest.raises(ValueError, match=rf"^data\.path: wanted .* in {path}, got none: there is no text in it$"):
        data.load(DataConfig(corpus, str(path), tokenizer=tokenizer, **cache))


def test_public_names():
    assert all(hasattr(data, name) for name in data.__all__)
    assert set(data.__all__) <= set(dir(data)) and not hasattr(data, "nothing")


def test_a_process_that_tokenizes_imports_no_torch():
    code = "import sys, titanfunc.data.making; print(*({'torch', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
