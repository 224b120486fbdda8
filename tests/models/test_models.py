"""What must hold of every model, with every write rule and depth of memory."""

from __future__ import annotations

import math

import pytest
import torch

import titanfunc as tf
from tests.memory.problems import assert_same_tree
from tests.models.small import MACS, MEMORIES, MEMORY, MODELS, ORDERS, VOCAB, draw_tokens, small
from titanfunc import tree

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
RULES = {
    "token": {},
    "mean": {"loss": "mean"},
    "huber": {"objective": "huber", "parameter": 0.3},
    "lp": {"objective": "lp"},
    "chunk": {"write": "chunk"},
    "chunk_clip": {"write": "chunk", "objective": "huber", "chunk_clip": 0.5},
    "muon": {"write": "chunk", "optimizer": "muon"},
}
STREAMS = [name for name in MODELS if name != "transformer"]  # which, without a window, reads a whole context at once


def ruled(name: str, rule: str, depth: int, **changes):
    """A small model whose memory has ``depth`` layers, with biases at depth 3, and writes by one of RULES."""
    memory = {**MEMORY, "depth": depth, "bias": depth == 3, "rule": RULES[rule]}
    return small(name, memory=memory, **changes)


def in_pieces(model, params, memory, tokens, pieces):
    outputs = []
    for part in tokens.split(pieces, 1):
        logits, memory = model.apply(params, memory, part)
        outputs.append(logits)
    return torch.cat(outputs, 1), memory


def assert_causal(model, params, tokens, places, **keywords):
    """Logits before a changed token, and all of other samples, are bit-equal; logits after it are not."""
    params = tree.map(lambda leaf: leaf.float(), params)
    memory = model.init_memory(params, tokens.shape[0])
    before, _ = model.apply(params, memory, tokens, **keywords)
    for place in places:
        changed = tokens.clone()
        changed[1, place] = (changed[1, place] + 1) % VOCAB
        after, _ = model.apply(params, memory, changed, **keywords)
        assert torch.equal(after[1, :place], before[1, :place])
        assert torch.equal(after[[0, 2]], before[[0, 2]])  # no other sample
        assert (after[1, place] != before[1, place]).any()
        yield (after[1, place:] != before[1, place:]).any(-1)


def assert_every_leaf_learns(model, params, tokens, without=(), leave_out="nothing"):
    grads = torch.func.grad(lambda p: tf.train.loss_fn(model, p, tokens)[0])(params)
    for name, leaf in tree.named_leaves(grads).items():
        assert torch.isfinite(leaf).all(), name
        if name.startswith(leave_out):
            continue
        for row in leaf if name.startswith("blocks") else leaf[None]:
            assert (row.abs().max() > 0) != any(name.startswith(f"blocks.{part}") for part in without), name


# All models read and write a memory of any depth by the same calls: two show all depths (and tests/memory every one).
@pytest.mark.parametrize(
    ("name", "depth"),
    [*((name, 2) for name in MEMORIES), *((name, n) for name in ("attention", "mag") for n in (1, 3))],
)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_in_every_model(name, rule, depth):
    model, params = ruled(name, rule, depth, tie_embeddings=False)
    tokens = draw_tokens(3, 27)
    memory = model.init_memory(params, 3)
    want, want_memory = model.apply(params, memory, tokens, aligned=True)
    for pieces in [(27,), (2, 25), (3, 1, 1, 22), (13, 14)]:
        got, got_memory = in_pieces(model, params, memory, tokens, pieces)
        torch.testing.assert_close(got, want, **CLOSE)
        assert_same_tree(got_memory, want_memory)
    for aligned in (True, False):
        list(assert_causal(model, params, tokens, (7, 13), aligned=aligned))
    assert_every_leaf_learns(model, params, tokens)


ANY = [{}, {"persistent": 0}, {"feed_forward": "moe"}, {"feed_forward": "cms"}]
WITH_MEMORY = [{"memory_layers": (1,)}, {"memory": {**MEMORY, "conv_width": 0, "heads": 1, "chunk_size": 8}}]


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name in STREAMS for changes in (ANY if name == "window" else ANY + WITH_MEMORY)],
)
@pytest.mark.parametrize("length", [27, 5])
def test_pieces_equal_one_pass(name, changes, length):
    model, params = small(name, **changes)
    tokens = draw_tokens(3, length)
    start = model.init_memory(params, 3)
    want, want_memory = model.apply(params, start, tokens, aligned=True)
    for pieces in [(length,), (1,) * length, (2, length - 2), (3, 1, length - 4), (length - 1, 1)]:
        got, memory = in_pieces(model, params, start, tokens, pieces)
        torch.testing.assert_close(got, want, **CLOSE)
        assert_same_tree(memory, want_memory)


@pytest.mark.parametrize("name", STREAMS)
def test_samples_may_stand_at_different_places(name):
    model, params = small(name)
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


@pytest.mark.parametrize("feed_forward", ["swiglu", "moe", "cms"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("aligned", [False, True])
def test_logits_before_a_changed_token_are_bit_equal(name, aligned, feed_forward):
    model, params = small(name, feed_forward=feed_forward)
    for changed in assert_causal(model, params, draw_tokens(3, 30), (0, 7, 8, 13, 29), aligned=aligned):
        reach = 9 if name == "window" else len(changed)  # two layers of 5 tokens
        assert changed[:reach].all() and (name != "window" or not changed[reach:].any())


@pytest.mark.parametrize("name", MEMORIES)
def test_the_memory_reaches_further_than_attention_and_writes_can_be_turned_off(name):
    # Attention reaches 8 tokens at most in each of the two layers: only a memory carries token 0 to token 29.
    model, params = small(name)
    tokens = draw_tokens(1, 30)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCAB
    memory = model.init_memory(params, 1)
    far = [model.apply(params, memory, t, aligned=True)[0][0, -1] for t in (tokens, changed)]
    assert not torch.equal(*far)
    ends = [model.apply(params, memory, t, aligned=True, write=False) for t in (tokens, changed)]
    assert torch.equal(*(logits[0, -1] for logits, _ in ends))
    for block, first in zip(ends[0][1], memory, strict=True):
        held, fresh = (getattr(each.memory, "memory", each.memory) for each in (block, first))
        torch.testing.assert_close(held.weights, fresh.weights, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["token", "chunk", "muon"])
@pytest.mark.parametrize("name", MEMORIES)
def test_without_writes_a_memory_stays_what_it_was(name, rule):
    model, params = ruled(name, rule, 2)
    _, memory = model.apply(params, model.init_memory(params, 2), draw_tokens(2, 14), aligned=True)
    _, after = model.apply(params, memory, draw_tokens(2, 21, seed=1), write=False)
    for block, held in zip(after, memory, strict=True):
        new, old = (getattr(each.memory, "memory", each.memory) for each in (block, held))
        for a, b in zip(tree.leaves((new[:3], new.pending)), tree.leaves((old[:3], old.pending)), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(new.position, (old.position + 21) % 4)


@pytest.mark.parametrize("feed_forward", ["swiglu", "moe", "cms"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_every_layer_gets_a_gradient(name, feed_forward):
    model, params = small(name, tie_embeddings=False, feed_forward=feed_forward)
    assert_every_leaf_learns(model, params, draw_tokens(4, 29))


@pytest.mark.parametrize("name", MEMORIES)
def test_what_the_outer_gradient_sees_is_an_option(name):
    def learning(outer_gradient):
        return small(name, memory={**MEMORY, "rule": {"outer_gradient": outer_gradient}})

    tokens = draw_tokens(4, 29)
    model, params = learning("full")
    logits, _ = model.apply(params, model.init_memory(params, 4), tokens)
    for option, still in [
        ("first_order", ["wk", "wv", "taps.k", "taps.v"]),
        ("none", ["wk", "wv", "taps.k", "taps.v", "gates", "initial"]),
    ]:
        model, params = learning(option)
        torch.testing.assert_close(model.apply(params, model.init_memory(params, 4), tokens)[0], logits, **CLOSE)
        # A MAC's first segment reads the first weights themselves, before anything is written.
        leave_out = "blocks.memory.initial" if name in MACS else "nothing"
        assert_every_leaf_learns(model, params, tokens, [f"memory.{part}" for part in still], leave_out)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_learned_from_uniform_tokens(name):
    # A model that could see a token before predicting it would fall below log V within these steps.
    model, _ = small(name)
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


LONG = {
    **{order: {"mac": {"segment": 128, "write": order}} for order in ORDERS},
    "inclusive": {"mac": {"segment": 128, "write": "input", "context": "inclusive"}},
    **{name: {"window": 64} for name in ("mag", "mal", "window")},
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("trained", [False, True])
def test_65536_tokens_stay_finite_in_bf16_and_constant_memory(name, trained):
    memory = {} if name == "window" else {"memory": {**MEMORY, "chunk_size": 32}}
    model, _ = small(name, precision="bf16", **memory, **LONG.get(name, {}))
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


@pytest.mark.parametrize("name", MODELS)
def test_softmax_attention_equals_the_fused_one(name):
    model, params = small(name)
    plain, _ = small(name, attention="softmax")
    tokens = draw_tokens(2, 20)
    memory = model.init_memory(params, 2)
    torch.testing.assert_close(model.apply(params, memory, tokens)[0], plain.apply(params, memory, tokens)[0], **CLOSE)


@pytest.mark.parametrize("length", [12, 3, 5])
def test_a_window_is_exact(length):
    model, params = small("window", window=4, layers=1)
    tokens = draw_tokens(1, length)
    changed = tokens.clone()
    changed[0, 1] = (changed[0, 1] + 1) % VOCAB
    memory = model.init_memory(params, 1)
    a, b = (model.apply(params, memory, t)[0][0] for t in (tokens, changed))
    assert (a != b).any(-1).tolist() == ([False] + [True] * 4 + [False] * 7)[:length]


def test_a_window_as_long_as_the_text_equals_full_attention():
    model, params = small("transformer")
    tokens = draw_tokens(2, 20)
    want, none = model.apply(params, (), tokens)
    assert none == ()
    for context in (20, 33):
        memory = model.init_memory(params, 2, context=context)
        for pieces in [(20,), (7, 1, 12)]:
            got, _ = in_pieces(model, params, memory, tokens, pieces)
            torch.testing.assert_close(got, want, **CLOSE)
    with pytest.raises(ValueError, match="context: wanted 0"):
        small("window")[0].init_memory(params, 2, context=8)


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(2, 0, dtype=torch.int64)]
)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_another_shape_are_refused(name, bad):
    model, params = small(name)
    with pytest.raises(ValueError, match="tokens: wanted int64"):
        model.apply(params, model.init_memory(params, 2), bad)


def test_a_memory_of_another_model_or_batch_is_refused():
    model, params = small()
    memory = model.init_memory(params, 2)
    with pytest.raises(ValueError, match="memory: wanted a state for each of 2 layers, got 0"):
        model.apply(params, (), draw_tokens(2, 5))
    with pytest.raises(ValueError, match="memory: wanted states of 3 samples, got 2"):
        model.apply(params, memory, draw_tokens(3, 5))


def test_a_users_own_network_is_a_memory():
    module = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 6))
    net = tf.memory.from_module(module)
    tokens = draw_tokens(3, 13)
    for name in MEMORIES:
        for rule in ({}, {"write": "chunk"}):
            config = small(name, memory={**MEMORY, "rule": rule}, tie_embeddings=False)[0].config
            model = tf.models.build(config, net)
            params = tree.map(torch.Tensor.double, model.init(torch.Generator().manual_seed(0)))
            assert set(params["blocks"]["memory"]["initial"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
            memory = model.init_memory(params, 3)
            want, _ = model.apply(params, memory, tokens, aligned=True)
            torch.testing.assert_close(in_pieces(model, params, memory, tokens, (2, 1, 10))[0], want, **CLOSE)
            assert_every_leaf_learns(model, params, tokens)


@pytest.mark.parametrize(("features", "message"), [((5, 5), "got one that says"), ((6, 1), r"got results \(2, 1\)")])
def test_a_network_of_another_size_is_refused(features, message):
    net = tf.memory.from_module(torch.nn.Linear(*features))
    with pytest.raises(ValueError, match=rf"net: wanted a network of \[N, 6\] -> \[N, 6\].*{message}"):
        tf.models.build(small("lmm")[0].config, net)
