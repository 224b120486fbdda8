"""precision=fp8: the same models, trained nearly as well, with 8-bit products where they are said to be."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import titanfunc as tf
from tests.memory.problems import assert_same_tree
from titanfunc import rng, tree
from titanfunc.config import PRESETS, ModelConfig
from titanfunc.device import require_kernels_run
from titanfunc.models import base
from titanfunc.ops.fp8 import linear_fp8
from titanfunc.train.step import loss_fn

SIZES = {"dim": 32, "layers": 2, "heads": 2, "ff": 48, "vocab_size": 32, "seq_len": 32}
MEMORY = {"heads": 2, "head_dim": 16, "hidden": 16, "chunk_size": 8}
PRODUCTS = {"mac": {(32, 96), (32, 64), (32, 32)}, "mag": {(32, 96), (32, 32)}, "lmm": set(),
            "transformer": {(32, 96), (32, 32)}}  # fmt: skip
"""Attention's weights, D_in by D_out, of each family."""


def config_of(family, **changes):
    sizes = {**SIZES, "memory": MEMORY} if family != "transformer" else SIZES
    own = {"mac": {"mac": {"segment": 16, "write": "input"}}, "mag": {"window": 8}}.get(family, {})
    return tf.models.preset(f"{family}_tiny", **{**sizes, **own, "precision": "fp8", **changes})


def params_of(config):
    source = torch.Generator().manual_seed(1)
    params = tf.models.build(config).init(rng.generator(0))
    return tree.map(lambda p: p + 0.02 * torch.randn(p.shape, generator=source), params)


def draw(rows, length, seed=2):
    """Rows that count up from somewhere: learned in a few steps."""
    first = torch.randint(32, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (first + torch.arange(length)) % 32


@pytest.mark.parametrize(
    ("family", "feed_forward"),
    [(family, feed) for family in PRODUCTS for feed in ("swiglu", "cms", "moe") if (family, feed) != ("lmm", "moe")],
)
def test_attention_and_feed_forward_are_multiplied_in_8_bits_and_nothing_else_is(monkeypatch, family, feed_forward):
    seen = []

    def watched(weight, x, dtype, **options):
        seen.append((tuple(weight.shape), options))
        return linear_fp8(weight, x, dtype, **options)

    monkeypatch.setattr(base, "linear_fp8", watched)
    config = config_of(family, feed_forward=feed_forward, fp8_scaling="row")
    model = tf.models.build(config)
    logits, *_ = model.apply(params := params_of(config), model.init_memory(params, 2), draw(2, 32))
    feeds = {"swiglu": {(32, 96), (48, 32)}, "cms": {(32, 32), (16, 32)}, "moe": set()}[feed_forward]
    assert {shape for shape, _ in seen} == PRODUCTS[family] | feeds
    assert all(options == {"scaling": "row", "kernels": "reference"} for _, options in seen)
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("family", PRODUCTS)
def test_loss_and_gradients_are_near_those_of_float32(family, scaling):
    tokens, found = draw(4, 33), {}
    for precision, more in (("fp32", {}), ("bf16", {}), ("fp8", {"fp8_scaling": scaling})):
        config = config_of(family, precision=precision, **more)
        model, params = tf.models.build(config), params_of(config)
        found[precision] = torch.func.grad_and_value(lambda p, m=model: loss_fn(m, p, tokens)[0])(params)
    assert abs(float(found["fp8"][1] - found["fp32"][1])) < 0.02
    off = {
        precision: tree.global_norm(tree.map(torch.sub, found[precision][0], found["fp32"][0]))
        / tree.global_norm(found["fp32"][0])
        for precision in ("bf16", "fp8")
    }
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(found["fp8"][0]))
    assert off["bf16"] < off["fp8"] < 16 * off["bf16"] < 0.4  # e4m3 has four bits fewer


@pytest.mark.parametrize("family", ["mac", "transformer"])
def test_training_follows_bfloat16(family):
    losses = {}
    for precision in ("bf16", "fp8"):
        model, tx = tf.models.build(config_of(family, precision=precision)), tf.optim.adamw(1e-2)
        step, state = tf.train.make_train_step(model, tx), tf.train.init_state(model, tx)
        losses[precision] = []
        for i in range(20):
            state, metrics = step(state, {"tokens": draw(8, 33, seed=i)})
            losses[precision].append(float(metrics["loss"]))
    first, last = losses["bf16"][0], losses["bf16"][-1]
    assert last < 0.5 * first
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) < 0.05 * (first - last)
    assert losses["bf16"] != losses["fp8"]


@pytest.mark.parametrize("family", ["mac", "mag"])
def test_the_compiled_step_is_one_graph_that_equals_eager(family):
    model, tx = tf.models.build(config_of(family, layers=1)), tf.optim.adamw(1e-3)
    step = tf.train.make_train_step(model, tx)
    compiled = tf.train.compile_step(step, "aot_eager")
    eager, donated = tf.train.init_state(model, tx), tf.train.init_state(model, tx)
    for i in range(2):
        batch = {"tokens": draw(2, 33, seed=i)}
        eager, want = step(eager, batch)
        donated, got = compiled(donated, batch)
        assert_same_tree(got, want, rtol=1e-3, atol=1e-3)


def test_a_token_is_read_alone_by_row():
    """With scales by row what comes later changes nothing; with one scale a tensor it may."""
    tokens = draw(1, 16)
    later = torch.cat([tokens[:, :8], 31 - tokens[:, 8:]], 1)
    apart = {}
    for scaling in ("tensor", "row"):
        config = config_of("transformer", fp8_scaling=scaling)
        model, params = tf.models.build(config), params_of(config)
        params["embedding"] = params["embedding"] * torch.linspace(0.1, 3, 32).unsqueeze(-1)
        ours, theirs = (model.apply(params, (), each)[0][:, :8].float() for each in (tokens, later))
        apart[scaling] = float((ours - theirs).abs().max())
    assert apart["row"] == 0 < apart["tensor"]


def test_every_preset_takes_it_with_kernels():
    for name, config in PRESETS.items():
        if (name.startswith("lmm") and name.endswith("moe")) or "760m" in name or "170m" in name:
            continue  # no such product; heads of 96 and 48 features, which attention's kernels refuse
        assert dataclasses.replace(config, precision="fp8", kernels="triton").precision == "fp8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp8_scaling": "block"}, "fp8_scaling: wanted one of tensor, row, got 'block'"),
        ({"precision": "bf16", "fp8_scaling": "row"}, "fp8_scaling: wanted its default: without precision=fp8"),
        ({"family": "lmm", "persistent": 0, "feed_forward": "moe"}, "precision: wanted fp32 or bf16: an lmm has no"),
        ({"kernels": "triton", "dim": 120}, "dim: wanted a multiple of 16, for fp8, with kernels=triton, got 120"),
        ({"kernels": "triton", "ff": 40}, "ff: wanted a multiple of 16, for fp8, with kernels=triton, got 40"),
        ({"kernels": "triton", "ff": 64, "feed_forward": "cms"}, "ff: wanted a multiple of 48, for fp8, with kernels"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"precision": "fp8", **changes})


@pytest.mark.parametrize(
    ("capability", "scaling", "needs"),
    [((9, 0), "row", ""), ((8, 9), "tensor", ""), ((8, 9), "row", "9.0, as fp8_scaling=row"),
     ((10, 0), "row", "9.0, as fp8_scaling=row"), ((8, 0), "tensor", "8.9 or more")],
)  # fmt: skip
def test_a_gpu_without_these_products_is_refused_before_any_work(monkeypatch, capability, scaling, needs):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = ModelConfig(precision="fp8", fp8_scaling=scaling, kernels="triton")
    device = torch.device("cuda", 0)
    require_kernels_run(dataclasses.replace(config, kernels="reference"), device)
    if not needs:
        require_kernels_run(config, device)
        return
    with pytest.raises(ValueError, match=rf"^model.kernels: wanted reference with precision=fp8 on cuda:0 .*{needs}"):
        require_kernels_run(config, device)
