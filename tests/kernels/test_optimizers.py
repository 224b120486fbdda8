"""Optimizers with kernels=triton take the steps that they take with kernels=reference, and have the same gradients."""

from __future__ import annotations

from unittest import mock

import pytest
import titanfunc_kernels.learned_mlp
import titanfunc_kernels.symmetric
import torch

import titanfunc as tf
from tests.kernels.checks import BACKEND, DEVICE, draw
from tests.memory.problems import assert_same_tree
from tests.optim.nested import problems
from titanfunc import rng, tree
from titanfunc.config import OptimConfig
from titanfunc.device import require_optimizer_runs
from titanfunc.ops.learned_mlp import HIDDEN
from titanfunc.optim.learned import init_small_fc_lopt, small_fc_lopt, with_network

KERNELS = ("reference", "triton")
SOURCES = {
    "muon": (titanfunc_kernels.symmetric, "symmetric"),
    "small_fc_lopt": (titanfunc_kernels.learned_mlp, "learned_mlp"),
}
CONFIGS = {
    "muon": OptimConfig(name="muon", lr=0.02, warmup_steps=0, kernels="triton"),
    "nested": OptimConfig(name="nested", lr=0.02, warmup_steps=0, kernels="triton"),
    "small_fc_lopt": OptimConfig(name="small_fc_lopt", lr=1.0, weight_decay=0.1, warmup_steps=0, kernels="triton"),
}


def leaves(seed=0, scale=1.0):
    """Hidden matrices of two shapes, one the other's transpose, some vectors, an embedding."""
    return {
        "embedding": draw(9, 12, seed=seed, scale=scale),
        "blocks": {
            "attention": {"wq": draw(2, 12, 18, seed=seed + 1, scale=scale)},
            "feed_forward": {"down": draw(2, 18, 12, seed=seed + 2, scale=scale)},
            "norm_attention": draw(2, 12, seed=seed + 3, scale=scale),
        },
    }


def make(name, kernels):
    if name == "muon":
        return tf.optim.muon(0.02, dtype=torch.float32, kernels=kernels)
    network = init_small_fc_lopt(rng.generator(0), 4)
    return small_fc_lopt(tree.map(lambda w: w + 0.1 * draw(*w.shape, seed=w.numel()).cpu(), network), kernels=kernels)


def end(tx, params, steps=2, state=None, first=None):
    """The parameters after a few updates; first: the gradient of the first one."""
    state = tx.init(params) if state is None else state
    for i in range(steps):
        grads = first if first is not None and i == 0 else leaves(10 * (i + 1), 0.1)
        updates, state = tx.update(grads, state, params, loss=torch.tensor(1.0))
        params = tf.optim.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", SOURCES)
def test_steps_are_the_references(name):
    want, got = (end(make(name, kernels), leaves(), 3) for kernels in KERNELS)
    assert_same_tree(got, want, rtol=1e-4, atol=1e-5)
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in zip(*map(tree.leaves, (got, leaves())), strict=True))


@pytest.mark.parametrize("name", SOURCES)
def test_gradients_through_two_steps_are_the_references(name):
    """By the gradient that the first one was given, as an unrolled inner loop has them."""

    def outcome(first, tx):
        return sum((leaf.sin() * leaf).sum() for leaf in tree.leaves(end(tx, leaves(), first=first)))

    want, got = (torch.func.grad(outcome)(leaves(10, 0.1), make(name, kernels)) for kernels in KERNELS)
    scale = max(float(leaf.abs().max()) for leaf in tree.leaves(want))
    assert scale > 1e-3
    assert_same_tree(got, want, rtol=1e-3, atol=1e-3 * scale)


def test_the_learned_networks_gradients_are_the_references():
    def outcome(network, tx):
        state = with_network(tx.init(leaves()), network)
        return sum((leaf.sin() * leaf).sum() for leaf in tree.leaves(end(tx, leaves(), 2, state)))

    network = tree.map(lambda w: w.to(DEVICE), init_small_fc_lopt(rng.generator(3), 4))
    want, got = (torch.func.grad(outcome)(network, make("small_fc_lopt", kernels)) for kernels in KERNELS)
    for theirs, ours in zip(tree.leaves(want), tree.leaves(got), strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    assert all((leaf != 0).any() for leaf in tree.leaves(want))


@pytest.mark.parametrize("options", [{}, {"unroll": "exact", "k_unroll": 2}, {"mode": "implicit"}], ids=str)
def test_a_nested_optimizer_learns_as_with_the_reference(monkeypatch, options):
    seen, gradients = problems.spy(monkeypatch), []

    def single(tree_):
        return tree.map(lambda leaf: leaf.float().to(DEVICE), tree_)

    for kernels in KERNELS:
        base = tf.optim.muon(0.05, 0.02, dtype=None, kernels=kernels)
        tx = tf.optim.nested(base, meta_lr=1e-9, momentum="l2_regression", **options)
        params, state = map(single, problems.start(tx))
        held_out = {"held_out": tf.optim.HeldOut(problems.objective, [single(problems.batch(i)) for i in (3, 4)])}
        for i in range(2):
            grads, loss = torch.func.grad_and_value(problems.objective)(params, single(problems.batch(i)))
            updates, state = tx.update(grads, state, params, loss=loss, **(held_out if options else {}))
            params = tf.optim.apply_updates(params, updates)
        gradients.append(tree.leaves(seen[-1][0]))
    want, got = gradients
    assert any((leaf != 0).any() for leaf in want)
    for theirs, ours in zip(want, got, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configured_step_is_one_graph_and_runs_the_kernels(name):
    model = tf.models.build(
        tf.models.preset("transformer_tiny", layers=1, dim=16, heads=2, ff=24, vocab_size=32, seq_len=16)
    )
    tx = tf.optim.from_config(CONFIGS[name], 10, model.config)
    step = tf.train.make_train_step(model, tx)
    batch = {"tokens": torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)}
    states = [tf.train.init_state(model, tx, device=DEVICE) for _ in range(2)]
    compiled = tf.train.compile_step(step, BACKEND)
    owner, kernel = SOURCES["small_fc_lopt" if name == "small_fc_lopt" else "muon"]
    for run, i in ((step, 0), (compiled, 1)):
        with mock.patch.object(owner, kernel, side_effect=getattr(owner, kernel)) as launch:
            states[i], _ = run(states[i], batch)
            states[i], metrics = run(states[i], batch)
        assert launch.call_count > 0 and metrics["skipped"] == 0
    # bfloat16 products: a last bit of theirs is a hundredth of a step.
    assert_same_tree(states[1].params, states[0].params, rtol=1e-2, atol=5e-3)


def test_what_is_refused(monkeypatch):
    wide = init_small_fc_lopt(rng.generator(0), HIDDEN + 1)
    small_fc_lopt(wide)
    with pytest.raises(ValueError, match="network: wanted at most 128 hidden units with kernels=triton, got 129"):
        small_fc_lopt(wide, kernels="triton")
    for maker in (lambda: tf.optim.muon(0.1, kernels="cuda"), lambda: make("small_fc_lopt", "cuda")):
        with pytest.raises(ValueError, match="kernels: wanted one of reference, triton"):
            maker()
    require_optimizer_runs(CONFIGS["muon"], DEVICE)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    require_optimizer_runs(OptimConfig(), torch.device("cpu"))
    for config in CONFIGS.values():
        with pytest.raises(ValueError, match=r"optim.kernels: wanted reference on cpu \(triton runs on a"):
            require_optimizer_runs(config, torch.device("cpu"))
