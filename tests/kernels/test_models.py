"""Whole models with kernels=triton are the same functions as with kernels=reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import titanfunc as tf
from tests.kernels.checks import BACKEND, DEVICE, GPU
from titanfunc import rng, tree
from titanfunc.train.step import loss_fn

SIZES = {
    "dim": 64, "layers": 1, "heads": 4, "ff": 64, "seq_len": 32, "vocab_size": 32,
    "memory": {"heads": 2, "head_dim": 16, "hidden": 32, "chunk_size": 16}, "mac": {"segment": 32},
}  # fmt: skip
MODELS = {
    "mac": ("mac_tiny", {"mac": {"segment": 32, "write": "input"}}),  # reads the weights of its segments' starts
    "mac_inclusive": ("mac_tiny", {"mac": {"segment": 32, "write": "input", "context": "inclusive"}}),
    "mac_attention": ("mac_tiny", {"mac": {"segment": 32, "write": "attention"}}),
    "mag": ("mag_tiny", {"window": 16}),
    "mal": ("mal_tiny", {"window": 16}),
    "lmm": ("lmm_tiny", {"layers": 2}),
    "window": ("transformer_tiny", {"window": 16}),
}


def both(name):
    """The model with either kernels, and parameters in which every part matters."""
    preset, changes = MODELS[name]
    config = tf.models.preset(preset, **{**SIZES, **changes})
    models = [tf.models.build(dataclasses.replace(config, kernels=kernels)) for kernels in ("reference", "triton")]
    params = models[0].init(rng.generator(0))
    source = torch.Generator().manual_seed(1)
    params = tree.map(lambda p: p + 0.05 * torch.randn(p.shape, generator=source), params)
    return models, tree.map(lambda p: p.to(DEVICE), params)


def draw(rows, length):
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def assert_near(got, want, tolerance):
    for (name, ours), theirs in zip(tree.named_leaves(got).items(), tree.leaves(want), strict=True):
        error = float((ours - theirs).abs().max())
        assert error <= tolerance * (1e-3 + float(theirs.abs().max())), f"{name}: off by {error:.3g}"


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_references(name):
    models, params = both(name)
    tokens = draw(2, 65 if name != "mac_attention" else 33)
    want, got = (torch.func.grad_and_value(lambda p, m=m: loss_fn(m, p, tokens)[0])(params) for m in models)
    assert abs(float(got[1] - want[1])) < 1e-5
    # 2e-6 apart on a CPU. No product is of TensorFloat-32 on a GPU either, but sums go in another order there.
    assert_near(got[0], want[0], 1e-3 if GPU else 1e-4)


@pytest.mark.parametrize("name", ["mac", "mag"])
def test_pieces_of_any_length_are_one_pass(name):
    models, params = both(name)
    tokens = draw(2, 50)
    whole = models[1].apply(params, models[1].init_memory(params, 2), tokens)[0]
    memory, parts = models[1].init_memory(params, 2), []
    for piece in tokens.split((19, 1, 30), 1):
        logits, memory = models[1].apply(params, memory, piece)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mac", "mag"])
def test_the_compiled_step_is_the_eager_one(name):
    models, params = both(name)
    tx = tf.optim.adamw(1e-3)
    step = tf.train.make_train_step(models[1], tx)
    batch = {"tokens": draw(2, 33)}
    states = [tf.train.init_state(models[1], tx, device=DEVICE)._replace(params=tree.map(torch.clone, params))] * 2
    states = [tree.map(torch.clone, state) for state in states]
    compiled = tf.train.compile_step(step, BACKEND)
    for _ in range(2):
        states[0], want = step(states[0], batch)
        states[1], got = compiled(states[1], batch)
        torch.testing.assert_close(got["loss"], want["loss"], atol=1e-5, rtol=1e-5)


def test_documents_are_refused_where_writes_know_none():
    config = tf.models.preset("lmm_tiny", **SIZES, kernels="triton")
    model = tf.models.build(config)
    params = tree.map(lambda p: p.to(DEVICE), model.init(rng.generator(0)))
    starts = torch.zeros(1, 16, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="kernels=reference takes it"):
        model.apply(params, model.init_memory(params, 1), draw(1, 16), documents=tf.memory.Documents(starts, 2))


@pytest.mark.parametrize("name", ["mac", "mal"])
def test_in_bfloat16_too(name):
    preset, changes = MODELS[name]
    config = tf.models.preset(preset, **{**SIZES, **changes, "precision": "bf16"})
    params = tree.map(lambda p: p.to(DEVICE), tf.models.build(config).init(rng.generator(0)))
    tokens = draw(2, 65)
    want, got = (
        torch.func.grad_and_value(
            lambda p, kernels=kernels: loss_fn(
                tf.models.build(dataclasses.replace(config, kernels=kernels)), p, tokens
            )[0]
        )(params)
        for kernels in ("reference", "triton")
    )
    assert abs(float(got[1] - want[1])) < 0.02
    apart, size = (tree.global_norm(t) for t in (tree.map(torch.sub, got[0], want[0]), want[0]))
    assert apart < 0.05 * size


@pytest.mark.parametrize(("name", "scaling"), [("mac", "tensor"), ("full", "tensor"), ("full", "row")])
def test_in_8_bits_as_near_to_float32_as_the_reference(name, scaling):
    """Not near to it: where a bfloat16 differs in its last bit, an 8-bit number may by a step of a sixteenth."""
    preset, changes = {**MODELS, "full": ("transformer_tiny", {})}[name]
    config = tf.models.preset(preset, **{**SIZES, **changes, "layers": 1, "precision": "fp8", "fp8_scaling": scaling})
    params = tree.map(lambda p: p.to(DEVICE), tf.models.build(config).init(rng.generator(0)))
    tokens, found = draw(2, 33), {}
    for kernels in ("reference", "triton", "exact"):
        ways = {"precision": "fp32", "fp8_scaling": "tensor"} if kernels == "exact" else {"kernels": kernels}
        model = tf.models.build(dataclasses.replace(config, **ways))
        found[kernels] = torch.func.grad_and_value(lambda p, m=model: loss_fn(m, p, tokens)[0])(params)
    exact, size = found["exact"], tree.global_norm(found["exact"][0])
    off = [tree.global_norm(tree.map(torch.sub, found[each][0], exact[0])) / size for each in ("triton", "reference")]
    assert all(abs(float(found[each][1] - exact[1])) < 0.02 for each in ("triton", "reference"))
    assert off[0] < 1.3 * off[1] and off[1] < 0.35, off
