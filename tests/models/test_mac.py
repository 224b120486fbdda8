"""What must hold of both MAC orders, and of the transformer where it applies."""

from __future__ import annotations

import math

import pytest
import torch

import titanfunc as tf
from tests.memory.problems import assert_same_tree
from tests.models.small import ORDERS, VOCAB, draw_tokens, small
from titanfunc import tree

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"persistent": 0},
        {
            "memory": {
                "heads": 1,
                "head_dim": 4,
                "hidden": 6,
                "conv_width": 0,
                "bias": True,
                "depth": 3,
                "chunk_size": 8,
            }
        },
    ],
)
@pytest.mark.parametrize("length", [27, 5])
def test_pieces_equal_one_pass(order, changes, length):
    model, params = small(order, **changes)
    tokens = draw_tokens(3, length)
    start = model.init_memory(params, 3)
    want, want_memory = model.apply(params, start, tokens, aligned=True)
    for pieces in [(length,), (1,) * length, (2, length - 2), (3, 1, length - 4), (length - 1, 1)]:
        memory, outputs = start, []
        for part in tokens.split(pieces, 1):
            logits, memory = model.apply(params, memory, part)
            outputs.append(logits)
        torch.testing.assert_close(torch.cat(outputs, 1), want, **CLOSE)
        assert_same_tree(memory, want_memory)


@pytest.mark.parametrize("order", ORDERS)
def test_samples_may_stand_at_different_places(order):
    model, params = small(order)
    tokens = draw_tokens(2, 30)
    alone = [model.apply(params, model.init_memory(params, 1), tokens[i : i + 1])[0] for i in range(2)]
    memories = [
        model.apply(params, model.init_memory(params, 1), tokens[i : i + 1, :start])[1]
        for i, start in enumerate((5, 11))
    ]
    memory = tree.map(lambda a, b: torch.cat([a, b]), *memories)
    rest = torch.stack([tokens[0, 5:20], tokens[1, 11:26]])
    logits, _ = model.apply(params, memory, rest)
    torch.testing.assert_close(logits[0], alone[0][0, 5:20], **CLOSE)
    torch.testing.assert_close(logits[1], alone[1][0, 11:26], **CLOSE)


@pytest.mark.parametrize("order", [*ORDERS, "transformer"])
@pytest.mark.parametrize("aligned", [False, True])
def test_logits_before_a_changed_token_are_bit_equal(order, aligned):
    model, params = small(order)
    params = tree.map(lambda leaf: leaf.float(), params)
    tokens = draw_tokens(3, 30)
    memory = model.init_memory(params, 3)
    before, _ = model.apply(params, memory, tokens, aligned=aligned)
    for place in (0, 7, 8, 13, 29):
        changed = tokens.clone()
        changed[1, place] = (changed[1, place] + 1) % VOCAB
        after, _ = model.apply(params, memory, changed, aligned=aligned)
        assert torch.equal(after[1, :place], before[1, :place])
        assert torch.equal(after[[0, 2]], before[[0, 2]])  # no other sample
        assert (after[1, place:] != before[1, place:]).any(-1).all()  # and everything after does change


@pytest.mark.parametrize("order", ORDERS)
def test_the_memory_reaches_further_than_the_segment(order):
    # With forgetting and attention blind to earlier segments, only the memory can carry token 0 to token 29.
    model, params = small(order)
    tokens = draw_tokens(1, 30)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCAB
    memory = model.init_memory(params, 1)
    far = [model.apply(params, memory, t, aligned=True)[0][0, -1] for t in (tokens, changed)]
    assert not torch.equal(*far)
    blocks = params["blocks"]
    silent = {
        **blocks["memory"],
        "context_out": 0 * blocks["memory"]["context_out"],
        "gate_out": 0 * blocks["memory"]["gate_out"],
    }
    params = {**params, "blocks": {**blocks, "memory": silent}}
    off = [model.apply(params, memory, t, aligned=True)[0][0, -1] for t in (tokens, changed)]
    assert torch.equal(*off)


@pytest.mark.parametrize("order", [*ORDERS, "transformer"])
def test_every_parameter_of_every_layer_gets_a_gradient(order):
    model, params = small(order, tie_embeddings=False)
    tokens = draw_tokens(4, 29)
    grads = torch.func.grad(lambda p: tf.train.loss_fn(model, p, tokens)[0])(params)
    for name, leaf in tree.named_leaves(grads).items():
        rows = leaf if name.startswith("blocks") else leaf[None]
        assert torch.isfinite(leaf).all(), name
        assert all(row.abs().max() > 0 for row in rows), name


@pytest.mark.parametrize("order", [*ORDERS, "transformer"])
def test_nothing_is_learned_from_uniform_tokens(order):
    # A model that could see a token before predicting it would fall below log V within these steps.
    model, _ = small(order)
    tx = tf.optim.adamw(1e-2)
    state = tf.train.init_state(model, tx)
    step = tf.train.make_train_step(model, tx)
    losses = []
    for i in range(60):
        state, metrics = step(state, {"tokens": draw_tokens(16, 25, seed=i)})
        losses.append(metrics["loss"].item())
    held_out = tf.train.make_eval_step(model)(state.params, {"tokens": draw_tokens(256, 25, seed=1000)}).item()
    assert held_out >= math.log(VOCAB) - 1e-3
    assert min(losses) > math.log(VOCAB) - 0.02  # a batch of 384 tokens may be lucky by a little


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("trained", [False, True])
def test_65536_tokens_stay_finite_in_bf16_and_constant_memory(order, trained):
    model, _ = small(order, precision="bf16", mac={"segment": 128, "write": order}, memory={"chunk_size": 32})
    tx = tf.optim.adamw(1e-2)
    state = tf.train.init_state(model, tx)
    step = tf.train.make_train_step(model, tx)
    for i in range(20 if trained else 0):
        state, metrics = step(state, {"tokens": draw_tokens(8, 129, seed=i).sort(1).values})
        assert metrics["skipped"].item() == 0
    memory = model.init_memory(state.params, 1)
    sizes = tree.map(lambda leaf: leaf.shape, memory)
    with torch.no_grad():
        for part in draw_tokens(1, 65_536).split(8192, 1):
            logits, memory = model.apply(state.params, memory, part, aligned=True)
            assert torch.isfinite(logits).all()
    assert tree.map(lambda leaf: leaf.shape, memory) == sizes
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(memory) if leaf.is_floating_point())


@pytest.mark.parametrize("order", ORDERS)
def test_softmax_attention_equals_the_fused_one(order):
    model, params = small(order)
    plain, _ = small(order, attention="softmax")
    tokens = draw_tokens(2, 20)
    memory = model.init_memory(params, 2)
    torch.testing.assert_close(model.apply(params, memory, tokens)[0], plain.apply(params, memory, tokens)[0], **CLOSE)


def test_a_window_is_exact():
    model, params = small("transformer", window=4, layers=1)
    tokens = draw_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % VOCAB
    a, b = (model.apply(params, (), t)[0][0] for t in (tokens, changed))
    differs = (a != b).any(-1).tolist()
    assert differs == [False] * 3 + [True] * 4 + [False] * 5


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(2, 0, dtype=torch.int64)]
)
@pytest.mark.parametrize("order", ["attention", "transformer"])
def test_tokens_of_another_shape_are_refused(order, bad):
    model, params = small(order)
    with pytest.raises(ValueError, match="tokens: wanted int64"):
        model.apply(params, model.init_memory(params, 2), bad)


def test_a_memory_of_another_model_or_batch_is_refused():
    model, params = small()
    memory = model.init_memory(params, 2)
    with pytest.raises(ValueError, match="memory: wanted a state for each of 2 layers, got 0"):
        model.apply(params, (), draw_tokens(2, 5))
    with pytest.raises(ValueError, match="memory: wanted states of 3 samples, got 2"):
        model.apply(params, memory, draw_tokens(3, 5))
