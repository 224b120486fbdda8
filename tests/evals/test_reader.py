"""Reading piece by piece is reading at once."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.evals.oracle import PARAMS, oracle
from tests.models.small import MEMORIES, MODELS, draw_tokens, small
from titanfunc.config import ModelConfig
from titanfunc.evals import make_reader
from titanfunc.evals.reader import piece_length


def at_once(model, params, tokens, **options):
    memory = model.init_memory(params, tokens.shape[0])
    logits, _ = model.apply(params, memory, tokens[:, :-1], aligned=True, **options)
    loss = -logits.log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    return loss.float(), logits.argmax(-1) == tokens[:, 1:]


@pytest.mark.parametrize("name", MODELS)
def test_pieces_and_batches_of_rows_change_nothing(name):
    model, params = small(name)
    tokens = draw_tokens(5, 31)
    loss, right = at_once(model, params, tokens)
    for piece, rows in ((8, 2), (16, 5), (4096, 8)):
        reading = make_reader(model, piece=piece, rows=rows)(params, tokens)
        torch.testing.assert_close(reading.loss, loss, rtol=1e-5, atol=1e-5)
        assert torch.equal(reading.right, right)
        assert not reading.loss.requires_grad


@pytest.mark.parametrize("name", MEMORIES)
def test_without_writes(name):
    model, params = small(name)
    tokens = draw_tokens(2, 31)
    off = make_reader(model, piece=8, write=False)(params, tokens)
    loss, _ = at_once(model, params, tokens, write=False)
    torch.testing.assert_close(off.loss, loss, rtol=1e-5, atol=1e-5)
    on = make_reader(model, piece=8)(params, tokens)
    assert not torch.allclose(on.loss, off.loss, atol=1e-3)


@pytest.mark.parametrize("name", ["input", "mag"])
def test_all_full_pieces_are_one_graph(name, graphs):
    backend, seen = graphs
    model, params = small(name, layers=1)
    params = {**params}
    tokens = draw_tokens(3, 33)
    reading = make_reader(model, piece=8, rows=2, backend=backend)(params, tokens)
    loss, right = at_once(model, params, tokens)
    torch.testing.assert_close(reading.loss, loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(reading.right, right)
    assert len(seen) == 1 and not counters["graph_break"]


def test_a_model_without_a_state_reads_a_row_at_once():
    model, params = small("transformer")
    calls = []

    def noted(params, memory, tokens, **options):
        calls.append(tuple(tokens.shape))
        return model.apply(params, memory, tokens, **options)

    make_reader(model._replace(apply=noted), piece=8, rows=2)(params, draw_tokens(3, 65))
    assert calls == [(2, 64)] * 2  # the last rows are filled up to two


def test_a_piece_is_whole_segments_and_chunks():
    config = ModelConfig()
    assert piece_length(config, 4096) % config.mac.segment == 0
    odd = ModelConfig(memory=config.memory.__class__(chunk_size=24), mac=config.mac.__class__(segment=72))
    assert piece_length(odd, 4096) == 4096 // 72 * 72
    assert piece_length(odd, 10) == 72


def test_refusals():
    with pytest.raises(ValueError, match="piece: wanted at least 1, got 0"):
        make_reader(oracle(), piece=0)
    with pytest.raises(ValueError, match=r"tokens: wanted rows of at least 2 tokens, got \(3, 1\)"):
        make_reader(oracle())(PARAMS, draw_tokens(3, 1))
