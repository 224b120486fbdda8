"""The whole way from a configuration to both splits."""

import dataclasses

import numpy as np
import pytest

from titanfunc import data
from titanfunc.config.data import DataConfig
from titanfunc.data import pipeline


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"document {i}: " + "é" * i)
    return DataConfig(corpus="text_folder", path=str(folder), validation_fraction=0.2)


def texts(tokens, tokenizer):
    starts = np.concatenate([[0], tokens.ends[:-1]])
    pieces = [tokens.tokens[start:end] for start, end in zip(starts, tokens.ends, strict=True)]
    assert all(piece[-1] == tokenizer.separator for piece in pieces)
    return [tokenizer.decode(piece[:-1]) for piece in pieces]


def equal(one, two):
    return all(
        np.array_equal(mine, theirs)
        for split in ("train", "validation")
        for mine, theirs in zip(getattr(one, split), getattr(two, split), strict=True)
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


def test_the_cache_spares_tokenizing_until_something_changes(config, tmp_path, monkeypatch):
    plain = data.load(config)
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))
    calls = []
    monkeypatch.setattr(pipeline, "tokenize", lambda *a: calls.append(a) or data.tokenize(*a))

    def tokenized(config):
        calls.clear()
        return data.load(config), len(calls)

    first, count = tokenized(config)
    assert equal(first, plain)
    assert count == 2
    second, count = tokenized(config)
    assert equal(second, plain)
    assert second.bytes_per_token == plain.bytes_per_token
    assert count == 0
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    third, count = tokenized(config)
    assert equal(third, plain)
    assert count == 2
    assert tokenized(config)[1] == 0
    assert tokenized(dataclasses.replace(config, seed=1))[1] == 2
    assert tokenized(dataclasses.replace(config, validation_fraction=0.5))[1] == 2
    (tmp_path / "texts" / "03.txt").write_text("another text")
    edited, count = tokenized(config)
    assert count == 2
    both = [*texts(edited.train, edited.tokenizer), *texts(edited.validation, edited.tokenizer)]
    assert "another text" in both


def test_a_single_document_is_refused(tmp_path):
    (tmp_path / "only.txt").write_text("text")
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"^corpus: wanted at least 2 documents .* got 1; cut"):
        data.load(DataConfig(corpus="text_folder", path=str(tmp_path)))


def test_no_text_at_all_is_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"^corpus: wanted at least 2 documents .* got 0; cut"):
        data.load(DataConfig(corpus="text_folder", path=str(tmp_path)))


def test_public_names():
    assert all(hasattr(data, name) for name in data.__all__)
