"""A stream's batches are those of its files, whoever asks and whenever."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.data.tables import hub_folder, write_jsonl
from titanfunc.config.data import DataConfig
from titanfunc.data import open_source
from titanfunc.data.corpora import stream_documents
from titanfunc.data.pipeline import load
from titanfunc.data.stream import StreamBatches
from titanfunc.data.tokenizers import byte_tokenizer

TEXTS = [f"document {i:03}: " + "some words " * (i % 5) for i in range(120)]


@pytest.fixture
def config(tmp_path):
    hub_folder(tmp_path / "dataset", files=4, texts=TEXTS)
    settings = {"subset": "sample", "seq_len": 12, "batch_size": 6, "validation_fraction": 0.2, "stream": True}
    return DataConfig(corpus="hub", path=str(tmp_path / "dataset"), **settings)


def batches(source, steps):
    return [source.batches(step)["tokens"] for step in steps]


def read_to_the_end(source):
    """Every batch, and the error that ends them."""
    found = []
    try:
        while True:
            found += batches(source, [len(found)])
    except ValueError as error:
        said = str(error)
    steps = f"{len(found)} step{'s' if len(found) > 1 else ''}"
    assert f" ends after {steps}, and a stream is read once; keep its tokens (data.stream=false), " in said
    assert said.endswith(f" or end the run there, with train.steps={len(found)}")  # which it then does
    return found


@pytest.mark.parametrize("separate", [True, False])
def test_a_step_is_the_same_whenever_it_is_asked_for(config, separate):
    config = dataclasses.replace(config, separate_documents=separate)
    first = batches(open_source(config, 1), range(8))
    assert first[0].shape == (6, 13) and first[0].dtype == torch.int64
    assert not torch.equal(first[0], first[1])
    again = open_source(config, 1)
    for step in (5, 2, 3, 7, 0):
        assert torch.equal(batches(again, [step])[0], first[step])


def test_the_end_is_told_and_the_stream_can_be_read_again(config):
    source = open_source(config, 1)
    whole = read_to_the_end(source)
    assert torch.equal(batches(source, [3])[0], whole[3])
    assert len(read_to_the_end(source)) == len(whole)


def test_a_stream_of_less_than_a_batch_is_told(config):
    config = dataclasses.replace(config, batch_size=10**6)
    message = r"^data\.stream: .*/dataset has not one batch of 1000000 windows of 12 tokens; lower data\.batch_size or "
    with pytest.raises(ValueError, match=message):
        StreamBatches(config, byte_tokenizer()).batch(0)


def training_documents(source, steps):
    return [name for step in range(steps) for name in source.documents(step)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_document_is_read_by_one_rank(config, world):
    config = dataclasses.replace(config, batch_size=world)
    seen = []
    for rank in range(world):
        source = open_source(config, 1, rank=rank, world=world)
        count = len(read_to_the_end(source))
        seen.append(set(training_documents(source, count)))
        files = {name.partition(":")[0] for name in seen[-1]}
        assert len(files) == (4 // world if 4 % world == 0 else 4)
    one = set().union(*seen)
    assert sum(map(len, seen)) == len(one)
    alone = open_source(config, 1)
    assert one >= set(training_documents(alone, len(read_to_the_end(alone))))


def test_the_held_out_documents_are_the_same_for_all_and_never_trained_on(config):
    ranks = [open_source(config, 2, rank=rank, world=2) for rank in range(2)]
    assert all(
        torch.equal(one["tokens"], two["tokens"]) for one, two in zip(*(each.held_out for each in ranks), strict=True)
    )
    corpus = ranks[0].corpus
    names = {corpus.validation.name(i) for i in range(len(corpus.validation.ends))}
    assert names and corpus.bytes_per_token < 1 and len(corpus.train.tokens) == 0
    for source in ranks:
        assert not names & set(training_documents(source, len(read_to_the_end(source))))
    held = np.asarray(corpus.validation.tokens).tobytes()
    assert all(each["tokens"].shape == (6, 13) for each in ranks[0].held_out)
    assert bytes(ranks[0].held_out[0]["tokens"][0].tolist()) in held


def test_windows_of_joined_documents_tile_the_text(config):
    config = dataclasses.replace(config, separate_documents=False)
    source = open_source(config, 1)
    rows = torch.cat(read_to_the_end(source))
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    text = bytes(torch.cat([rows[0, :1], rows[:, 1:].flatten()]).tolist()).decode()
    assert [piece for piece in text.split("\0")[:-1] if piece not in TEXTS] == []
    names = source.documents(0)
    by_name = {row["name"]: row["text"] for row in stream_documents(config)}
    pieces = bytes(batches(source, [0])[0][:, :-1].flatten().tolist()).decode().split("\0")
    assert all(piece in by_name[name] for piece, name in zip(pieces, names, strict=True))


def test_windows_of_separate_documents_are_named(config):
    source = open_source(config, 1)
    by_name = {row["name"]: row["text"] + "\0" for row in stream_documents(config)}
    for step in range(5):
        names = source.documents(step)
        texts = [bytes(row.tolist()).decode() for row in batches(source, [step])[0]]
        assert all(any(text in by_name[name] for name in names) for text in texts)
        assert all(any(text in by_name[name] for text in texts) for name in names)


def test_a_file_that_breaks_off_is_named_and_read_again_when_mended(config, tmp_path):
    path = tmp_path / "lines" / "a.jsonl"
    write_jsonl(path, TEXTS)
    whole = path.read_text()
    config = dataclasses.replace(config, corpus="files", subset="", path=str(tmp_path / "lines"))
    source = open_source(config, 1)
    first = batches(source, range(10))
    path.write_text(whole[:6000] + "\nbroken\n")
    source = open_source(config, 1)
    with pytest.raises(ValueError, match=r"lines/a\.jsonl: line \d+: not JSON"):
        batches(source, range(1000))
    path.write_text(whole)
    assert torch.equal(batches(source, [9])[0], first[9])


def test_an_evaluation_reads_the_held_out_documents_of_a_stream(config):
    corpus = load(config)
    assert len(corpus.train.tokens) == 0 and len(corpus.validation.ends) > 10
    assert corpus.tokenizer.name == "bytes"


def test_nothing_held_out_is_refused(config):
    with pytest.raises(ValueError, match=r"^data.validation_fraction: no document of .* is held out; raise it$"):
        open_source(dataclasses.replace(config, validation_fraction=1e-9), 1)


def test_a_stream_without_text_is_told(config, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    config = dataclasses.replace(config, corpus="files", subset="", path=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"^data\.path: .* in .*/empty\.jsonl, got none: there is no text in it$"):
        open_source(config, 1)


def test_refusals(config):
    with pytest.raises(ValueError, match=r"^data.batch_size: wanted a multiple of the 4 ranks, got 6$"):
        open_source(config, 1, rank=0, world=4)
    with pytest.raises(ValueError, match=r"^step: wanted a whole number of at least 0, got -1$"):
        open_source(config, 1).batches(-1)
