"""Tokenizers give back the text that they took."""

import numpy as np
import pytest

from titanfunc.config.data import VOCAB_SIZES, vocab_size
from titanfunc.data.tokenizers import byte_tokenizer, get_tokenizer


@pytest.mark.parametrize("name", VOCAB_SIZES)
@pytest.mark.parametrize("text", ["", "plain", "naïve café, 東京, 🙂\r\n\t"])
def test_round_trip(name, text):
    tokenizer = get_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.name == name
    assert tokenizer.vocab_size == vocab_size(name)
    assert ids.size == 0 or ids.max() < tokenizer.vocab_size
    assert not np.any(ids == tokenizer.separator)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text


def test_bytes_are_the_ids():
    assert byte_tokenizer().encode("é!").tolist() == [0xC3, 0xA9, 0x21]


def test_a_cut_character_is_replaced():
    assert byte_tokenizer().decode([0x61, 0xC3]) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("ids", [[256], [-1], np.array([3, 300])])
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(ValueError, match=r"^ids: wanted bytes in \[0, 256\), got"):
        byte_tokenizer().decode(ids)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"^data.tokenizer: wanted one of bytes, got 'words'$"):
        get_tokenizer("words")
