"""What a run trains and validates on."""

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from titanfunc.config.data import DataConfig
from titanfunc.config.failures import NO_DATA, Damaged
from titanfunc.data import cache, open_source


@pytest.fixture
def folder(tmp_path):
    for i, word in enumerate(("alpha", "beta", "gamma", "delta")):
        (tmp_path / f"{i}.txt").write_text(f"{word} " * 300)
    return tmp_path


def config(folder, **changes):
    settings = {"corpus": "text_folder", "path": str(folder), "seq_len": 600, "batch_size": 2, **changes}
    return DataConfig(**settings, validation_fraction=0.25)


def test_text(folder):
    source = open_source(config(folder, seq_len=64), eval_batches=3)
    assert set(source.batches(0)) == {"tokens"} and source.batches(0)["tokens"].shape == (2, 65)
    assert [batch["tokens"].shape for batch in source.held_out] == [(2, 65)] * 3
    assert source.task is None and source.bytes_per_token == pytest.approx(1, rel=1e-2)
    assert source.summary.startswith("text_folder: ")


def test_a_text_task_is_trained_and_validated_in_different_documents(folder):
    source = open_source(config(folder, task="needle"), eval_batches=2)
    words = [
        {word for word in ("alpha", "beta", "gamma", "delta") if word in bytes(tokens.flatten().tolist()).decode()}
        for tokens in (
            torch.cat([source.batches(step)["tokens"] for step in range(20)]),
            torch.cat([batch["tokens"] for batch in source.held_out]),
        )
    ]
    assert len(words[0]) == 3 and len(words[1]) == 1 and not words[0] & words[1]
    assert source.bytes_per_token is None
    assert source.held_out[0]["weights"].shape == (2, 600)
    assert source.task.examples(200, 0.5, 1)[0].shape == (1, 201)
    assert source.summary == "needle in text_folder: a step is 2 rows of 600 tokens, drawn from seed 0"


def test_a_task_without_text_reads_none(folder):
    source = open_source(config(folder / "nowhere", task="mqar"), eval_batches=2)
    assert source.corpus is None and source.bytes_per_token is None
    first = source.held_out[0]["tokens"]
    assert not any(torch.equal(first, source.batches(step)["tokens"]) for step in range(5))
    again = open_source(config(folder / "nowhere", task="mqar"), eval_batches=2)
    assert torch.equal(again.held_out[1]["tokens"], source.held_out[1]["tokens"])


@pytest.mark.parametrize("task", ["", "needle", "mqar"])
def test_ranks_share_out_the_same_batch(folder, task):
    settings = config(folder, task=task, batch_size=6, seq_len=600 if task else 64)
    whole = open_source(settings, eval_batches=1)
    for world in (2, 3):
        ranks = [open_source(settings, eval_batches=1, rank=rank, world=world) for rank in range(world)]
        for step in (0, 5):
            batches = [source.batches(step) for source in ranks]
            for name, values in whole.batches(step).items():
                assert torch.equal(torch.cat([batch[name] for batch in batches]), values)
        told = [name for source in ranks for name in source.documents(5)]
        assert list(dict.fromkeys(told)) == whole.documents(5)
        assert all(torch.equal(source.held_out[0]["tokens"], whole.held_out[0]["tokens"]) for source in ranks)
    with pytest.raises(ValueError, match=r"^data.batch_size: wanted a multiple of the 4 ranks, got 6$"):
        open_source(settings, 1, rank=0, world=4)


def test_the_documents_of_a_step_are_told(folder):
    source = open_source(config(folder, seq_len=64, batch_size=4), eval_batches=1)
    words = dict(zip(("0.txt", "1.txt", "2.txt", "3.txt"), ("alpha", "beta", "gamma", "delta"), strict=True))
    for step in range(5):
        text = [bytes(row.tolist()).decode() for row in source.batches(step)["tokens"]]
        told = source.documents(step)
        assert {words[name] for name in told} == {word for word in words.values() if any(word in row for row in text)}
    assert open_source(config(folder, task="mqar"), 1).documents(3) == ["mqar row 6", "mqar row 7"]


def test_an_id_that_is_no_token_is_told_before_a_model_sees_it(folder, tmp_path_factory, monkeypatch):
    kept = {"tokenizer": "bpe", "bpe_size": 260, "cache_dir": str(tmp_path_factory.mktemp("cache"))}
    made = config(folder, seq_len=64, batch_size=4, **kept)
    open_source(made, 1)
    (tokens,) = Path(made.cache_dir).glob("tokens-*/shard-00000.tokens")
    ids = np.fromfile(tokens, dtype="<u2")
    manifest = tokens.with_name("manifest.json")

    def write(ids):
        tokens.write_bytes(ids.tobytes())
        about = json.loads(manifest.read_text())
        about["shards"][0]["crc32"]["tokens"] = zlib.crc32(ids.tobytes())
        manifest.write_text(json.dumps(about))

    crafted = np.full_like(ids, 260)
    write(crafted)
    with pytest.raises(Damaged, match=r"shard-00000\.tokens: wanted ids below 260, .* got 260; delete it"):
        open_source(made, 1)
    monkeypatch.setattr(cache, "VERIFIED_BYTES", 0)  # as of a large one, which is not read when it is opened
    with pytest.raises(Damaged, match=r"documents to validate on: wanted ids below 260, .* got 260: the tokens"):
        open_source(made, 1)
    write(ids)
    source = open_source(made, 1)
    write(crafted)
    with pytest.raises(Damaged, match=r"cache.*: one of \d\.txt.*: wanted ids below 260") as error:
        source.batches(0)
    assert error.value.status == NO_DATA and "\n" not in str(error.value)


def test_a_cache_gives_the_same_source(folder, tmp_path_factory):
    plain = config(folder, seq_len=64, batch_size=4)
    kept = dataclasses.replace(plain, cache_dir=str(tmp_path_factory.mktemp("cache")))
    one, two = open_source(plain, 2), open_source(kept, 2)
    assert one.summary == two.summary and one.bytes_per_token == two.bytes_per_token
    for step in range(6):
        assert torch.equal(one.batches(step)["tokens"], two.batches(step)["tokens"])
        assert one.documents(step) == two.documents(step)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(one.held_out, two.held_out, strict=True))
    needle = [open_source(dataclasses.replace(each, task="needle", seq_len=600), 1) for each in (plain, kept)]
    assert torch.equal(*(source.batches(2)["tokens"] for source in needle))
