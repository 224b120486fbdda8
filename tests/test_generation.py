"""Generation token by token against the forward pass over the whole text."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified

import titanfunc as tf
from tests.models.small import MODELS, draw_tokens, small
from titanfunc import tree
from titanfunc.generation import make_decode_step, sample


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_the_whole_forward(name):
    model, params = small(name)
    prompt = draw_tokens(2, 11)
    new = tf.generate(model, params, prompt, 14, temperature=0)
    text = torch.cat([prompt, new], 1)
    logits, _ = model.apply(params, model.init_memory(params, 2), text)
    assert torch.equal(logits[:, 10:-1].argmax(-1), new)


@pytest.mark.parametrize("name", ["attention", "input", "mal", "transformer"])
def test_a_compiled_decode_step_is_one_graph_that_draws_the_same(name, graphs):
    backend, compiled = graphs
    model, params = small(name)
    prompt, options = draw_tokens(2, 11), {"temperature": 0.9, "top_k": 9, "top_p": 0.95}
    decode = make_decode_step(model, **options, backend=backend)
    for seed in range(2):
        want, got = (
            tf.generate(model, params, prompt, 12, generator=torch.Generator().manual_seed(seed), decode=d, **options)
            for d in (None, decode)
        )
        assert torch.equal(got, want)
    assert len(compiled) == 1
    cold = make_decode_step(model, temperature=0, backend=backend)  # of the same shapes: a graph of its own
    assert torch.equal(
        tf.generate(model, params, prompt, 12, decode=cold), tf.generate(model, params, prompt, 12, temperature=0)
    )
    assert len(compiled) == 2
    with pytest.raises(ValueError, match=r"decode: wanted a step made for temperature, top_k, top_p = \(0.5, 0, 1.0\)"):
        tf.generate(model, params, prompt, 3, temperature=0.5, decode=cold)


def test_a_compiled_step_serves_batches_of_any_size_one_after_another(graphs):
    backend, compiled = graphs
    model, params = small("input")
    decode = make_decode_step(model, temperature=0, backend=backend)
    prompts = [draw_tokens(rows, 11, seed=seed) for seed, rows in enumerate((2, 3, 2, 1))] * 2
    found = [tf.generate(model, params, prompt, 12, decode=decode) for prompt in prompts]
    for prompt, new in zip(prompts, found, strict=True):
        assert torch.equal(new, tf.generate(model, params, prompt, 12, temperature=0))
    assert len(compiled) == 3


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_step_moves_on_what_it_took_alone_and_its_tokens_are_kept(backend):
    torch._dynamo.reset()
    model, params = small("input")
    decode = make_decode_step(model, temperature=0, backend=backend)
    prompt, seed = draw_tokens(2, 11), torch.tensor(0)
    logits, memory = model.apply(params, model.init_memory(params, 2), prompt, aligned=True)
    before, first = tree.map(torch.clone, memory), logits[:, -1:].argmax(-1)
    wanted = tf.generate(model, params, prompt, 12, temperature=0)
    for _ in range(2):
        moved, tokens = decode.take(memory), [first]
        places = [leaf.data_ptr() for leaf in tree.leaves(moved)]
        for _ in range(11):
            token, moved = decode.run(params, moved, tokens[-1], seed)
            tokens.append(token)
        assert torch.equal(torch.cat(tokens, 1), wanted)
        assert all(map(torch.equal, tree.leaves(memory), tree.leaves(before)))
        if backend:  # where a CUDA graph reads and writes
            assert places == [leaf.data_ptr() for leaf in tree.leaves(moved)]
            assert places == [leaf.data_ptr() for leaf in tree.leaves(decode.take(memory))]


@pytest.mark.parametrize("name", ["input", "mal"])
def test_a_compiled_step_reads_parameters_as_they_are_now_where_they_lay(name, graphs):
    backend, compiled = graphs
    model, params = small(name, precision="bf16")
    other = tree.map(lambda leaf: leaf.flip(0).clone(), params)
    prompt, decode = draw_tokens(2, 11), make_decode_step(model, temperature=0, backend=backend)
    places = []
    for given, factor in ((params, 1.0), (params, -1.5), (other, 1.0), (params, 1.0), (params, 0.5)):
        tree.map(lambda leaf, factor=factor: leaf.mul_(factor), given)
        before = tree.map(torch.clone, given)
        wanted = tf.generate(model, given, prompt, 12, temperature=0)
        assert torch.equal(tf.generate(model, given, prompt, 12, decode=decode), wanted)
        memory = model.apply(given, model.init_memory(given, 2), prompt)[1]
        read = decode.read(given, memory, prompt[:, :1])
        own = {leaf.data_ptr() for leaf in tree.leaves(given)}
        places.append([value.data_ptr() for value in read.values if value.data_ptr() not in own])
        assert all(map(torch.equal, tree.leaves(before), tree.leaves(params if given is params else other)))
    assert places[0] and all(each == places[0] for each in places)
    assert len(compiled) == 1


def test_a_token_neither_joins_nor_rounds_parameters():
    graphs = []

    def backend(graph, inputs):
        return aot_module_simplified(graph, inputs, lambda inner, _: graphs.append(inner) or inner)

    model, params = small("input", precision="bf16")
    decode = make_decode_step(model, temperature=0, backend=backend)
    for each in (decode, decode._replace(read=lambda params, memory, token: params)):
        tf.generate(model, params, draw_tokens(2, 11), 3, decode=each)
    read, whole = ([str(node.target) for node in graph.graph.nodes] for graph in graphs)
    rounded = whole.count("aten._to_copy.default") - read.count("aten._to_copy.default")
    assert rounded > 10 * model.config.layers
    assert whole.count("aten.cat.default") - read.count("aten.cat.default") >= 2 * model.config.layers


def test_a_compiled_step_takes_what_it_read_last_or_parameters():
    model, params = small("input", precision="bf16")
    decode, another = (make_decode_step(model, temperature=0, backend="aot_eager") for _ in range(2))
    token, seed = draw_tokens(2, 1), torch.tensor(0)
    memory = model.init_memory(params, 2)
    first = decode.read(params, memory, token)
    found = decode.run(first, decode.take(memory), token, seed)[0]
    assert torch.equal(found, decode.run(params, decode.take(memory), token, seed)[0])
    last = decode.read(params, memory, token)
    for step, read in ((decode, first), (another, last)):
        with pytest.raises(ValueError, match="params: wanted what this step read last, or parameters, got what was"):
            step.run(read, decode.take(memory), token, seed)
    with pytest.raises(ValueError, match="memory, token: wanted the shapes, dtypes and device that parameters were"):
        decode.run(last, decode.take(memory), token[:1], seed)
    with pytest.raises(ValueError, match=r"params\['extra'\]: wanted a tensor, got float"):
        decode.read({**params, "extra": 1.0}, memory, token)


def test_a_compiled_step_keeps_no_parameters():
    model, params = small("input")
    decode = make_decode_step(model, temperature=0, backend="aot_eager")
    tf.generate(model, params, draw_tokens(2, 11), 4, decode=decode)
    kept = [weakref.ref(leaf) for leaf in tree.leaves(params)]
    del params
    gc.collect()
    assert not any(leaf() is not None for leaf in kept)


def in_place(weights, x):
    """What a module may do: results written in parts, and changed."""
    y = x @ weights["w"]
    out = torch.zeros_like(y)
    out[..., :3] = y[..., :3]
    out[..., 3:] = 2 * y[..., 3:]
    out[..., 0].add_(1.0)
    return out


def test_a_memory_that_writes_in_place_and_parameters_that_are_one_tensor():
    config = small("input")[0].config
    size = config.memory.head_dim
    net = tf.memory.MemoryNet(
        lambda generator, heads: {"w": 0.1 * torch.randn(heads, size, size, generator=generator)}, in_place
    )
    model = tf.models.build(config, net)
    params = model.init(torch.Generator().manual_seed(0))
    tied = {**params, "blocks": {**params["blocks"], "norm_memory": params["blocks"]["norm_attention"]}}
    decode, prompt = make_decode_step(model, temperature=0, backend="aot_eager"), draw_tokens(2, 6)
    untied = tree.map(torch.clone, tied)
    untied["blocks"]["norm_memory"].mul_(-2.0)
    for given in (tied, untied):
        wanted, token = model.apply(given, model.init_memory(given, 2), prompt[:, :-1])[1], prompt[:, -1:]
        read, found = decode.read(given, wanted, token), decode.take(wanted)
        for _ in range(3):
            wanted = model.apply(given, wanted, token)[1]
            found = decode.run(read, found, token, torch.tensor(0))[1]
        for got, want in zip(tree.leaves(found), tree.leaves(wanted), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_inference_mode_may_come_and_go(backend):
    model, params = small("input")
    decode, prompt = make_decode_step(model, temperature=0, backend=backend), draw_tokens(2, 11)
    wanted = tf.generate(model, params, prompt, 6, temperature=0)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            given = tree.map(torch.clone, params)
            assert torch.equal(tf.generate(model, given, prompt.clone(), 6, decode=decode), wanted)


def test_draws_depend_on_the_generator_alone_and_keep_to_top_k_and_top_p():
    model, params = small()
    prompt = draw_tokens(1, 5)

    def draw(seed, **options):
        return tf.generate(model, params, prompt, 30, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    greedy = tf.generate(model, params, prompt, 30, temperature=0)
    assert torch.equal(draw(1, top_k=1), greedy)
    assert torch.equal(draw(1, top_p=1e-6), greedy)


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    many = sample(logits.expand(40_000, 4), torch.tensor(3), 0.7, 0, 1.0)
    shares = torch.bincount(many.flatten(), minlength=4) / len(many)
    torch.testing.assert_close(shares, (logits / 0.7).softmax(0), rtol=0, atol=0.01)
    kept = sample(logits.expand(2_000, 4), torch.tensor(4), 1.0, 2, 1.0)
    assert set(kept.flatten().tolist()) == {1, 2}
    assert set(sample(logits.expand(2_000, 4), torch.tensor(4), 1.0, 0, 0.9).flatten().tolist()) == {0, 1, 2}


def test_the_ends_of_the_draws_take_no_token_that_is_not_likely(monkeypatch):
    logits = torch.full((1, 4), -50.0)
    logits[0, 2] = 50.0
    for bits in (0, -1):
        monkeypatch.setattr(tf.rng, "_bits", lambda seed, shape, *_, bits=bits: torch.full(shape, bits))
        assert torch.isfinite(tf.rng.gumbel(torch.tensor(0), (3,))).all()
    monkeypatch.undo()
    monkeypatch.setattr(tf.rng, "_bits", lambda seed, shape, *_: (torch.arange(shape[1]) % 2 - 1).expand(shape))
    assert sample(logits, torch.tensor(0), 1.0, 1, 1.0).item() == 2
    assert sample(logits, torch.tensor(0), 1.0, 0, 0.9).item() == 2


def test_rows_end_at_the_stop_token():
    model, params = small()
    prompt = draw_tokens(3, 5)
    free = tf.generate(model, params, prompt, 40, temperature=0)
    stop = int(free[0, 2])
    ended = tf.generate(model, params, prompt, 40, temperature=0, stop_token=stop)
    lengths = []
    for row, whole in zip(ended, free, strict=True):
        places = (whole == stop).nonzero().flatten()
        length = int(places[0]) + 1 if len(places) else 40
        lengths.append(length)
        assert torch.equal(row[:length], whole[: min(length, len(row))]) and (row[length:] == stop).all()
    assert ended.shape[1] == max(lengths) and min(lengths) <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: wanted at least 1"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"temperature": 1.0}, "generator: wanted a torch.Generator"),
        ({"stop_token": 17}, "stop_token: wanted a token from 0 to 16, got 17"),
    ],
)
def test_bad_arguments_are_named(options, message):
    model, params = small()
    arguments = {"max_new_tokens": 3, "temperature": 0, **options}
    with pytest.raises(ValueError, match=message):
        tf.generate(model, params, draw_tokens(1, 4), **arguments)
