"""What a run trains and validates on."""

import pytest
import torch

from titanfunc.config.data import DataConfig
from titanfunc.data import open_source


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
