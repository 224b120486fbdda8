"""Token arrays hold the documents; pieces of several arrays read as one."""

import numpy as np
import pytest

from titanfunc.data.tokenizers import Tokenizer, byte_tokenizer, from_library
from titanfunc.data.tokens import (
    MappedTokens,
    Shard,
    as_mapped,
    read_rows,
    select,
    token_dtype,
    tokenize,
    tokenize_shard,
    within,
)

TEXTS = ["one", "", "three 3"]


def test_documents_end_with_the_separator():
    tokens, ends, _ = tokenize(TEXTS, byte_tokenizer())
    assert tokens.tobytes() == b"one\0\0three 3\0"
    assert tokens.dtype == np.uint8
    assert ends.tolist() == [4, 5, 13]
    assert ends.dtype == np.int64


def test_the_vocabulary_chooses_the_type():
    sizes = {2: np.uint8, 256: np.uint8, 257: np.uint16, 65536: np.uint16, 65537: np.uint32, 2**32: np.uint32}
    assert {size: token_dtype(size) for size in sizes} == sizes
    with pytest.raises(ValueError, match=r"^vocab_size: wanted at most 2\*\*32, got"):
        token_dtype(2**32 + 1)


def test_ids_keep_their_values_in_a_wide_type():
    wide = Tokenizer("wide", 300, 299, lambda text: np.array([256, 298]), lambda ids: "")
    tokens, ends, _ = tokenize(["a", "b"], wide)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [256, 298, 299, 256, 298, 299]
    assert ends.tolist() == [3, 6]


def test_no_text_is_refused():
    with pytest.raises(ValueError, match=r"^texts: wanted at least one document, got none$"):
        tokenize([], byte_tokenizer())


def test_a_shard_knows_bytes_and_names():
    shard, names = tokenize_shard([("a", "é"), ("b", "xyz")], byte_tokenizer())
    assert shard.sizes.tolist() == [2, 3] and shard.ends.tolist() == [3, 7]
    assert names == ["a", "b"] and shard.name(1) == "b"
    shard, names = tokenize_shard([], byte_tokenizer())
    assert len(shard.tokens) == len(shard.ends) == 0 and shard.tokens.dtype == np.uint8 and names == []


def test_a_document_that_the_tokenizer_refuses_is_named():
    with pytest.raises(ValueError, match=r"^second: data.tokenizer: bytes ends documents with byte 0"):
        tokenize_shard([("first", "a"), ("second", "\0")], byte_tokenizer())


def test_the_document_is_named_that_is_refused_among_those_encoded_together():
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"end": 0, "word": 1}, unk_token="word"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    documents = [(name, "word end" if name == "third" else "word") for name in ("first", "second", "third", "fourth")]
    with pytest.raises(ValueError, match=r"^third: data.separator: words makes its separator, id 0, of plain text"):
        tokenize_shard(documents, from_library("words", library, "end"))


def shards(counts=((3, 5), (), (4, 1, 6), (2,))):
    """Tokens that count up from 0 over all shards; a document's name is "shard.place"."""
    found, token = [], 0
    for number, lengths in enumerate(counts):
        total = sum(lengths)
        tokens = np.arange(token, token + total, dtype=np.uint16)
        token += total
        name = f"{number}.{{}}".format
        found.append(Shard(tokens, np.cumsum(lengths, dtype=np.int64), np.array(lengths, dtype=np.int64), name))
    return found


def test_what_places_lie_within():
    ends, source = np.array([0, 4, 4, 9, 100]), np.random.default_rng(0)
    places = source.integers(-3, 120, size=500)
    assert within(ends, places).tolist() == [sum(end <= place for end in ends.tolist()) for place in places.tolist()]
    assert within(ends, places[:0]).tolist() == []


@pytest.mark.parametrize("chosen", [[0], [5], [1, 2], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5], [1, 4]])
def test_selected_documents_read_as_one_ring(chosen):
    parts = shards()
    whole = np.concatenate([shard.tokens for shard in parts])
    lengths = [3, 5, 4, 1, 6, 2]
    ends = np.cumsum(lengths)
    expected = np.concatenate([whole[ends[i] - lengths[i] : ends[i]] for i in chosen])
    tokens, mine, name = select(parts, np.array(chosen))
    assert isinstance(tokens, MappedTokens) and len(tokens) == len(expected) and tokens.dtype == np.uint16
    np.testing.assert_array_equal(np.asarray(tokens), expected)
    assert mine.tolist() == np.cumsum([lengths[i] for i in chosen]).tolist()
    names = ["0.0", "0.1", "2.0", "2.1", "2.2", "3.0"]
    assert [name(i) for i in range(len(chosen))] == [names[i] for i in chosen]
    for size in (1, 3, 30):
        ring = [np.take(expected, range(i, i + size), mode="wrap") for i in range(len(expected))]
        for each in (tokens, as_mapped(expected)):
            starts = np.arange(len(expected))
            for read in (each.take(starts, size), read_rows(each.locate(starts, size), size, each.dtype)):
                assert read.dtype == np.int64
                np.testing.assert_array_equal(read, ring)
