"""Tokenizers give back the text that they took, and documents end where they end."""

import itertools
import os
import re
import signal
import time

import numpy as np
import pytest

from titanfunc.config import hub
from titanfunc.config.vocabulary import HUB_TOKENIZERS, vocab_size
from titanfunc.data import tokenizers as module
from titanfunc.data.parts import Unreadable
from titanfunc.data.tokenizers import SEPARATOR, byte_tokenizer, from_definition, from_library, get_tokenizer, train_bpe
from titanfunc.data.tokens import tokenize

PLAIN = ["some words that come again and again, some words", "again and again the same words"] * 5
TEXTS = [
    "plain",
    "naïve café, 東京, 🙂\r\n\t",
    "",
    "\n\n \n",
    "e\u0301 n\u0303 \u1112\u1161\u11ab",  # combining marks, and a syllable in pieces
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "שלום עולם مرحبا بالعالم नमस्ते สวัสดี Привет мир გამარჯობა አማርኛ ᠮᠣᠩᠭᠣᠯ",
    "𐍈 𓀀 \U0010ffff \u200b\u202e\ufeff",
    f"a {SEPARATOR} b{SEPARATOR}",
    "</s><s>[SEP]<eos>",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(PLAIN, 280)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(kind, text, bpe):
    tokenizer = {"bytes": byte_tokenizer(), "bpe": bpe}[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.name == kind
    assert ids.size == 0 or ids.max() < tokenizer.vocab_size
    assert not np.any(ids == tokenizer.separator)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_boundaries_of_documents_are_kept(kind, bpe):
    tokenizer = {"bytes": byte_tokenizer(), "bpe": bpe}[kind]
    tokens, ends, _ = tokenize(TEXTS, tokenizer)
    assert np.flatnonzero(tokens == tokenizer.separator).tolist() == (ends - 1).tolist()
    pieces = np.split(tokens, ends[:-1])
    assert [tokenizer.decode(piece[:-1]) for piece in pieces] == TEXTS


def test_many_texts_are_encoded_as_one_by_one(bpe, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_CHARS", 30)
    for ids, text in zip(bpe.encode_all(TEXTS), TEXTS, strict=True):
        np.testing.assert_array_equal(ids, bpe.encode(text))


def test_bpe_learns_what_comes_often(bpe):
    assert bpe.vocab_size == 280 == vocab_size("bpe", 280)
    assert len(bpe.encode(PLAIN[0])) < len(PLAIN[0]) / 1.5
    assert bpe.definition == train_bpe(PLAIN, 280).definition
    assert bpe.fingerprint != train_bpe(PLAIN, 270).fingerprint


def test_a_long_training_tells_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr("titanfunc.data.progress.FIRST", 0.05)
    monkeypatch.setattr("titanfunc.data.progress.EVERY", 0.05)
    monkeypatch.setattr("titanfunc.data.tokenizers._INTERRUPTED", 0.01)

    def slowly():
        for text in PLAIN:
            yield text
            time.sleep(0.15)

    slow = train_bpe(slowly(), 280)
    told = re.findall(r"^training bpe: has read ([\d,]+) characters, \d+ s$", capsys.readouterr().err, re.M)
    read = [int(each.replace(",", "")) for each in told]
    assert len(read) >= 2 and read == sorted(read) and read[-1] > 0
    assert set(read) <= {0, *itertools.accumulate(map(len, PLAIN))}
    assert slow.definition == train_bpe(PLAIN, 280).definition
    monkeypatch.undo()
    capsys.readouterr()
    train_bpe(PLAIN, 280)
    assert capsys.readouterr().err == ""


def test_bpe_of_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"^data.bpe_size: wanted at most \d+, all the tokens .* yields, got 5000$"):
        train_bpe(PLAIN, 5000)


def test_a_training_ends_soon_after_an_interrupt():
    read = []

    def texts():
        for i in range(3000):
            read.append(i)
            if i == 20:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            yield f"text {i}"

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_bpe(texts(), 300)
    assert time.monotonic() - started < 10  # of 30
    time.sleep(0.5)
    count = len(read)
    time.sleep(0.3)
    assert len(read) == count  # nothing reads on


def test_an_error_of_the_texts_is_told_as_it_is():
    def texts():
        yield "some text"
        raise Unreadable("a.txt: cannot be read")

    with pytest.raises(Unreadable, match=r"^a\.txt: cannot be read$"):
        train_bpe(texts(), 300)


def test_a_tokenizer_is_its_definition(bpe):
    again = from_definition("bpe", bpe.definition, bpe.separator)
    assert again.fingerprint == bpe.fingerprint
    np.testing.assert_array_equal(again.encode(TEXTS[1]), bpe.encode(TEXTS[1]))
    with pytest.raises(ValueError, match=r"^data.tokenizer: bpe cannot be read"):
        from_definition("bpe", "{}", 0)


def test_a_file(tmp_path, bpe):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.definition)
    read = get_tokenizer(str(path))
    assert (read.vocab_size, read.separator, read.fingerprint) == (280, bpe.separator, bpe.fingerprint)
    assert vocab_size(str(path)) == 280
    with pytest.raises(ValueError, match=r"^data.separator: wanted a token of .*, got '<end>'"):
        get_tokenizer(str(path), "<end>")
    other = get_tokenizer(str(path), "a")
    assert other.decode([other.separator]) == "a" and not np.any(other.encode("bbb") == other.separator)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"^data.tokenizer: .*tokenizer.json cannot be read as a tokenizer's \.json"):
        get_tokenizer(str(path))
    with pytest.raises(ValueError, match=r"^data.tokenizer: .*nowhere.json cannot be read"):
        vocab_size(str(tmp_path / "nowhere.json"))


def test_text_that_would_become_the_separator_is_refused(bpe):
    """Such as where an ordinary token of the vocabulary was named."""
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"end": 0, "word": 1}, unk_token="word"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = from_library("words", library, "end")
    assert tokenizer.encode("word word").tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"^data.separator: words makes its separator, id 0, of plain text"):
        tokenizer.encode("word end word")


def test_truncation_and_padding_of_a_file_are_switched_off(bpe):
    import tokenizers

    library = tokenizers.Tokenizer.from_str(bpe.definition)
    library.enable_truncation(2)
    library.enable_padding(length=100)
    np.testing.assert_array_equal(from_library("cut", library).encode(TEXTS[1]), bpe.encode(TEXTS[1]))


def test_a_tokenizer_of_the_hub_is_asked_for_by_its_name(monkeypatch, tmp_path, bpe):
    """There is no hub here: what the library would fetch is given instead."""
    asked, file = [], tmp_path / "tokenizer.json"
    file.write_text(bpe.definition)

    def fetch(repository, name):
        asked.append(repository)
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "fetch", fetch)
    assert vocab_size("llama2") == 32000 and asked == []
    assert vocab_size("someone/something") == 280 and asked == ["someone/something"]
    with pytest.raises(ValueError, match=r"^data.tokenizer: wanted 49152 tokens in smollm, got 280$"):
        get_tokenizer("smollm")
    assert asked[1] == HUB_TOKENIZERS["smollm"][0]
    file.unlink()
    with pytest.raises(ValueError, match=r"^data.tokenizer: someone/else cannot be fetched from the hub \("):
        get_tokenizer("someone/else")


def test_bytes_are_the_ids():
    assert byte_tokenizer().encode("é!").tolist() == [0xC3, 0xA9, 0x21]


def test_byte_0_is_no_text_for_bytes():
    with pytest.raises(
        ValueError, match=r"^data.tokenizer: bytes ends documents with byte 0, and a document holds one"
    ):
        byte_tokenizer().encode("a\0b")


def test_a_cut_character_is_replaced():
    assert byte_tokenizer().decode([0x61, 0xC3]) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("ids", [[256], [-1], np.array([3, 300])])
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(ValueError, match=r"^ids: wanted bytes in \[0, 256\), got"):
        byte_tokenizer().decode(ids)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"^data.tokenizer: wanted bytes, bpe, llama2, smollm, .*, got 'words'$"):
        get_tokenizer("words")
    with pytest.raises(ValueError, match=r"^data.tokenizer: bpe is trained on a corpus"):
        get_tokenizer("bpe")
