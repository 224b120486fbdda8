"""Token arrays hold the documents, and the cache gives back what was written or nothing."""

import logging

import numpy as np
import pytest

from titanfunc.data import tokens as module
from titanfunc.data.tokenizers import Tokenizer, byte_tokenizer
from titanfunc.data.tokens import TokenArray, cache_key, read_cache, token_dtype, tokenize, write_cache

TEXTS = ["one", "", "three 3"]


def arrays(dtype=np.uint8):
    train = TokenArray(np.arange(200, dtype=dtype), np.array([90, 200], dtype=np.int64))
    return {"train": train, "validation": TokenArray(train.tokens[:7], np.array([7], dtype=np.int64))}


def test_documents_end_with_the_separator():
    tokens, ends = tokenize(TEXTS, byte_tokenizer())
    assert tokens.tobytes() == b"one\0\0three 3\0"
    assert tokens.dtype == np.uint8
    assert ends.tolist() == [4, 5, 13]
    assert ends.dtype == np.int64


def test_the_vocabulary_chooses_the_type():
    sizes = {2: np.uint8, 256: np.uint8, 257: np.uint16, 65536: np.uint16, 65537: np.uint32, 2**32: np.uint32}
    assert {size: token_dtype(size) for size in sizes} == sizes
    with pytest.raises(ValueError, match=r"^vocab_size: wanted at most 2\*\*32, got"):
        token_dtype(2**32 + 1)


def test_large_ids_survive():
    encode = lambda text: np.array([ord(c) for c in text], dtype=np.int64)  # noqa: E731
    wide = Tokenizer("code points", 0x110000, 0x10FFFF, encode, lambda ids: "")
    tokens, _ = tokenize(["é🙂"], wide)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [0xE9, 0x1F642, 0x10FFFF]


def test_no_text_is_refused():
    with pytest.raises(ValueError, match=r"^texts: wanted at least one document, got none$"):
        tokenize([], byte_tokenizer())


def test_the_key_depends_on_texts_order_borders_and_settings():
    keys = [
        cache_key(["ab", "c"], seed=0),
        cache_key(["a", "bc"], seed=0),
        cache_key(["c", "ab"], seed=0),
        cache_key(["ab", "d"], seed=0),
        cache_key(["ab", "c"], seed=1),
        cache_key(["ab", "c"], tokenizer="bytes", seed=0),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key(iter(["ab", "c"]), seed=0) == keys[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_the_cache_maps_back_what_was_written(tmp_path, dtype):
    written = arrays(dtype)
    folder = tmp_path / "new" / "cache"
    write_cache(folder, "k", written)
    read = read_cache(folder, "k")
    assert read.keys() == written.keys()
    for split in written:
        for mine, theirs in zip(written[split], read[split], strict=True):
            assert isinstance(theirs, np.memmap)
            assert theirs.dtype == mine.dtype
            np.testing.assert_array_equal(theirs, mine)
    assert [path.name for path in folder.iterdir()] == ["tokens-k.safetensors"]


def test_nothing_cached_is_no_warning(tmp_path, caplog):
    assert read_cache(tmp_path, "k") is None
    assert caplog.records == []


def truncate(data):
    return data[:-1]


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def flip_header(data):
    return data[:12] + bytes([data[12] ^ 1]) + data[13:]


def swap_dtype(data):
    return data.replace(b'"U8"', b'"U9"')


DAMAGE = [
    truncate,
    flip,
    flip_header,
    swap_dtype,
    lambda data: b"",
    lambda data: data[:5],
    lambda data: b"\0" * 64,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_reported_and_not_used(tmp_path, caplog, damage):
    write_cache(tmp_path, "k", arrays())
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert read_cache(tmp_path, "k") is None
    assert "is damaged" in caplog.text
    write_cache(tmp_path, "k", arrays())
    assert read_cache(tmp_path, "k") is not None


def test_a_file_of_another_key_is_not_used(tmp_path):
    write_cache(tmp_path, "k", arrays())
    (tmp_path / "tokens-k.safetensors").rename(tmp_path / "tokens-other.safetensors")
    assert read_cache(tmp_path, "other") is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_cache(tmp_path, "k", arrays())

    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, "k", {"train": arrays()["train"]})
    assert read_cache(tmp_path, "k").keys() == arrays().keys()
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-k.safetensors"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^data.cache_dir: cannot write .*tokens-k.safetensors \("):
        write_cache(tmp_path / "file", "k", arrays())
