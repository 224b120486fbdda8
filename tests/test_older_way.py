"""The baseline under benchmarks/older_way: it trains, its graph breaks at every write, and ours does not."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import titanfunc as tf
from titanfunc.compile_report.counts import breaks

CONFIG = tf.models.preset(
    "mac_tiny", vocab_size=32, dim=16, layers=1, heads=2, ff=16, seq_len=32, persistent=2,
    memory={"heads": 2, "head_dim": 8, "hidden": 8, "chunk_size": 8}, mac={"segment": 16},
)  # fmt: skip


@pytest.fixture
def older(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import older_way

    yield older_way
    for name in [name for name in sys.modules if name.partition(".")[0] == "older_way"]:
        del sys.modules[name]


@pytest.fixture
def tokens():
    return torch.randint(32, (2, 33), generator=torch.Generator().manual_seed(0))


def test_sizes_are_the_configurations(older):
    sizes = older.Sizes.of(dataclasses.replace(CONFIG, precision="bf16"))
    assert (sizes.dim, sizes.segment, sizes.memory_heads, sizes.chunk, sizes.bf16) == (16, 16, 2, 8, True)
    model, _ = older.make_step(sizes, torch.device("cpu"), None)
    assert [tuple(w.shape) for w in model.blocks[0].memory.initial] == [(2, 8, 8), (2, 8, 8)]
    assert model.head.weight is model.embedding.weight


def test_it_is_causal_and_trains_through_its_writes(older, tokens):
    model, step = older.make_step(older.Sizes.of(CONFIG), torch.device("cpu"), None, lr=1e-2)
    changed = tokens.clone()
    changed[:, 20:] = 0
    there, here = model(tokens), model(changed)
    assert torch.equal(there[:, :20], here[:, :20]) and not torch.equal(there[:, 20:], here[:, 20:])
    losses = [step(tokens).item() for _ in range(8)]
    assert losses[-1] < losses[0] - 1
    memory = model.blocks[0].memory  # a key acts on the loss by what is written alone
    assert all(parameter.grad.abs().sum() > 0 for parameter in (memory.k.weight, memory.v.weight, memory.gates.weight))


def test_its_graph_breaks_and_ours_does_not(older, tokens, graphs):
    backend, seen = graphs
    _, eager = older.make_step(older.Sizes.of(CONFIG), torch.device("cpu"), None)
    _, broken = older.make_step(older.Sizes.of(CONFIG), torch.device("cpu"), backend)
    for _ in range(2):
        torch.testing.assert_close(broken(tokens), eager(tokens), rtol=1e-4, atol=1e-4)
    assert len(seen) > 2
    found = breaks()
    assert found["graph_breaks"] >= 1 and "at 0x" not in str(found["reasons"])
    assert any("torch.autograd.grad in the forward" in reason for reason in found["reasons"])
    _, whole = older.make_step(older.Sizes.of(CONFIG), torch.device("cpu"), backend, fullgraph=True)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        whole(tokens)

    torch._dynamo.reset()
    counters.clear()
    seen.clear()
    model = tf.models.build(CONFIG)
    tx = tf.optim.from_config(tf.optim.OptimConfig(), 10)
    step = tf.train.compile_step(tf.train.make_train_step(model, tx), backend)
    step(tf.train.init_state(model, tx), {"tokens": tokens})
    assert len(seen) == 1 and breaks()["graph_breaks"] == 0
